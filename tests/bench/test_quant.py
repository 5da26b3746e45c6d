"""The quantization bench on a tiny random model: every row and both parts, and what is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import write_base

ROOT = Path(__file__).resolve().parents[2]


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.quant", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text to measure on and one to calibrate on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    (folder / "text" / "wikitext2_valid.txt").write_text("A joy from start to end , I laughed and cried . \n" * 40)
    (folder / "text" / "c4_300.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Text {i}: dull and far too long."}) for i in range(60))
    )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return write_base(tmp_path_factory.mktemp("base"), **sizes)


def words(tmp_path: Path, base: Path, data: Path) -> list[object]:
    small = ["--windows", 2, "--calibration-windows", 2, "--length", 64, "--repeats", 2, "--threads", 1]
    return ["--data-dir", data, "--model", base, *small, "--work", tmp_path / "work", "--out", tmp_path / "out"]


def test_rows_are_measured_and_written(tmp_path: Path, base: Path, data: Path) -> None:
    done = bench(*words(tmp_path, base, data), "--rows", "fp32,nf4+dq,gptq-3")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "quant.json").read_text())
    assert {name: round(r["bits"], 1) for name, r in found["perplexity"].items()} == {
        "fp32": 32.0, "nf4+dq": 4.1, "gptq-3": 3.4,
    }  # fmt: skip
    assert all(r["predicted_tokens"] == 2 * 63 and math.isfinite(r["perplexity"]) for r in found["perplexity"].values())
    assert len({r["perplexity"] for r in found["perplexity"].values()}) == 3
    assert set(found["speed"]) == {"nf4+dq"} and found["speed"]["nf4+dq"]["read_gbps"] > 0
    page = (tmp_path / "out" / "quant.md").read_text()
    assert "| `gptq-3` |" in page and "## What it costs" in page


def test_wrong_words_are_one_line(tmp_path: Path, base: Path, data: Path) -> None:
    done = bench(*words(tmp_path, base, data), "--rows", "nf5")
    assert done.returncode == 2 and "got ['nf5']" in done.stderr + done.stdout
    done = bench(*words(tmp_path, base, tmp_path))
    assert done.returncode == 2 and "is not there; say with --data-dir" in done.stderr + done.stdout
