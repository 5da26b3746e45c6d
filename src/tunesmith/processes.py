"""This process, and those that run a module of this package."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def collect_seldom() -> None:
    """Look for garbage after 10,000 new objects, not 700: importing torch makes half a million, and no garbage."""
    gc.set_threshold(10_000)


def start_python(
    module: str, words: Sequence[str] = (), environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start `python -m module WORDS`, with more in its environment; `options` are those of subprocess.Popen.

    It imports the package from where this process has it, whatever the current folder holds.
    """
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, **(environment or {}), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-P", "-m", module, *words], env=env, **options)
