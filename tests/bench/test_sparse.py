"""The page of sparse attention at a tiny size, as a user starts it, and what it says of made-up figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.sparse import FULL, crossovers

ROOT = Path(__file__).resolve().parents[2]


def bench(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"bench.{module}", "--threads", "1", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_lengths_are_measured_and_kept(tmp_path: Path) -> None:
    folders = ("--out", tmp_path, "--work", tmp_path / "work")
    few = ("--layers", 1, "--rounds", 1, "--repeats", 1, "--patterns", "full,s2", *folders)
    done = bench("sparse", "--lengths", 64, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sparse.json").read_text(encoding="utf-8"))
    full, s2 = (found["rows"][name]["64"] for name in ("full", "s2"))
    groups = [4 * 136, 3 * 136 + 2 * 36]  # of 16 tokens; shifted, the first and the last have 8
    assert full["pairs"] == 64 * 65 / 2 and s2["pairs"] == pytest.approx((2 * groups[0] + groups[1]) / 3)
    assert s2["attention"] == {"pattern": "s2", "group": 16} and s2["peak_bytes"] > 10**8
    assert min(full["step_s"], full["attention_s"], s2["step_s"], s2["attention_s"]) > 0
    text = (tmp_path / "sparse.md").read_text(encoding="utf-8")
    (tmp_path / "sparse.md").write_text(text.replace("Not written yet.", "It pays."), encoding="utf-8")
    again = bench("sparse", "--lengths", 64, *few)
    assert again.returncode == 0 and "round 1" not in again.stderr and "It pays." in again.stdout
    assert bench("sparse", "--patterns", "striped").returncode == 2


def test_the_crossover_is_where_it_stays_below() -> None:
    def entry(seconds: float) -> dict[str, float]:
        return {"attention_s": seconds, "step_s": 1.0, "peak_bytes": 10 - seconds}

    rows = {
        FULL: {"512": entry(1), "1024": entry(2), "2048": entry(4)},
        "a": {"512": entry(0.5), "1024": entry(3), "2048": entry(2)},
        "b": {"512": entry(0.5), "1024": entry(1), "2048": entry(1)},
    }
    found = crossovers(rows)
    assert found["a"] == {"attention_s": 2048, "step_s": None, "peak_bytes": None}
    assert found["b"]["attention_s"] == 512
