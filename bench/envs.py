"""One environment for each side of a comparison, so that no peer is held to another's versions.

    bench/.envs/ours       this checkout, installed (again, whenever its source has changed)
    bench/.envs/{hf,trl,litgpt,llamacpp}       bench/requirements/NAME.txt, pinned

torch goes first and by itself, so that the build that pip's own configuration names is taken as it is. An environment
that cannot be made keeps its error in NAME.error; whoever needs it is then reported with that error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
ENVS = BENCH / ".envs"
TORCH = "torch==2.13.0"
NAMES = ("ours", "hf", "trl", "litgpt", "llamacpp")
WITHOUT_TORCH = {"llamacpp"}
SHOWN = ("tunesmith", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "litgpt", "xllamacpp")


class EnvError(Exception):
    """An environment is missing or could not be made; the text says why and what to do."""


class Envs:
    """The interpreters of the environments; `given` replaces some of them by interpreters that are there already."""

    def __init__(self, given: Mapping[str, str] | None = None, folder: Path = ENVS) -> None:
        self.given, self.folder = dict(given or {}), folder

    def python(self, name: str) -> str:
        """The interpreter of environment `name`. Raises EnvError where it is not there."""
        if name in self.given:
            return self.given[name]
        path = self.folder / name / "bin" / "python"
        if (self.folder / f"{name}.ready").is_file() and path.is_file():
            return str(path)
        error = self.folder / f"{name}.error"
        if error.is_file():
            raise EnvError(f"could not be installed: {error.read_text(encoding='utf-8').strip()}")
        raise EnvError(f"environment {name!r} is not there; make it with: python -m bench setup {name}")

    def versions(self, name: str) -> dict[str, str]:
        """Versions of the packages that matter in environment `name`; Python's too. Raises EnvError."""
        code = (
            "import json, platform; from importlib.metadata import distributions as d; "
            "print(json.dumps({'python': platform.python_version(), **{x.name.lower(): x.version for x in d()}}))"
        )
        try:
            done = subprocess.run([self.python(name), "-c", code], capture_output=True, text=True, check=False)
        except OSError as error:
            raise EnvError(f"environment {name!r} does not start: {error}") from None
        if done.returncode:
            raise EnvError(f"environment {name!r} does not start: {last_line(done.stderr)}")
        found = json.loads(done.stdout)
        return {key: found[key] for key in ("python", *SHOWN) if key in found}

    def source(self) -> str:
        """Tells one state of the checkout's source from another: of what is installed, or of the checkout itself."""
        return (_key("ours") if "ours" in self.given else _written(self.folder / "ours.ready"))[:12]

    def refresh_ours(self) -> None:
        """Install the checkout again if its source is not the one that was installed. Raises EnvError."""
        if "ours" not in self.given and _key("ours") != _written(self.folder / "ours.ready"):
            self.make("ours")

    def make(self, name: str) -> None:
        """Make environment `name`, or bring it up to date. Raises EnvError and keeps the error for later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ready, error = self.folder / f"{name}.ready", self.folder / f"{name}.error"
        if _written(ready) == _key(name):
            return
        ready.unlink(missing_ok=True)
        error.unlink(missing_ok=True)
        try:
            self._install(name)
        except EnvError as failure:
            error.write_text(f"{failure}\n", encoding="utf-8")
            raise
        ready.write_text(_key(name), encoding="utf-8")

    def _install(self, name: str) -> None:
        folder = self.folder / name
        python = str(folder / "bin" / "python")
        if not Path(python).is_file():
            _call([sys.executable, "-m", "venv", str(folder)])
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        if name not in WITHOUT_TORCH:
            _call([*pip, TORCH])
        if name != "ours":
            _call([*pip, "-r", str(BENCH / "requirements" / f"{name}.txt")])
            return
        with tempfile.TemporaryDirectory() as scratch:  # a build in the checkout itself would leave its traces there
            copy = Path(scratch) / "tunesmith"
            copy.mkdir()
            for file in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / file, copy)
            shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            _call([*pip, "-c", str(ROOT / "constraints.txt"), str(copy)])
            _call([*pip, "--no-deps", "--force-reinstall", str(copy)])


def setup(names: Iterable[str], folder: Path = ENVS) -> int:
    """Make the environments `names`; returns how many could not be made, each told with its error."""
    envs, failed = Envs(folder=folder), 0
    for name in names:
        print(f"{name}: making its environment", file=sys.stderr, flush=True)
        try:
            envs.make(name)
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in envs.versions(name).items()))
        except EnvError as error:
            failed += 1
            print(f"{name}: FAILED: {error}")
    return failed


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no output"


def _key(name: str) -> str:
    """Changes whenever the environment must be made anew."""
    files = [BENCH / "requirements" / f"{name}.txt"]
    if name == "ours":
        found = (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        sources = sorted(path for path in found if ".egg-info" not in str(path))
        files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", *sources]
    digest = hashlib.sha256(TORCH.encode())
    for file in files:
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _written(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise EnvError(errors[-1] if errors else last_line(done.stderr))
