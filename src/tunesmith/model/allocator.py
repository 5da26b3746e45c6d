"""Main memory of torch's CPU tensors from allocator.cpp: what was freed is used again, within what was ever needed.

use(True)       # once, before a model is loaded
counts()        # Counts(live=..., peak=..., held=..., mapped=...), bytes

Only on Linux, where a C++ compiler is; elsewhere malloc does it, and holds more than the tensors need.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.model.build import NO_COMPILER, build, compiler, reason

SOURCE = Path(__file__).with_name("allocator.cpp")
SLACK = 48 << 20  # bytes beyond the peak of live tensors that may be held, as in allocator.cpp


class Counts(NamedTuple):
    """Bytes of large tensors: live now, at the most since `release`, held from the system, mapped anew so far."""

    live: int
    peak: int
    held: int
    mapped: int


class _Process:
    """What this process has chosen; it cannot be taken back."""

    used = False


def use(wanted: bool = True) -> str | None:
    """Take large CPU tensors from here on; None where that is so, else a line that says why malloc is left to it."""
    if _Process.used:
        return None
    if not wanted:
        return "memory: malloc's, as configured"
    library, why = _library()
    if library is None:
        return f"memory: malloc's, which holds more than tensors need: {why}"
    library.use_blocks()
    _Process.used = True
    return None


def in_use() -> bool:
    """Do large CPU tensors come from here?"""
    return _Process.used


def can_be_used() -> bool:
    """Can this machine build it?"""
    return _library()[0] is not None


def release() -> None:
    """Give back what no tensor is in; the peak begins anew."""
    if _Process.used and (library := _library()[0]) is not None:
        library.release_blocks()


def counts() -> Counts | None:
    """What is counted; None where malloc does the work."""
    library = _library()[0] if _Process.used else None
    if library is None:
        return None
    values = (ctypes.c_int64 * 4)()
    library.count_blocks(values)
    return Counts(*values)


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    if sys.platform != "linux":
        return None, f"{sys.platform} is not supported"
    command = compiler()
    if command is None:
        return None, NO_COMPILER
    home = Path(torch.__file__).parent
    flags = (
        *("-O2", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}"),
        *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-DTUNESMITH_TORCH={_version()}"),
    )
    try:
        return ctypes.CDLL(str(build(command, [SOURCE], flags, (f"-L{home / 'lib'}", "-lc10")))), "built"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"it could not be built ({reason(error)})"


def _version() -> str:
    """Part of what a built file is known by: another torch has other headers."""
    return "".join(c if c.isalnum() else "_" for c in torch.__version__)
