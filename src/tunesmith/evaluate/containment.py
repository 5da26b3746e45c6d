"""Run a program that a model wrote, in a process that can compute and read and nothing else (program_worker.py).

    source -> fresh folder -> a process of its own, confined before the first line runs -> passed, failed or timed out

What holds on this machine is part of the result. A program that means to can claim to have passed; it cannot do harm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tunesmith.data.sandbox import clean_environment
from tunesmith.errors import ResourceError

WORKER = Path(__file__).with_name("program_worker.py")
GRACE = 10.0  # seconds of the wall clock beyond those of CPU, for a machine that is busy with other things
MAX_SOURCE = 1 << 20  # characters
FILTER = "seccomp filter"  # as program_worker.py says it


@dataclass(frozen=True)
class Limits:
    """What a program may use: `seconds` of CPU, `memory` in MiB of address space (Python itself needs about 30)."""

    seconds: int = 3
    memory: int = 1024


@dataclass(frozen=True)
class Ending:
    """How a program ended. `held`: what confined it, by name; the first is "seccomp filter" or "audit hook"."""

    how: Literal["passed", "failed", "timed out"]
    detail: str
    held: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Did the program come to its end without an exception?"""
        return self.how == "passed"

    @property
    def by_kernel(self) -> bool:
        """Did the kernel keep the program from processes, network and files, or Python's audit hook alone?"""
        return FILTER in self.held


def run_programs(sources: Sequence[str], limits: Limits = Limits(), *, at_once: int | None = None) -> list[Ending]:
    """Run each program, `at_once` of them side by side (none: as many as there are cores). See `run_program`."""
    with ThreadPoolExecutor(at_once or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: run_program(source, limits), sources))


def run_program(source: str, limits: Limits = Limits(), *, kernel: bool = True) -> Ending:
    """Run a Python program to its end, or to its limits. `kernel=False` leaves out what only Linux has.

    Raises ResourceError where a confined process cannot be had.
    """
    if os.name != "posix":
        raise ResourceError("generated programs: this system cannot limit a process; run them on Linux or macOS")
    if len(source) > MAX_SOURCE:
        return Ending("failed", f"the program has {len(source)} characters; the limit is {MAX_SOURCE}", ())
    with tempfile.TemporaryDirectory(prefix="tunesmith-program-") as folder, tempfile.TemporaryFile() as report:
        file = Path(folder) / "program.py"
        file.write_text(source, encoding="utf-8", errors="backslashreplace")
        mode = "kernel" if kernel else "hook"
        words = [str(limits.seconds), str(limits.memory << 20), mode, str(file)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(WORKER), *words],
            stdin=subprocess.DEVNULL,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**clean_environment(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        code = _end_of(process, limits.seconds + GRACE)
        return _ending(report, code, limits)


def _end_of(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None where the clock ran out. Nothing of the process's session is left after this."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS says the second for one that has ended
            pass
        process.wait()


def _ending(report: IO[bytes], code: int | None, limits: Limits) -> Ending:
    """Read what the worker said; a program may have written into it, so nothing in it is trusted to be well formed."""
    report.seek(0)
    said = [_object(line) for line in report.read().splitlines()]
    held = said[0].get("held") if said else None
    if not isinstance(held, list):
        raise ResourceError(
            f"generated programs: the process for them did not start (exit status {code}); it needs {sys.executable} "
            f"and more than {limits.memory} MiB may be missing: raise the memory limit"
        )
    names = tuple(map(str, held))
    late = code is None or code in (-signal.SIGXCPU, -signal.SIGKILL)
    if late:
        return Ending("timed out", f"it was stopped after {limits.seconds} s", names)
    if len(said) == 2 and isinstance(said[1].get("passed"), bool):
        return Ending("passed" if said[1]["passed"] else "failed", str(said[1].get("detail", "")), names)
    return Ending("failed", f"it ended without a verdict (exit status {code})", names)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
