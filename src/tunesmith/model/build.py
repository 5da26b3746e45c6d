"""Builds the C++ beside the model with the machine's own compiler, once, into the cache folder.

The name of what is built tells sources, flags, compiler and processor apart, so that none is ever used for another.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunesmith.hardware import cache_dir, cpu_features

BUILD_SECONDS = 120
NO_COMPILER = "no C++ compiler was found (install g++ or clang++)"


def compiler() -> str | None:
    """The path of this machine's C++ compiler, if there is one."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def build(command: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """The shared library of `sources` (headers among them), built by the compiler `command` if it is not there yet.

    Raises OSError, SubprocessError (see `reason`).
    """
    texts = [path.read_bytes() for path in sources]
    version = subprocess.run([command, "-dumpfullversion"], capture_output=True, timeout=10, check=True).stdout
    about = " ".join([*flags, *libraries, *sorted(cpu_features()), command]).encode()
    name = hashlib.sha256(b"\0".join([*texts, version, about])).hexdigest()[:16]
    folder = cache_dir() / "kernels"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            objects = {path: f"{scratch}/{path.stem}.o" for path in sources if path.suffix == ".cpp"}
            with ThreadPoolExecutor(len(objects)) as pool:
                list(pool.map(lambda path: _run(command, *flags, "-c", str(path), "-o", objects[path]), objects))
            _run(command, *flags, *objects.values(), *libraries, "-o", str(made))
            made.replace(library)  # in one step: another process may be building the same
    return library


def _run(*words: str) -> None:
    subprocess.run(words, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True)


def reason(error: Exception) -> str:
    """Why a build failed, in a line."""
    return str(getattr(error, "stderr", None) or error).strip().splitlines()[-1][:120]
