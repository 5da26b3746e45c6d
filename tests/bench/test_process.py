"""A child's time, memory, words and failures, as the bench sees them from outside."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.envs import ROOT
from bench.process import Finished, TrainFolder, run

TELL = "import os, time, json; t = time.monotonic() - float(os.environ['TUNESMITH_BENCH_T0']);"


def test_events_and_cost_of_a_child() -> None:
    """Watched from a small process: Linux starts a child's peak at its parent's size, and pytest's is large."""
    work = f"{TELL} x = bytearray(200_000_000); x[::4096] = x[::4096]; "
    work += "print('@bench', json.dumps({'event': 'begin', 't': t})); print('noise')"
    watch = f"import sys; from bench.process import run; print(vars(run([sys.executable, '-c', {work!r}])))"
    output = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True, check=True)
    done = Finished(**ast.literal_eval(output.stdout))
    assert done.code == 0 and done.error is None
    assert [event["event"] for event in done.events] == ["begin"]
    assert 0 < done.told("begin")[0]["t"] < done.wall_s
    assert 200_000_000 < done.peak_bytes < 260_000_000 and done.user_s + done.system_s > 0


def test_a_failure_keeps_its_last_line() -> None:
    done = run([sys.executable, "-c", "raise ValueError('no such peer')"])
    assert done.code == 1 and done.error == "exit code 1: ValueError: no such peer"


def test_a_program_that_is_not_there() -> None:
    done = run(["/nonexistent/python"])
    assert done.code == 127 and done.error is not None and "nonexistent" in done.error


def test_a_child_that_outstays_its_limit_ends_with_its_own_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    grandchild = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    began = time.monotonic()
    done = run([sys.executable, "-c", code], limit=0.5)
    assert time.monotonic() - began < 2.5
    assert done.error is not None and done.error.startswith("stopped after")
    time.sleep(max(0.0, 3.5 - (time.monotonic() - began)))
    assert not mark.exists()


def test_steps_of_a_run_folder(tmp_path: Path) -> None:
    """Lines become steps with their own tokens; a torn line waits until it is whole."""
    folder = TrainFolder(tmp_path)
    assert folder.look(0.5) == []
    lines = [json.dumps({"step": n, "loss": 1.0, "num_tokens": 100 * n, "tokens_per_second": 50.0}) for n in (1, 2)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(lines[0] + "\n" + lines[1][:20])
    found = folder.look(10.0)
    assert [event["event"] for event in found] == ["begin", "step"]
    assert found[0]["t"] == pytest.approx(8.0)  # 100 tokens at 50 a second
    metrics.write_text("\n".join(lines) + "\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    found = folder.look(12.0)
    assert [(event["event"], event.get("tokens")) for event in found] == [("step", 100), ("saved", None)]
    assert folder.look(13.0) == []
