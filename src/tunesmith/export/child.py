"""A module of this package in a fresh process, given a folder that holds its request.

with Child("tunesmith.export.replay") as child:    # it imports what it needs from here on
    ...                                            # meanwhile the request is written
    code, last = child.ask(folder)                 # it answers in the folder, and ends
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tunesmith.processes import start_python


class Child:
    """The process; one that was never asked is ended with the block."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        """Start `python -m module`, with more in its environment."""
        self._process = start_python(
            module,
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def ask(self, folder: str) -> tuple[int, str]:
        """Let it answer what lies in `folder`: its exit code, and the last line that it said on stderr."""
        _, said = self._process.communicate(folder)
        return self._process.returncode, (said.strip().splitlines() or ["it said nothing"])[-1]

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def asked_folder() -> Path:
    """In the child: the folder that it is asked about; it ends here where nobody will ask."""
    folder = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if not folder:
        raise SystemExit(1)
    return Path(folder)
