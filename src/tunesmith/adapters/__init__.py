"""Adaptation methods: one file each, found by listing this folder.

adapter = attach(model, {"kind": "lora", "rank": 8}, name="default", seed=0)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tunesmith.adapters.base import Adapter, Delta, Method, Placement, Worded, install, uninstall
from tunesmith.config import validate_section
from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.model.llama import Llama

__all__ = ["Adapter", "Delta", "Method", "Placement", "attach", "detach", "find_method", "kinds"]


@cache
def _methods() -> dict[str, Method]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if method is not None:
            found[method.kind] = method
    return found


def kinds() -> list[str]:
    """The names of all methods."""
    return sorted(_methods())


def find_method(kind: str) -> Method:
    """The method called `kind`. Raises ConfigError with the nearest name."""
    if kind not in _methods():
        raise ConfigError(
            f"adapter.kind: there is no method {kind!r}{did_you_mean(kind, kinds())}; there are {', '.join(kinds())}"
        )
    return _methods()[kind]


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
