"""One command of `tunesmith` at a time, in a process of its own, started from the page's form.

form -> words (`key=value`, as on the command line) -> child process -> its lines, as they come
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from tunesmith.errors import RequestError
from tunesmith.processes import start_python

LINES = 400  # of what a command said
LONGEST_LINE = 2000
LOOK_EVERY = 0.2  # seconds
STOP_SECONDS = 60.0  # after which a command that was asked to stop is killed
RUNNING = "a command runs already: wait for its end, or stop it"


def words(form: Mapping[str, object], more: str) -> list[str]:
    """The settings of a form as words of the command line; empty fields are left out. Raises RequestError.

    `more`: settings as lines `key=value`; they replace the form's.
    """
    made = {key: str(value).strip() for key, value in form.items() if value is not None and str(value).strip()}
    for number, line in enumerate(more.splitlines(), 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            raise RequestError(f"more settings, line {number}: {line.strip()[:80]!r} is not key=value")
        made[key] = value
    return [f"{key}={value}" for key, value in made.items()]


class Jobs:
    """Runs one command at a time in `folder`, and keeps its last lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=LINES)
        self._child: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Does a command run?"""
        return self._child is not None and self._child.poll() is None

    def start(self, command: Sequence[str], settings: Sequence[str]) -> None:
        """Run `tunesmith COMMAND SETTINGS`. Raises RequestError while another runs."""
        with self._lock:
            if self.running or (self._reader is not None and self._reader.is_alive()):
                raise RequestError(RUNNING, 409, "busy")
            self._lines.clear()
            self._lines.append(f"$ tunesmith {' '.join([*command, *settings])}\n")
            self._child = start_python(
                "tunesmith",
                [*command, *settings],
                {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # a Ctrl-C at the server is passed on by `stop`, once
            )
            self._reader = threading.Thread(target=self._read, args=(self._child,), daemon=True)
            self._reader.start()

    def text(self) -> str:
        """What the command has said so far, its last lines."""
        return "".join(list(self._lines))

    def follow(self) -> Generator[str]:
        """What it says, each time that there is more, until it has ended. Closing the generator lets it run on."""
        before = None
        while True:
            ended = self._reader is None or not self._reader.is_alive()
            text = self.text()
            if text != before:
                before = text
                yield text
            if ended:
                return
            time.sleep(LOOK_EVERY)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask the command to stop, as Ctrl-C does: a training run saves a checkpoint first. Wait for its end."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.send_signal(signal.SIGINT)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _read(self, child: subprocess.Popen[str]) -> None:
        with child:
            while child.stdout is not None and (line := child.stdout.readline(LONGEST_LINE)):
                self._lines.append(line)
        code = child.wait()
        self._lines.append("done\n" if code == 0 else f"ended with exit status {code}\n")
