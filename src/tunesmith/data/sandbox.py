"""Runs chat templates in a confined process of their own (sandbox_worker.py): 1 s of CPU and 64 MiB a request.

One such process serves all rows of a run: starting it takes about a tenth of a second, a rendering some fifty
microseconds.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import TemplateError

WALL_SECONDS = 5.0  # the kernel's clock gives 1 s of CPU; this one only ends a worker that does not run at all
MAX_SOURCE = 1 << 20  # characters
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Program:
    """A chat template's text, with the variables that every rendering gets (bos_token, eos_token)."""

    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    id: int = field(default_factory=lambda: next(_ids))

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(self.source)} characters; the limit is {MAX_SOURCE}")


class Sandbox:
    """The confined process and the line to it; safe to call from several threads, one rendering at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._loaded: set[int] = set()

    def check(self, program: Program) -> None:
        """Compile `program`; raise TemplateError naming the line of a syntax error."""
        with self._lock:
            self._load(program)

    def render(
        self,
        program: Program,
        jobs: Sequence[Mapping[str, Any]],
        *,
        markers: tuple[str, str] = ("", ""),
        now: str | None = None,
    ) -> list[str]:
        """Render `program` once for each mapping of variables in `jobs`; all of them together get 1 s and 64 MiB.

        `markers` are put around what {% generation %} blocks produce; `now` (ISO 8601) is what strftime_now sees.
        Raises TemplateError when the template fails or goes over a limit.
        """
        with self._lock:
            self._load(program)
            filled = [{**program.variables, **job} for job in jobs]
            return self._ask({"id": program.id, "jobs": filled, "markers": markers, "now": now})

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        process, self._process = self._process, None
        self._loaded.clear()
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close_quietly(pipe)

    def _load(self, program: Program) -> None:
        self._running()
        if program.id not in self._loaded:
            self._ask({"load": program.id, "source": program.source})
            self._loaded.add(program.id)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # after a fork, the line belongs to the parent
            self._process, self._owner = None, os.getpid()
            self._loaded.clear()
        if self._process is None or self._process.poll() is not None:
            self._loaded.clear()
            self._process = _start()
        return self._process

    def _ask(self, request: Mapping[str, Any]) -> list[str]:
        process = self._running()
        if process.stdin is None or process.stdout is None:
            raise TemplateError("the template process has no pipes; this is a defect, please report it")
        try:
            process.stdin.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, time.monotonic() + WALL_SECONDS)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise TemplateError(self._epitaph(process))
        reply = json.loads(line)
        if "ok" in reply:
            return list(reply["ok"])
        if reply["error"] == "memory":
            self.close()
        reasons = {
            "memory": "it needed more than 64 MiB of memory, so it was stopped",
            "recursion": "it nests or calls itself too deeply, so it was stopped",
        }
        reason = reasons.get(reply["error"], _one_line(reply["message"]))
        raise TemplateError(f"chat template: {reason}; correct it, or choose another with data.template")

    def _epitaph(self, process: subprocess.Popen[bytes]) -> str:
        """Say why the process ended, and clear it away."""
        try:
            code: int | None = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        slow = code is None or code == -getattr(signal, "SIGPROF", 0)
        reason = "took more than 1 s, so it was stopped" if slow else f"crashed its process (exit status {code})"
        return f"chat template: it {reason}; correct it, or choose another with data.template"


def _start() -> subprocess.Popen[bytes]:
    """Start the worker, isolated from this process's environment: nothing secret is inherited."""
    import jinja2

    worker = Path(__file__).with_name("sandbox_worker.py")
    # jinja2 may have come by PYTHONPATH, which -I ignores; its folder is searched last
    folder = str(Path(jinja2.__file__).parents[1])
    code = f"import sys, runpy; sys.path.append({folder!r}); runpy.run_path({str(worker)!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=clean_environment(),
    )


def clean_environment() -> dict[str, str]:
    """What a confined process is told of this one's environment: enough to start, and nothing secret."""
    kept = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")
    return {key: os.environ[key] for key in kept if key in os.environ}


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Read one line; what has come by the deadline or by the process's end is returned without a newline."""
    pipe = process.stdout
    if pipe is None:
        return b""
    if os.name != "posix":  # pipes cannot be polled there: a timer ends the process instead
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
        timer.start()
        line = pipe.readline()
        timer.cancel()
        return line
    chunks: list[bytes] = []
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while not chunks or not chunks[-1].endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            process.kill()
            break
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks)


def _close_quietly(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:
        pass


def _one_line(message: str) -> str:
    return " ".join(str(message).split())[:300]


SHARED = Sandbox()
atexit.register(SHARED.close)
