"""Whole runs with 8-bit, offloaded and paged optimizers: the same bytes wherever states lie, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tests.tiny import reviews, words, write_base, write_rows

from tunesmith.files import sha256_file

FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors")
LAST, BEFORE = "checkpoint-000006", "checkpoint-000004"
pytestmark = pytest.mark.usefixtures("single_thread", "in_process")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), hidden_size=48, intermediate_size=96, head_dim=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reviews(24))


def train(command, base: Path, data: Path, out: Path, *more: str, **settings: object) -> tuple[int, str]:
    given = {"adapter.kind": "full", "train.epochs": 2, "train.batch_size": 8, "train.save_steps": 2}
    given |= {"evaluate.samples": 0, "train.learning_rate": 1e-3} | {f"train.{k}": v for k, v in settings.items()}
    drop = ("adapter.rank", *(f"{key}=" for key in given))
    kept = [word for word in words(base, data, out) if not word.startswith(drop)]
    code, _, err = command("train", *kept, *(f"{key}={value}" for key, value in given.items()), *more)
    return code, err


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_states_on_disk_change_no_byte_and_a_resume_may_move_them(command, base, data, tmp_path, optimizer) -> None:
    for offload in ("none", "disk"):
        code, err = train(command, base, data, tmp_path / offload, optimizer=optimizer, offload=offload)
        assert code == 0, err
    runs = {offload: tmp_path / offload / "run" for offload in ("none", "disk")}
    begun = Path(shutil.copytree(runs["disk"], tmp_path / "begun" / "run"))
    for path in (begun / LAST, begun / "adapter"):
        shutil.rmtree(path)
    code, _, err = command("train", "--resume", begun, "train.offload=none")
    assert code == 0 and f"resumed from {begun / BEFORE}" in err, err
    for run in (runs["disk"], begun):
        assert [sha256_file(run / LAST / name) for name in FILES] == [
            sha256_file(runs["none"] / LAST / name) for name in FILES
        ]
    assert not [path.name for path in runs["disk"].iterdir() if path.name.startswith("optimizer-")]
    states = load_file(runs["none"] / LAST / "optimizer.safetensors")
    eight = any(name.endswith("up_proj.weight.exp_avg_absmax") for name in states)
    assert eight == (optimizer == "adamw_8bit")
    code, _, err = command("train", "--resume", begun, "train.optimizer=paged_adamw_8bit", "train.offload=none")
    if optimizer == "adamw_8bit":  # which is what there is for it on a CPU
        assert code == 0 and "adamw_8bit is used" in " ".join(err.split()), err
    else:
        assert code == 2 and "other data, model or settings" in err


def test_no_paging_on_a_cpu_is_said_and_recorded(command, base, data, tmp_path) -> None:
    code, err = train(command, base, data, tmp_path, optimizer="paged_adamw_32bit", max_steps=1)
    assert code == 0
    assert "train.optimizer: paged_adamw: a CPU has no GPU memory to page; adamw is used" in " ".join(err.split())
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]
    assert (recorded["optimizer"], recorded["offload"]) == ("adamw", "none")


def test_states_that_are_there_already_are_not_moved(command, base, data, tmp_path) -> None:
    code, err = train(command, base, data, tmp_path, offload="cpu", max_steps=1)
    assert code == 0 and "its optimizer's states are there already" in " ".join(err.split())


def test_selective_recomputation_changes_no_byte(command, base, data, tmp_path) -> None:
    for way in ("false", "selective"):
        assert train(command, base, data, tmp_path / way, recompute=way, max_steps=2)[0] == 0
    weights = [next((tmp_path / way / "run" / "adapter").glob("*.safetensors")) for way in ("false", "selective")]
    assert sha256_file(weights[0]) == sha256_file(weights[1])
