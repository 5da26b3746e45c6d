"""The bench's commands on a tiny random model, each run in a process of its own, as a user starts it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    """`python -m bench WORDS`, with this interpreter for ours and for Hugging Face's side."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    env.pop("TUNESMITH_BENCH_DATA", None)
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data with an Alpaca set of 12 and 3 rows of unequal length."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "alpaca").mkdir()
    rows = [{"instruction": f"Count {i}", "input": "x " * (i % 3), "output": "one " * (i + 1)} for i in range(15)]
    lines = [json.dumps(row) + "\n" for row in rows]
    with gzip.open(folder / "alpaca" / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines[:12])
    (folder / "alpaca" / "dev.jsonl").write_text("".join(lines[12:]), encoding="utf-8")
    return folder


def quick(tmp_path: Path, *sides: str) -> list[object]:
    """Words that keep everything in `tmp_path` and short."""
    words: list[object] = ["--work", tmp_path / "work", "--out", tmp_path / "results.json", "--ceiling-seconds", 0]
    for side in sides:
        words += ["--python", side if "=" in side else f"{side}={sys.executable}"]
    return words


def read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["jobs"]


def test_our_command_is_measured_and_a_peer_that_cannot_run_is_named(
    tmp_path: Path, alpaca: Path, tiny_base: Path
) -> None:
    words = ["--jobs", "alpaca", "--rounds", 2, "--peers", "hf-mb4", "--model", tiny_base, "--data-dir", alpaca]
    done = bench("run", *words, *quick(tmp_path, "ours", "hf=/nonexistent/python"))
    assert done.returncode == 0, done.stderr
    job = read(tmp_path)["alpaca"]
    ours = [run for run in job["runs"] if run["mode"] == "ours"]
    assert len(ours) == 2 and all(run["error"] is None and run["unlike"] is None for run in ours)
    assert all(run["tokens"] == job["facts"]["tokens"] and run["peak_bytes"] > 10**8 for run in ours)
    assert all(0 < run["begin_s"] < run["first_step_s"] <= run["saved_s"] < run["wall_s"] for run in ours)
    assert ours[0]["held_out"] == pytest.approx(job["held_out_base"], rel=0.1) and ours[0]["held_out"] is not None
    failed = [run for run in job["runs"] if run["mode"] == "hf-mb4"]
    assert len(failed) == 1 and "nonexistent" in failed[0]["error"]  # it is not tried again
    assert "hf-mb4: not measured" in done.stdout and "| ours (2) |" in done.stdout
    assert min(job["machine"]["gflops"]["bfloat16"].values()) > 0


def test_profile(tmp_path: Path, alpaca: Path, tiny_base: Path) -> None:
    done = bench("profile", "--model", tiny_base, "--data-dir", alpaca, *quick(tmp_path, "ours"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"linears", "attention", "head and loss", "packing"} <= set(found["parts"])
    assert 0 < found["share"] < 1 and "of that ceiling" in done.stdout


def test_the_gpu_script_at_a_tiny_size(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    words = ["--shape", "tiny", "--rounds", 1, "--peers", "hf-sdpa-mb4"]
    done = bench("run", *words, *quick(tmp_path, "ours", "hf"))
    assert done.returncode == 0, done.stderr
    job = read(tmp_path)["shape-tiny"]
    assert {run["mode"]: (run["error"], run["unlike"]) for run in job["runs"]} == {
        "shape-ours": (None, None),
        "hf-sdpa-mb4": (None, None),
    }
    assert job["summary"]["hf-sdpa-mb4"]["ratios"]["examples_per_s"]


def test_what_is_missing_is_said(tmp_path: Path, tiny_base: Path) -> None:
    done = bench("run", "--jobs", "alpaca", "--model", tiny_base, *quick(tmp_path, "ours"))
    assert done.returncode == 1 and "TUNESMITH_BENCH_DATA" in read(tmp_path)["alpaca"]["error"]
    assert bench("run", "--jobs", "alpacca").returncode == 2
    assert bench("run", "--device", "cuda").returncode == 2
    plan = bench("run", "--dry-run", "--rounds", 5)
    assert plan.returncode == 0 and "5 rounds" in plan.stdout and "decode-llamacpp" in plan.stdout


def test_jobs_can_be_in_float32() -> None:
    plan = bench("run", "--dry-run", "--float32").stdout
    jobs = [line.split(":")[0] for line in plan.splitlines() if not line.startswith(" ")]
    assert jobs == ["alpaca-fp32", "alpaca-all-fp32", "reviews-fp32", "long-fp32", "decode"]
    assert "-amp" not in plan and "bf16" not in plan
    assert bench("run", "--float32", "--shape", "tiny").returncode == 2
