"""The bench of lm-evaluation-harness: what it computes from two sides, and a whole run on a tiny random model."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.harness import TASKS, Options, agreement, results, speed
from bench.ledger import Ledger
from tests.tiny import write_base

ROOT = Path(__file__).resolve().parents[2]


def test_agreement_and_speed_by_hand():
    ours = {"scores": [[-1.0, -2.0], [-3.0, -2.5]], "acc": [0, 1], "acc_norm": [0, 1], "accuracy": 0.5}
    theirs = {"scores": [[-1.0, -2.01], [-2.4, -2.5]], "acc": [0, 0], "acc_norm": [0, 1], "accuracy": 1.0}
    found = agreement(ours, theirs)
    assert found["same"] == {"acc": 0.5, "acc_norm": 1.0} and found["items"] == 2
    assert found["largest_difference"] == pytest.approx(0.6) and found["accuracy"] == {"ours": 0.5, "theirs": 1.0}
    found = speed([({"seconds": 1.0}, {"seconds": 2.0}), ({"seconds": 2.0}, {"seconds": 6.0})])
    assert found["ratio"] == {"median": 2.5, "least": 2.0, "largest": 3.0}
    assert found["seconds"] == {"ours": 1.5, "theirs": 4.0}


def test_the_fastest_batch_size_is_compared_with(tmp_path):
    options, ledger = Options("m", 1, 0, 1, (1, 8), 2), Ledger(tmp_path / "ledger.jsonl")
    assert results(options, ledger)["tasks"] == {}
    for side, seconds in zip(options.sides(), (1.0, 9.0, 4.0), strict=True):
        one = {"scores": [[-1.0, -2.0]], "acc": [0], "acc_norm": [0], "accuracy": 1.0, "seconds": seconds}
        ledger.add(options.key(side, 0), {"tasks": dict.fromkeys(TASKS, one), "about": {"cpu": "a"}})
    found = results(options, ledger)
    assert found["best"] == "hf, batch 8" and found["all"]["ratio"]["median"] == 4
    assert found["tasks"]["hellaswag"]["seconds"] == {"ours": 1.0, "theirs": 4.0}


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.harness", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def rows(count: int, word: str, ask: str) -> str:
    """Rows of LLM-Adapters."""
    made = []
    for number in range(count):
        listed = f"{word}1: a joy of {number} {word}2: dull and far too long {word}3: a mess"
        instruction = f"{ask}: What is film {number}?\n\n{listed}\n\nAnswer format: " + "/".join(
            f"{word.lower()}{n}" for n in (1, 2, 3)
        )
        made.append(
            {"instruction": instruction, "input": "", "output": "", "answer": f"{word.lower()}{number % 3 + 1}"}
        )
    return "".join(json.dumps(row) + "\n" for row in made)


def test_a_whole_run(tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("NOT TESTED, lm-eval is not there: pip install 'tunesmith[harness]'")
    (tmp_path / "commonsense").mkdir()
    for task, file in TASKS.items():
        ending = task == "hellaswag"
        ask = (
            "Please choose the correct ending to complete the given sentence" if ending else "Please choose the answer"
        )
        with gzip.open(tmp_path / "commonsense" / file, "wt", encoding="utf-8") as made:
            made.write(rows(9, "Ending" if ending else "Answer", ask))
    words = [
        "--data-dir", tmp_path, "--model", write_base(tmp_path / "base"), "--items", 6, "--rounds", 1, "--shots", 1,
        "--batch-sizes", 4, "--work", tmp_path / "work", "--out", tmp_path / "out", "--threads", 1,
    ]  # fmt: skip
    done = bench(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "harness.json").read_text())
    for task in TASKS:
        assert found["tasks"][task]["items"] == 6
        assert found["tasks"][task]["same"] == {"acc": 1.0, "acc_norm": 1.0}
        assert found["tasks"][task]["largest_difference"] < 1e-3
    page = (tmp_path / "out" / "harness.md").read_text()
    assert "| `arc_easy` | 6 | 100.00% | 100.00% |" in page and "--items 6 --shots 1 --rounds 1 --batch-sizes 4" in page
    again = bench(*words)
    assert again.returncode == 0 and "round 1" not in again.stderr  # nothing is measured twice
    assert bench("--data-dir", tmp_path / "none").returncode == 2
