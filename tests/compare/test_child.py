"""A cell's process: how each of its ends is told, and that none outlives us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tunesmith.cells import WARM_UP, _step_seconds, why
from tunesmith.compare import child
from tunesmith.errors import ConfigError, DiskError, Interrupted, NumericalError, OutOfMemory, VerificationError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stand-in; returns what failed.json says, or None."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "out" / "cells" / "a"

    def start(do: str, **more):
        child.run_in_child({"folder": str(folder), "key": "k", "do": do, **more}, program="tests.compare.stub")
        failed = folder / "failed.json"
        return json.loads(failed.read_text(encoding="utf-8")) if failed.is_file() else None

    return partial(start), folder


def test_a_result_is_left_alone_and_what_was_said_is_kept(run):
    start, folder = run
    assert start("result") is None
    assert (folder.parent.parent / "logs" / "a.log").read_text(encoding="utf-8") == "said on stderr\n"


@pytest.mark.parametrize(
    ("do", "kind", "line"),
    [
        ("kill", "killed", "most likely because memory ran out"),
        ("abort", "killed", "ended by SIGABRT; see logs/a.log"),
        ("nothing", "error", "ended with 0: said on stderr"),
    ],
)
def test_a_death_is_a_failure(run, do, kind, line):
    failed = run[0](do)
    assert failed["kind"] == kind and line in failed["error"] and failed["key"] == "k"


def test_no_room_on_the_disk_ends_all(run):
    with pytest.raises(DiskError, match="said on stderr"):
        run[0]("nothing", code=3)


def test_stopped(run):
    with pytest.raises(Interrupted, match="a was stopped; the same command goes on"):
        run[0]("nothing", code=130)


def test_ctrl_c_is_passed_on_and_waited_for(run):
    start, folder = run

    def press():
        while not (folder / "pid").is_file():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)  # to the process: its main thread waits for the child

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        start("wait")
    assert (folder / "stopped").is_file() and not (folder / "failed.json").exists()


def test_without_a_task_the_program_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith.cells"],
        input="",
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 2 and "no task on standard input" in done.stderr


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NumericalError("the loss is nan"), "diverged"),
        (OutOfMemory("8 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (VerificationError("keys"), "not verified"),
        (ConfigError("data.template"), "refused"),
        (ValueError("x\ny"), "error"),
    ],
)
def test_what_a_cell_died_of(error, kind):
    failure = why(error)
    assert failure.kind == kind and "\n" not in failure.error and failure.error


def test_step_seconds_leave_the_warm_up_out():
    times = [9.0, 9.0, 1.0, 3.0, 2.0]
    assert WARM_UP == 2
    lines = [{"num_tokens": 10 * (i + 1), "tokens_per_second": 10 / t} for i, t in enumerate(times)]
    assert _step_seconds(lines) == pytest.approx(2.0)
    assert _step_seconds(lines[:1]) == pytest.approx(9.0)
