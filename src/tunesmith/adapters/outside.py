"""Methods in files outside of the package, such as one of your own: `adapter: {kind: path/to/gain.py}`.

Such a file is Python, so it is run only where the user names it: in the YAML given to a command, on the command line
(`adapter.kind=gain.py`, `--method-file gain.py`), or by calling `open_method`. What is saved names the method by its
`kind`, never by a file; and a file that a run folder or an adapter names is not opened, whatever it says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.adapters.base import Method
from tunesmith.errors import ConfigError, did_you_mean

_NEEDED = ("kind", "settings", "learning_rate")
_CALLED = ("identity_at_init", "mergeable", "place", "unfreeze", "lr_scale")
_opened: dict[Path, Method] = {}


def is_file(kind: str) -> bool:
    """Does this `kind` name a file?"""
    return kind.endswith(".py")


def opened() -> dict[str, Method]:
    """The methods of the files that were opened, by kind."""
    return {method.kind: method for method in _opened.values()}


def opened_at(kind: str) -> Method | None:
    """The method of the file `kind`, if the user had it opened."""
    return _opened.get(Path(kind).expanduser().resolve())


def opened_files() -> tuple[Path, ...]:
    """The files that were opened, so that a process of ours can be handed them."""
    return tuple(_opened)


def open_method(path: str | Path, taken: Mapping[str, Method]) -> Method:
    """Run the Python file `path` (relative to where the command is run) and return its METHOD.

    The caller vouches that the user named it. `taken` are the methods that are there: their kinds cannot be used again.
    Raises ConfigError for a file that is not there, fails, or holds no method.
    """
    file = Path(path).expanduser().resolve()
    if file in _opened:
        return _opened[file]
    if not file.is_file():
        beside = [other.name for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file, looked for at {file}{did_you_mean(file.name, beside)}")
    method = _method_in(_run(file), file)
    if method.kind in taken or method.kind in opened():
        raise ConfigError(f"{file}: its METHOD.kind {method.kind!r} is the name of another method; choose another")
    _opened[file] = method
    return method


def kinds_in(spec: Mapping[str, Any]) -> Iterator[str]:
    """Every kind that the settings under `adapter:` name, those of a mixed method's parts among them."""
    yield str(spec.get("kind", ""))
    parts = spec.get("parts")
    for part in parts if isinstance(parts, list | tuple) else ():
        if isinstance(part, Mapping):
            yield from kinds_in(part)


def with_names(spec: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same settings with files replaced by the kinds of their methods."""
    changed = dict(spec)
    if str(spec.get("kind", "")) in names:
        changed["kind"] = names[str(spec["kind"])]
    if isinstance(spec.get("parts"), list | tuple):
        changed["parts"] = [with_names(part, names) if isinstance(part, Mapping) else part for part in spec["parts"]]
    return changed


def _run(file: Path) -> ModuleType:
    name = f"tunesmith_method_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names in their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file}: cannot be run: {type(error).__name__}: {line}") from error
    return module


def _method_in(module: ModuleType, file: Path) -> Method:
    method: Any = getattr(module, "METHOD", None)
    if method is None:
        raise ConfigError(f"{file}: sets no METHOD, so it holds no method; see docs/adding-a-method.md")
    missing = [name for name in _NEEDED if not hasattr(method, name)]
    missing += [f"{name}()" for name in _CALLED if not callable(getattr(method, name, None))]
    if missing:
        raise ConfigError(f"{file}: METHOD has no {', '.join(missing)}; see docs/adding-a-method.md")
    if not isinstance(method.kind, str) or not method.kind.isidentifier():
        raise ConfigError(f"{file}: METHOD.kind {str(method.kind)[:40]!r} should be a name of letters, digits and _")
    found: Method = method
    return found
