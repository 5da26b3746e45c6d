"""A module of this package in a fresh process, given a folder that holds its request.

with Child("tunesmith.export.replay") as child:    # it imports what it needs from here on
    ...                                            # meanwhile the request is written
    code, last = child.ask(folder)                 # it answers in the folder, and ends
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tunesmith.processes import collect_seldom, start_python


class Child:
    """The process; one that was never asked is ended with the block."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a process that imports `module` and will call its `main(folder)`, with more in its environment."""
        self._process = start_python(
            __name__,
            [module],
            environment,
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


def main(module: str) -> None:
    """The child: import what the answer needs, wait to be asked, answer; it ends here where nobody will ask."""
    collect_seldom()
    answer = importlib.import_module(module).main
    folder = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if not folder:
        raise SystemExit(1)
    answer(Path(folder))
    sys.stdout.flush()
    sys.stderr.flush()
    # The answer is on the disk, and half a second of taking everything down tells nobody anything; llama.cpp's server
    # now and then hangs in it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
