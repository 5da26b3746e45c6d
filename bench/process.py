"""One child process, watched from outside: when it said what, and what it cost by the operating system's own account.

A child tells of itself in lines of standard output that begin with MARK and hold a JSON object (children/common.py);
each carries `t`, seconds since the child was started. `tunesmith train` tells nothing: its metrics.jsonl and its
adapter folder are watched instead, so that the command that users run is what is measured.

Cost is what os.wait4 returns: user and system seconds, and the largest resident set that the child or a child of its
own ever had. Linux starts a child's maximum at its parent's size, so this module and all that import it stay small.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.envs import ROOT, last_line

MARK = "@bench "
POLL = 0.02  # seconds between two looks at a child; a look costs some microseconds
T0 = "TUNESMITH_BENCH_T0"


@dataclass
class Finished:
    """A child that has ended: exit code, seconds, peak bytes, what it told, and its error in one line if it failed."""

    code: int
    wall_s: float
    user_s: float
    system_s: float
    peak_bytes: int
    events: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    log: str = ""

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]


class TrainFolder:
    """Watches the folder of a `tunesmith train` run, and makes the events that a peer's child tells of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.read, self.tokens, self.saved = folder, 0, 0, False

    def look(self, t: float) -> list[dict[str, Any]]:
        """Events since the last look; `t` is now, in seconds since the run was started."""
        found: list[dict[str, Any]] = []
        metrics = self.folder / "metrics.jsonl"
        if metrics.is_file() and (size := metrics.stat().st_size) > self.read:
            with metrics.open("rb") as file:
                file.seek(self.read)
                lines = file.read(size - self.read)
            whole = lines[: lines.rfind(b"\n") + 1]
            self.read += len(whole)
            for line in whole.splitlines():
                found += self._step(json.loads(line), t)
        if not self.saved and (self.folder / "adapter" / "adapter_config.json").is_file():
            self.saved = True
            found.append({"event": "saved", "t": t})
        return found

    def _step(self, line: Mapping[str, Any], t: float) -> list[dict[str, Any]]:
        tokens, before = int(line["num_tokens"]), self.tokens
        self.tokens = tokens
        step = {"event": "step", "t": t, "tokens": tokens - before, "loss": line["loss"]}
        if before:
            return [step]
        return [{"event": "begin", "t": t - (tokens - before) / line["tokens_per_second"]}, step]


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    limit: float = 3600.0,
    watch: Callable[[float], list[dict[str, Any]]] | None = None,
) -> Finished:
    """Run `command` in the root of the checkout to its end, or to `limit` seconds; never raises for what it does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        surroundings = {**os.environ, **(env or {}), T0: repr(began), "PYTHONUNBUFFERED": "1"}
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=surroundings,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Finished(127, 0.0, 0.0, 0.0, 0, error=str(error))
        watched: list[dict[str, Any]] = []
        try:
            status, usage = _wait(child.pid, began, limit, watch, watched)
        except BaseException:  # Ctrl-C here must not leave a training run behind
            _end(child.pid)
            raise
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)  # tells Popen that there is nothing left to wait for
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    events = watched + [json.loads(s[len(MARK) :]) for s in texts[0].splitlines() if s.startswith(MARK)]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    done = Finished(child.returncode, wall, usage.ru_utime, usage.ru_stime, peak, events, log=texts[1][-4000:])
    if child.returncode:
        slow = f"stopped after {limit:.0f} s" if wall >= limit else f"exit code {child.returncode}"
        done.error = f"{slow}: {last_line(texts[1] or texts[0])}"
    return done


def _wait(
    pid: int,
    began: float,
    limit: float,
    watch: Callable[[float], list[dict[str, Any]]] | None,
    found: list[dict[str, Any]],
) -> tuple[int, Any]:
    """Wait for the end, looking at what is watched; whatever outstays `limit` is killed with its children."""
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        now = time.monotonic() - began
        if watch is not None:
            found += watch(now)
        if ended:
            return status, usage
        if now > limit:
            _end(pid)
            limit = float("inf")
        time.sleep(POLL)


def _end(pid: int) -> None:
    """Kill the child's own session: it, and what it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
