"""One cell in a process of its own, so that its peak memory and its time are its own, and its end is not ours.

The child reads its task as a line of JSON from its standard input, which stays open: when the parent is gone, however
it ended, the input ends, and so does the child (tunesmith/cells.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from tunesmith.compare.record import FAILED, RESULT, Failure, write_failure
from tunesmith.errors import DiskError, Interrupted
from tunesmith.processes import start_python

PROGRAM = "tunesmith.cells"
LOGS = "logs"
DONE, DISK, STOPPED = 0, 3, 130


def run_in_child(task: dict[str, Any], *, program: str = PROGRAM) -> None:
    """Carry out a task in a new Python process; what it says goes to OUT/logs/NAME.log.

    A child that dies leaves a failure. Raises Interrupted when it was stopped, DiskError when it could not write.
    """
    folder = Path(task["folder"])
    log = folder.parent.parent / LOGS / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        child = start_python(
            program,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
        )
        code = _wait(child, json.dumps(task))
    if code in (STOPPED, -signal.SIGINT):
        raise Interrupted(f"{folder.name} was stopped; the same command goes on")
    if code == DISK:
        raise DiskError(f"{folder}: {_last_line(log)}")
    if not (folder / RESULT).is_file() and not (folder / FAILED).is_file():
        write_failure(folder, task["key"], _death(code, log))


def _wait(child: subprocess.Popen[bytes], line: str) -> int:
    """Give the child its task, wait for its end, and pass a Ctrl-C on; a second one kills it."""
    if child.stdin is None:
        raise OSError("the child has no standard input")
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended: its code and its log tell why
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
        raise
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        with contextlib.suppress(OSError):
            child.stdin.close()


def _death(code: int, log: Path) -> Failure:
    if code == -signal.SIGKILL:
        return Failure("killed", "the system ended it (SIGKILL), most likely because memory ran out")
    if code < 0:
        return Failure("killed", f"ended by {signal.Signals(-code).name}; see {LOGS}/{log.name}")
    return Failure("error", f"ended with {code}: {_last_line(log)}")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
