"""Adaptation methods: one file each, found by listing this folder.

adapter = attach(model, {"kind": "lora", "rank": 8}, name="default", seed=0)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.adapters import outside
from tunesmith.adapters.base import Adapter, Delta, Method, Placement, Worded, install, uninstall
from tunesmith.config import validate_section
from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.model.llama import Llama

__all__ = ["Adapter", "Delta", "Method", "Placement", "attach", "detach", "find_method", "kinds", "open_method"]


@cache
def _methods() -> dict[str, Method]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if method is not None:
            found[method.kind] = method
    return found


@cache
def _called(kind: str) -> Method | None:
    """The method in the file of its name, where most are: one file to import instead of all."""
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    method = getattr(importlib.import_module(f"{__name__}.{kind}"), "METHOD", None) if kind in names else None
    return method if method is not None and method.kind == kind else None


def kinds() -> list[str]:
    """The names of all methods, those of opened files included."""
    return sorted({**_methods(), **outside.opened()})


def find_method(kind: str) -> Method:
    """The method called `kind`. Raises ConfigError with the nearest name, and for a file that nobody opened."""
    found = _called(kind) or _methods().get(kind) or outside.opened().get(kind)
    if found is None and outside.is_file(kind):
        found = outside.opened_at(kind)
        if found is None:
            raise ConfigError(
                f"adapter.kind: {kind[:120]!r} is a file, and a file that a run or an adapter names is never opened; "
                "if you trust it, name it yourself: --method-file FILE.py"
            )
    if found is None:
        raise ConfigError(
            f"adapter.kind: there is no method {kind!r}{did_you_mean(kind, kinds())}; there are {', '.join(kinds())}; "
            "one in a file of its own is given with --method-file FILE.py"
        )
    return found


def open_method(path: str | Path) -> Method:
    """Run a Python file that the user named and make its METHOD known by its kind. Raises ConfigError.

    A relative path counts from where the command is run. Never call it with what a run folder or an adapter says.
    """
    return outside.open_method(path, _methods())


def open_named(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Open the files that the settings under `adapter:`, as the user gave them, name as a `kind`.

    Returns the settings with the methods' own kinds: what is saved names no file. Raises ConfigError.
    """
    names = {kind: open_method(kind).kind for kind in outside.kinds_in(spec) if outside.is_file(kind)}
    return outside.with_names(spec, names) if names else spec


def attach(
    model: Llama,
    spec: Mapping[str, Any],
    name: str = "default",
    seed: int = 0,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> Adapter:
    """Attach the method `spec["kind"]` with its settings to `model`, under `name`; `seed` fixes its start.

    `encode` makes token ids of a text (`Tokenizer.encode`), for settings that hold one. Raises ConfigError for settings
    that the method does not know, AdapterError where they do not fit this model.
    """
    method = find_method(str(spec.get("kind", "lora")))
    settings: Any = validate_section(method.settings, spec, "adapter")
    if encode is not None and isinstance(method, Worded):
        settings = method.with_ids(settings, encode)
    return install(model, method, settings, name, seed)


def detach(model: Llama, adapter: Adapter) -> None:
    """Take `adapter` off `model`, which computes again as if it had never been there."""
    uninstall(model, adapter)
