"""The page of methods: a row's figures, what is kept, a kill, a run that diverges, and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bench import methods
from bench.children.method_row import attempt
from bench.ledger import Ledger
from bench.method_table import Row, label
from bench.methods_page import page
from tests.laws.small import TINY
from tests.tiny import review_folder, reviews

from tunesmith.adapters import find_method
from tunesmith.adapters.peft_format import read_info
from tunesmith.cli import main as tunesmith

ROOT = Path(__file__).resolve().parents[2]
LORA = {"kind": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]}
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews without a validation set: the page measures on the test set."""
    return review_folder(tmp_path_factory.mktemp("reviews"), "test")


@pytest.fixture(scope="module")
def wanted(tiny_base: Path, data: Path) -> dict[str, Any]:
    given = {"model": str(tiny_base), "data": str(data), "reviews": 24, "held": 8, "split": "test", "batch": 2}
    return {**given, "seed": 0, "threads": 1}


@pytest.fixture(scope="module")
def lora(wanted: dict[str, Any]) -> dict[str, Any]:
    return attempt({**wanted, "adapter": LORA, "rate": 1e-2}, 1000)


def test_a_row_counts_what_it_trains_and_really_saves(lora: dict[str, Any]) -> None:
    q, kv = TINY.num_attention_heads * TINY.head_dim, TINY.num_key_value_heads * TINY.head_dim
    count = TINY.num_hidden_layers * 2 * (2 * TINY.hidden_size + q + kv)  # rank 2: A and B of q_proj and v_proj
    assert lora["parameters"] == count and 4 * count < lora["file_bytes"] < 4 * count + 4096
    assert lora["steps"] == 12 and lora["tokens_per_s"] == pytest.approx(lora["tokens"] / lora["train_s"])
    assert lora["peak_bytes"] > 10**8 and lora["imports_bytes"] == 1000
    assert all(lora[key] > 0 for key in ("prompt_ms", "merged_prompt_ms", "greedy_ms", "merged_greedy_ms"))
    assert lora["merged_loss_off"] < 1e-5 and "not_merged" not in lora and json.dumps(lora, allow_nan=False)


def test_a_row_measures_what_the_command_measures(
    lora: dict[str, Any], in_process, tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_base, "--data", data, "--output-dir", tmp_path, "--name", "run", "model.dtype=float32"]
    words += ["adapter.rank=2", "adapter.target_modules=[q_proj, v_proj]", "train.batch_size=2"]
    words += ["train.warmup_ratio=0.1", "train.learning_rate=0.01", "train.pack_tokens=2048", "evaluate.samples=0"]
    assert tunesmith(["train", *map(str, words)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert tunesmith(["evaluate", str(tmp_path / "run"), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert lora["loss"] == pytest.approx(found["eval_loss"], abs=1e-6) and lora["accuracy"] == found["accuracy"]
    assert lora["interval"] == found["accuracy_interval"]
    info = read_info(tmp_path / "run" / "adapter")
    assert lora["parameters"] == info.parameters and lora["file_bytes"] == info.weights.stat().st_size


def test_answers_are_to_the_first_test_reviews(lora: dict[str, Any], wanted: dict[str, Any]) -> None:
    first = reviews(8, seed=1)[:2]
    assert [(s["review"], s["label"]) for s in lora["samples"]] == [(row["text"], row["label"]) for row in first]
    base = attempt({**wanted, "adapter": None, "rate": None}, 1000)
    assert [s["review"] for s in base["samples"]] == [row["text"] for row in first]
    assert base["loss"] != lora["loss"] and not {"parameters", "file_bytes", "train_s"} & base.keys()


@pytest.mark.parametrize(("kind", "why"), [("full", "base's own weights"), ("prompt", "does not fold")])
def test_what_does_not_fold_says_why(wanted: dict[str, Any], kind: str, why: str) -> None:
    found = attempt({**wanted, "adapter": {"kind": kind}, "rate": 1e-4}, 0)
    assert why in found["not_merged"] and "merged_prompt_ms" not in found and found["loss"] > 0


def test_a_row_that_diverges_and_one_that_does_not_fit(wanted: dict[str, Any]) -> None:
    found = attempt({**wanted, "adapter": LORA, "rate": 1e30}, 0)
    assert found.keys() == {"diverged"}
    found = attempt({**wanted, "adapter": {"kind": "last_layers", "layers": 9}, "rate": 1e-3}, 0)
    assert found.keys() == {"error"} and "9" in found["error"]


def record(loss: float, **more: Any) -> dict[str, Any]:
    known = {"accuracy": 0.5, "interval": 0.1, "prompt_ms": 1.0, "greedy_ms": 2.0, "peak_bytes": 3 * 2**20}
    samples = [{"review": "a | b\nc", "label": "positive", "answer": "<b>`x`"}]
    return {**known, "loss": loss, "imports_bytes": 2**20, "samples": samples, "wall_s": 60.0, **more}


def found(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What methods.json holds of these rows."""
    about = {"cpu": {"model": "c", "cores": 2, "features": []}, "memory": {"total_bytes": 2**30}, "system": "s"}
    asked = {"model": "m", "data": "d", "reviews": 8, "held": 4, "batch": 2, "seed": 0, "threads": 2, "split": "test"}
    return {
        "command": "python -m bench.methods", "options": asked, "minutes": 1.0, "about": {**about, "versions": {}},
        "base": record(9.0), "rows": rows, "missing": {"dora": "there is no method 'dora'"},
    }  # fmt: skip


def test_the_table_is_sorted_by_held_out_loss_after_the_base() -> None:
    trained = {"rate": 3e-4, "parameters": 1234, "file_bytes": 4_919_040, "train_s": 2.0, "tokens_per_s": 570.0}
    rows = {
        "full": record(2.0, **trained, not_merged="it trains the base's own weights", said=["warning: odd"]),
        "lora": record(1.0, **trained, merged_prompt_ms=0.5, merged_greedy_ms=1.0, attach_s=9.0),
        "ia3": {"rate": 1e-3, "diverged": "step 2: the loss is nan"},
    }
    text = page(found(rows), "My words.")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| untuned base", "| `lora`", "| `full`"]
    cells = "| `lora` | 3e-4 | 1,234 | 4.92 MB | 2.0 | 570 | 2 | 1.0 | 0.5 | 2 | 1 | 1.0000 | 50.0% ± 10.0% |"
    assert table[3] == cells and len(cells.split(" | ")) == len(table[0].split(" | "))
    assert "**NOT RUN: `dora`**: there is no method" in text and "**DIVERGED: `ia3`**: step 2" in text
    assert "`full`: warning: odd" in text and "`lora`: its start took 9 s" in text and "not merged" not in text
    assert "1. a | b c (**positive**)" in text and "<b>" not in text and "My words." in text
    assert "not measured" in page({**found({}), "base": None}, "")


def test_a_variant_learns_at_its_own_rate(tmp_path: Path) -> None:
    row, facts, file = Row("rslora", "x", 1e-4, LORA), {"rates": {"rslora": 5e-4}}, tmp_path / "rates.json"
    assert methods.rate_of(row, facts, file) == 5e-4  # there is no search
    entry = {"adapter": LORA, "leads": False, "chosen": 1e-4}
    for change, rate in (({}, 1e-4), ({"leads": True}, 5e-4), ({"chosen": None}, 5e-4), ({"adapter": {}}, 5e-4)):
        file.write_text(json.dumps({"rows": {"rslora": {**entry, **change}}}), encoding="utf-8")
        assert methods.rate_of(row, facts, file) == rate


def test_the_time_of_a_command(tmp_path: Path, wanted: dict[str, Any]) -> None:
    given = {"limit": 24, "test": 8, "threads": 1, "model": wanted["model"], "data": wanted["data"]}
    options = methods.Options(**given, minutes=0.0, out=tmp_path, work=tmp_path, command="c")
    row, facts = Row("lora", "x", 1e-3, LORA), {**found({}), "rates": {"lora": 1e-3}, "absent": {}}
    pages = methods.Pages(options, [row], facts, {"lora": 1e-3}, Ledger(tmp_path / "methods.jsonl"))
    assert set(pages.run()["missing"]) == {"untuned base", "lora"}
    assert "NOT RUN: `lora`**: no time was left" in (tmp_path / "methods.md").read_text(encoding="utf-8")


def run_page(words: list[object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.methods", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)


def test_what_is_finished_is_not_measured_again(tmp_path: Path, wanted: dict[str, Any]) -> None:
    words: list[object] = ["--model", wanted["model"], "--data", wanted["data"], "--limit", 16, "--test", 6]
    words += ["--methods", "ia3", "--threads", 1, "--out", tmp_path, "--work", tmp_path / "work", "--rates", "none"]
    done = run_page(words)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    per_layer = 2 * TINY.num_key_value_heads * TINY.head_dim + TINY.intermediate_size
    assert first["rows"]["ia3"]["parameters"] == TINY.num_hidden_layers * per_layer
    assert first["rows"]["ia3"]["peak_bytes"] > first["rows"]["ia3"]["imports_bytes"] > 10**8
    text = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert (
        "| untuned base |" in text
        and f"| `ia3` | {label(find_method('ia3').learning_rate)} |" in text
        and "Not written yet." in text
    )
    (tmp_path / "methods.md").write_text(text.replace("Not written yet.", "Five lines.\n\nOf mine."), encoding="utf-8")
    ledger = tmp_path / "work" / "methods.jsonl"
    base, row = ledger.read_text(encoding="utf-8").splitlines()
    ledger.write_text(f"{base}\n{row[: len(row) // 2]}", encoding="utf-8")  # killed while it wrote
    done = run_page(words)
    assert done.returncode == 0 and "ia3: begins" in done.stderr and "base: begins" not in done.stderr, done.stderr
    again = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    assert again["base"] == first["base"] and again["rows"]["ia3"]["loss"] == first["rows"]["ia3"]["loss"]
    assert "Five lines.\n\nOf mine." in done.stdout and "Not written yet." not in done.stdout
