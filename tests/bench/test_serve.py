"""The serving bench on a tiny random model: requests together and one at a time, and what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import write_base

ROOT = Path(__file__).resolve().parents[2]


def test_ours_is_measured_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    small = [
        "--rounds",
        1,
        "--repeats",
        1,
        "--requests",
        4,
        "--adapters",
        2,
        "--new-tokens",
        5,
        "--threads",
        1,
        "--parts",
        "together",
    ]
    words = ["--model", base, "--dtype", "float32", *small, "--work", tmp_path / "work", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.serve", *map(str, words), "--python", "hf=/nonexistent/python"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # transformers' side is not there
    found = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert found["together"].keys() == {"ours-batched", "ours-one-at-a-time"}, (found["absent"], done.stderr)
    assert "hf, together" in found["absent"]
    rounds = {mode: each["0"] for mode, each in found["together"].items()}
    assert len({each[0]["tokens"] for each in rounds.values()}) == 1, "the same tokens by all"
    assert all(len(each[0]["first_token_s"]) == 4 for each in rounds.values())
    page = (tmp_path / "out" / "serve.md").read_text()
    assert (
        "| `ours-one-at-a-time` |" in page
        and "not measured: `hf, together`" in page
        and "python -m bench.serve --model" in page
    )
    assert "A single stream" not in page and "parts are" in bad("--parts", "x") and "SIDE=PATH" in bad("--python", "x")


def bad(*words: str) -> str:
    """What the command says to wrong words, before it measures anything."""
    import contextlib
    import io

    from bench.serve import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(words) == 2
    return said.getvalue()
