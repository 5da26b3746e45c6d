"""A run that was killed, wherever, and resumed ends with the same bytes as one that was not.

Three epochs of five steps with dropout, shuffling, packing and accumulation; a checkpoint every second step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny import reviews, words, write_rows

from tunesmith.cli import main
from tunesmith.files import sha256_file
from tunesmith.train.checkpoint import latest_checkpoint
from tunesmith.train.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
STEPS = 15
pytestmark = pytest.mark.usefixtures("single_thread", "in_process")

# A run that sends itself a signal at a chosen moment; `step` counts from 1.
CHILD = """
import os, signal, sys
import tunesmith.files
from tunesmith.cli import main
from tunesmith.train import checkpoint, loop

point, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
send = lambda: os.kill(os.getpid(), number)
make, save, write = loop.Trainer._accumulate, loop.Trainer.save, checkpoint.atomic_write_json
place, measure, seen = tunesmith.files._put_in_place, loop.Trainer._evaluate, []

def accumulate(self, *args):
    value = make(self, *args)
    seen.append(self.progress.step)
    if point == "between packs" and self.progress.step == step - 1 and seen.count(step - 1) == 2:
        send()
    return value

def start_to_save(self):
    if point == "before the save" and self.progress.step == step:
        send()
    save(self)

def write_state(path, value):
    if point == "in the save" and value["step"] == step:
        send()
    write(path, value)

def put(staging, path):
    if point == "before the rename" and path.name.endswith(f"{step:06d}"):
        send()
    place(staging, path)
    if point == "after the rename" and path.name.endswith(f"{step:06d}"):
        send()

def evaluate(self, *args):
    if point == "in the evaluation" and self.progress.step == step:
        send()
    return measure(self, *args)

loop.Trainer._accumulate, loop.Trainer.save, loop.Trainer._evaluate = accumulate, start_to_save, evaluate
checkpoint.atomic_write_json, tunesmith.files._put_in_place = write_state, put
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", reviews(38))
    write_rows(folder / "valid.jsonl", reviews(6, seed=1))
    return folder


def arguments(base: Path, data: Path, out: Path) -> list[str]:
    given = {"train__epochs": 3, "train__save_steps": 2, "train__micro_batch": 3, "adapter__dropout": 0.1}
    return ["train", *words(base, data, out, **given, evaluate__samples=0)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base, data) -> Path:
    """The uninterrupted run. Do not change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(tiny_base, data, out)) == 0
    torch.set_num_threads(threads)
    return out / "run"


def stopped(point: str, step: int, number: int, base: Path, data: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, which gets the signal `number` at that point."""
    command = [sys.executable, "-c", CHILD, point, str(step), str(number), *arguments(base, data, out)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)


def assert_same(run: Path, whole: Path) -> None:
    """Adapter, optimizer, random state and progress are equal, byte for byte; every step is logged once."""
    last = f"checkpoint-{STEPS:06d}"
    for name in ("adapter", "optimizer", "rng"):
        assert sha256_file(run / last / f"{name}.safetensors") == sha256_file(whole / last / f"{name}.safetensors"), (
            name
        )
    weights = Path("adapter", "adapter_model.safetensors")
    assert sha256_file(run / weights) == sha256_file(whole / weights)
    ours, theirs = (json.loads((r / last / "state.json").read_text())["state"] for r in (run, whole))
    assert ours == theirs
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
    logged = [[[line.get(key) for key in keys] for line in read_metrics(r / "metrics.jsonl")] for r in (run, whole)]
    assert logged[0] == logged[1] and [line[0] for line in logged[0]] == list(range(1, STEPS + 1))


def test_the_run_has_what_makes_resuming_hard(whole):
    config = (whole / "config.yaml").read_text()
    assert all(text in config for text in ("dropout: 0.1", "shuffle: true", "micro_batch: 3"))
    state = json.loads((whole / f"checkpoint-{STEPS:06d}" / "state.json").read_text())
    assert state["step"] == STEPS and state["state"]["progress"]["updates"] == STEPS


def test_the_comparison_bites(whole, tmp_path, tiny_base, data):
    """Without its random state a resumed run ends elsewhere: dropout matters here."""
    run = _copy_of_begun(whole, tmp_path)
    from tunesmith.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "restore_rng_state", lambda tensors, state: None)
        assert main(["train", "--resume", str(run)]) == 0
    with pytest.raises(AssertionError):
        assert_same(run, whole)


def _copy_of_begun(whole: Path, out: Path) -> Path:
    """The run as if it had been killed after its checkpoint of step 14: the finished part taken away."""
    run = Path(shutil.copytree(whole, out / "run"))
    for path in (run / f"checkpoint-{STEPS:06d}", run / "adapter"):
        shutil.rmtree(path)
    return run


@pytest.mark.parametrize(
    ("point", "step", "since"),
    [
        ("between packs", 8, 6),  # the middle of epoch 2
        ("before the save", 8, 6),  # its line is in metrics.jsonl already
        ("in the save", 8, 6),
        ("after the rename", 8, 8),  # older checkpoints not yet removed
        ("in the evaluation", 10, 8),
    ],
)
def test_killed_and_resumed_is_equal(whole, tmp_path, tiny_base, data, command, point, step, since):
    child = stopped(point, step, signal.SIGKILL, tiny_base, data, tmp_path)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run = tmp_path / "run"
    assert latest_checkpoint(run) == run / f"checkpoint-{since:06d}"
    code, out, err = command("train", "--resume", run)
    assert (code, out) == (0, f"{run}\n"), err
    assert f"resumed from {run / f'checkpoint-{since:06d}'} at step {since} of {STEPS}" in err
    assert_same(run, whole)
    assert not list(run.glob(".*"))  # what the killed writer left is gone


def test_resumed_in_a_process_of_its_own(whole, tmp_path, tiny_base, data):
    stopped("between packs", 7, signal.SIGKILL, tiny_base, data, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "train", "--resume", str(tmp_path / "run")],
        env=ENV, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole)


def test_killed_twice(whole, tmp_path, tiny_base, data, command):
    stopped("between packs", 4, signal.SIGKILL, tiny_base, data, tmp_path)
    run = tmp_path / "run"
    again = [sys.executable, "-c", CHILD, "before the save", "12", "9", "train", "--resume", str(run)]
    assert subprocess.run(again, env=ENV, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert command("train", "--resume", run)[0] == 0
    assert_same(run, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, tiny_base, data, command, number):
    child = stopped("between packs", 7, number, tiny_base, data, tmp_path)
    run = tmp_path / "run"
    assert child.returncode == 130 and child.stdout == ""
    assert "finishing this step, then saving a checkpoint (press Ctrl-C again to stop at once)" in child.stderr
    last = child.stderr.splitlines()[-1]
    assert last == (
        f"interrupted: stopped after step 7 of {STEPS}, checkpoint saved; go on with: tunesmith train --resume {run}"
    )
    assert latest_checkpoint(run) == run / "checkpoint-000007"
    assert not (run / "adapter").exists()
    assert command(*last.split("tunesmith ")[1].split())[0] == 0
    assert_same(run, whole)


def test_a_damaged_checkpoint_is_skipped_and_named(whole, tmp_path, command, caplog):
    run = _copy_of_begun(whole, tmp_path)
    shutil.copytree(run / "checkpoint-000014", run / "checkpoint-000016")
    (run / "checkpoint-000016" / "COMPLETE").unlink()
    code, _, err = command("train", "--resume", run)
    assert code == 0 and f"resumed from {run / 'checkpoint-000014'}" in err
    assert "checkpoint-000016 is skipped" in err + caplog.text and "never finished" in err + caplog.text
    shutil.rmtree(run / "checkpoint-000016")
    assert_same(run, whole)


def test_a_checkpoint_that_rotted_is_refused_by_name(whole, tmp_path, command):
    run = _copy_of_begun(whole, tmp_path)
    file = run / "checkpoint-000014" / "optimizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, _, err = command("train", "--resume", run)
    assert code == 2 and "optimizer.safetensors: its SHA-256 differs" in err.splitlines()[-1]


def test_a_finished_run_is_only_finished_again(whole, tmp_path, command):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    code, out, err = command("train", "--resume", run)
    assert (code, out) == (0, f"{run}\n"), err
    assert f"at step {STEPS} of {STEPS}: its training had ended, so only its end is made again" in err
    assert_same(run, whole)


def test_other_settings_and_other_data_are_refused(whole, tmp_path, tiny_base, data, command):
    run = _copy_of_begun(whole, tmp_path)
    before = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    for change in (
        "train.learning_rate=0.02",
        "train.batch_size=4",
        "adapter.rank=4",
        "train.seed=1",
        "train.epochs=4",
    ):
        code, _, err = command("train", "--resume", run, change)
        assert code == 2 and "was written by a run with other data, model or settings" in err.splitlines()[-1], change
    other = tmp_path / "data"
    shutil.copytree(data, other)
    text = (other / "train.jsonl").read_text()
    (other / "train.jsonl").write_text(text.replace("plot", "plan", 1))
    code, _, err = command("train", "--resume", run, f"data.train={other}")
    assert code == 2 and "was written by a run with other data" in err.splitlines()[-1]
    assert {path: sha256_file(path) for path in run.rglob("*") if path.is_file()} == before


def test_where_to_save_may_change(whole, tmp_path, command):
    run = _copy_of_begun(whole, tmp_path)
    assert command("train", "--resume", run, "train.save_steps=1", "train.keep_checkpoints=5")[0] == 0
    assert_same(run, whole)


def test_automatic_choices_of_the_start_are_kept(whole, tmp_path, tiny_base, data, command, monkeypatch):
    """The words of the start, given again: what memory allows has changed since, the run goes on as it was."""
    from tunesmith.train import planner

    given = [word for word in arguments(tiny_base, data, tmp_path) if not word.startswith("train.pack_tokens")]
    monkeypatch.setitem(planner.MOST, "cpu", 512)
    assert command(*given)[0] == 0
    run = tmp_path / "run"
    weights = run / "adapter" / "adapter_model.safetensors"
    sha = sha256_file(weights)
    shutil.rmtree(run / f"checkpoint-{STEPS:06d}")
    shutil.rmtree(run / "adapter")
    monkeypatch.setitem(planner.MOST, "cpu", 256)
    code, _, err = command(*given, "--resume")
    assert code == 0, err
    assert sha256_file(weights) == sha
