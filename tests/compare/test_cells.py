"""`tunesmith compare`, whole, on a model of two layers: real cells, in this process where processes do not matter."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.tiny import reviews, write_rows

from tunesmith import api, workflow
from tunesmith.train.log import read_metrics

ROOT = Path(__file__).parents[2]
TIMED = ("seconds", "tokens_per_second", "peak_gib", "file_bytes")
pytestmark = pytest.mark.usefixtures("single_thread")

TEXT = """
base:
  model: {{path: {base}, dtype: float32, device: cpu}}
  data: {{train: {data}, template: alpaca-short, cutoff: 128}}
  train: {{batch_size: 8, pack_tokens: 256, learning_rate: 0.02, save_steps: 2}}
methods: [{{kind: lora, rank: 2}}, {{kind: bitfit}}]
budget: {{examples: 45}}
measure: {{metrics: [accuracy, eval_loss, perplexity], samples: 1}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 reviews to train on, 8 to validate, 40 to test."""
    folder = tmp_path_factory.mktemp("compared") / "reviews"
    write_rows(folder / "train.jsonl", reviews(24))
    write_rows(folder / "valid.jsonl", reviews(8, seed=1))
    write_rows(folder / "test.jsonl", reviews(40, seed=2))
    return folder


@pytest.fixture
def grid(tmp_path, tiny_base, data) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.format(base=tiny_base, data=data), encoding="utf-8")
    return path


def compare(command, grid, *words, code=0):
    got, out, err = command("compare", grid, "--in-process", "--out", grid.parent / "out", *words)
    assert got == code, err
    return out, err


def rows_of(out: Path) -> list[dict[str, str]]:
    """cells.csv without what a clock or the memory says."""
    with (out / "cells.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def test_cells_are_trained_measured_and_told(command, in_process, grid, data):
    out, _ = compare(command, grid)
    assert out == f"{grid.parent / 'out' / 'report.html'}\n"
    found = rows_of(grid.parent / "out")
    assert [row["cells"] for row in found] == ["lora", "bitfit", "untuned"]
    assert {row["examples"] for row in found[:2]} == {"40"}  # 5 whole batches of 8 are in 45
    for row in found[:2]:
        folder = grid.parent / "out" / "cells" / row["folder"]
        known = api.evaluate(folder, data=str(data), metrics=["accuracy", "eval_loss", "perplexity"])
        assert float(row["accuracy"]) == pytest.approx(known["accuracy"])
        for name in ("eval_loss", "perplexity"):  # measured with shared beginnings there, one by one here
            assert float(row[name]) == pytest.approx(known[name], rel=1e-5)
        assert int(row["tokens"]) == read_metrics(folder / "metrics.jsonl")[-1]["num_tokens"]
        assert row["parameters"] == str(json.loads((folder / "adapter/tunesmith.json").read_text())["parameters"])
        assert not list(folder.glob("checkpoint-*")) and json.loads((folder / "verify.json").read_text())["ok"]
    untuned = api.evaluate(json.loads((folder / "adapter/tunesmith.json").read_text())["base"]["name"], data=str(data))
    assert found[2]["rate"] == "" and "eval_loss" in untuned
    page = (grid.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "untuned base" in page and "Sample 1" in page


def test_stopped_and_started_again_it_is_the_same(command, in_process, grid, monkeypatch):
    compare(command, grid)
    whole = rows_of(grid.parent / "out")
    os.rename(grid.parent / "out", grid.parent / "whole")
    save, calls = workflow.save_run_adapter, []

    def stop_once(*args):
        calls.append(args)
        if len(calls) == 2:  # the second cell's training is over, and nothing of it is saved but its checkpoints
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(workflow, "save_run_adapter", stop_once)
    _, err = compare(command, grid, code=130)
    assert err.endswith("interrupted\n")
    _, err = compare(command, grid)
    assert "resumed from" in err and err.count("there already") == 2
    assert rows_of(grid.parent / "out") == whole
    one, two = (sorted((grid.parent / name / "cells").iterdir()) for name in ("whole", "out"))
    assert [path.name for path in one] == [path.name for path in two]
    for a, b in zip(one, two, strict=True):
        assert (a / "outcomes.json").read_bytes() == (b / "outcomes.json").read_bytes()


def test_what_ended_before_its_first_checkpoint_begins_anew(command, in_process, grid, monkeypatch):
    from tunesmith.train.loop import Trainer

    compare(command, grid, "methods=[bitfit]", "baseline=false")
    whole = rows_of(grid.parent / "out")
    os.rename(grid.parent / "out", grid.parent / "whole")
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self: step(self) if self.progress.step < 1 else 1 / 0 or {})
    _, err = compare(command, grid, "methods=[bitfit]", "baseline=false", code=4)
    assert "error: ZeroDivisionError" in err and "none of 1 cells finished" in err
    monkeypatch.setattr(Trainer, "_step", step)
    _, err = compare(command, grid, "methods=[bitfit]", "baseline=false", code=4)  # it is not tried unasked
    compare(command, grid, "methods=[bitfit]", "baseline=false", "--retry")
    assert rows_of(grid.parent / "out") == whole


def test_cells_that_fail_are_lines_of_the_report(command, in_process, grid):
    methods = "methods=[{name: wild, kind: lora, set: {train.learning_rate: 1e30, train.max_grad_norm: 0}}, bitfit]"
    _, err = compare(command, grid, methods, "axes.data.cutoff=[128]", "baseline=false")
    assert "failed: wild_cutoff=128_seed=0: diverged: " in err
    text = (grid.parent / "out" / "report.md").read_text(encoding="utf-8")
    assert "1 of 2 cells are finished" in text and "| wild\\_cutoff=128\\_seed=0 | failed | diverged: " in text
    _, err = compare(command, grid, "templates=[nothing, alpaca-short]", "methods=[bitfit]", "baseline=false")
    assert "failed: bitfit_template=nothing_seed=0: refused: " in err and "[2/2]" in err


def test_a_search_and_what_is_forgotten(command, in_process, grid, data):
    forgetting = f"measure.forgetting=[{{name: general, data: {data}, split: valid, metrics: [mean_token_accuracy]}}]"
    compare(command, grid, "search={rates: 2, share: 0.4}", "methods=[bitfit]", "budget.examples=80", forgetting)
    text = (grid.parent / "out" / "report.md").read_text(encoding="utf-8")
    assert "lost: general mean\\_token\\_accuracy" in text
    trials = sorted((grid.parent / "out" / "cells").glob("trial_*"))
    losses = {
        path.name.split("=")[1].rpartition("-")[0]: json.loads((path / "result.json").read_text())["valid"]
        for path in trials
    }
    best = min(losses, key=lambda rate: losses[rate]["eval_loss"])
    (row, _) = rows_of(grid.parent / "out")
    assert float(row["rate"]) == pytest.approx(float(best)) and row["examples"] == "48"
    assert not (trials[0] / "adapter").exists()  # of a trial nothing is kept but its measures


def test_how_a_task_was_measured_is_said(command, in_process, grid, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a quiet river and a loud crowd " * 30}) + "\n" for _ in range(3)))
    task = f"measure.forgetting=[{{task: c4, data: {text}, settings: {{window: 32, windows: 2}}}}]"
    compare(command, grid, "methods=[bitfit]", task)
    said = (grid.parent / "out" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"- c4: .*window 32, stride 32.*bos", said, re.I)
    assert f"| c4 | c4; {text}; window 32; windows 2 |".replace("_", "\\_") in said


@pytest.mark.parametrize("budget", ["{tokens: 1500}", "{seconds: 0.2}", "{memory: 3.0}", "{memory: 0.01}"])
def test_every_kind_of_budget(command, in_process, grid, budget):
    words = ("methods=[bitfit]", "baseline=false", "base.train.pack_tokens=null", f"budget={budget}")
    _, err = compare(command, grid, *words, code=4 if "0.01" in budget else 0)
    if "0.01" in budget:
        assert "out of memory: budget.memory 0.01 GiB: " in err
        return
    (row,) = rows_of(grid.parent / "out")
    assert int(row["tokens"]) <= 1500 or "tokens" not in budget
    assert int(row["steps"]) >= 1
    if "seconds" in budget:
        assert len(list((grid.parent / "out" / "cells").glob("speed_*"))) == 1


def test_a_file_of_rows_has_no_test_split(command, in_process, grid, data):
    words = (f"base.data.train={data / 'train.jsonl'}", "base.data.valid_size=8", "methods=[bitfit]", "baseline=false")
    _, err = compare(command, grid, *words, code=4)
    assert "measure.split: " in err and "is one file, which cells train on, and has no test rows" in err
    compare(command, grid, *words, "measure.split=valid")
    assert "validation rows" in (grid.parent / "out" / "report.md").read_text(encoding="utf-8")


def test_a_plan_runs_nothing(command, grid):
    out, _ = compare(command, grid, "--plan", "seeds=[0, 1]")
    assert out.splitlines()[-1] == "4 cells, 0 trials of learning rates, 1 untuned; 45 examples each"
    assert not (grid.parent / "out").exists()
    assert command("compare", grid, "--plan", "--json")[1].startswith("{")


def test_bad_input_is_one_line(command, grid):
    code, out, err = command("compare", grid, "budget.exampels=3")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "did you mean 'examples'?" in err
    assert command("compare")[0] == 2
    code, _, err = command("compare", grid, "base.data.train=/nowhere/x.jsonl", "--out", grid.parent / "o")
    assert code == 2 and "/nowhere/x.jsonl" in err and not (grid.parent / "o").exists()


def test_killed_at_any_moment_the_same_command_goes_on(grid, command, in_process):
    """The parent is killed: its cell ends with it, and the next start goes on from the cell's checkpoint."""
    out = grid.parent / "out"
    words = (
        "baseline=false",
        "methods=[bitfit]",
        "budget.examples=1600",
        "base.evaluate.every_steps=100",
        "base.train.save_steps=20",
    )
    program = [sys.executable, "-m", "tunesmith", "compare", str(grid), "--out", str(out), *words]
    parent = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("cells/bitfit*/checkpoint-*/COMPLETE")) and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.05)
        children = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive
    (folder,) = out.glob("cells/bitfit*")
    assert not (folder / "result.json").exists()
    _, err = compare(command, grid, *words)
    assert "resumed from" in err
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, 201))
