"""A module of this package in a fresh process, given a folder that holds its request."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_child(module: str, folder: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run `python -m module folder`; returns its exit code and the last line that it said on stderr.

    It imports the package from where this process has it, whatever the current folder holds.
    """
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-P", "-m", module, folder],
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    return child.returncode, (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
