"""Which modules a method acts on: by list of names, by regular expression, or all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, TypeVar

from pydantic import BeforeValidator
from torch import nn

from tunesmith.errors import AdapterError, did_you_mean
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama

EMBEDDING = "model.embed_tokens"
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
# Numbers of decoder layers, as a setting: YAML and JSON know lists only.
Layers = Annotated[tuple[int, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


def select_linears(
    model: Llama, target: str | Sequence[str], layers: Sequence[int] | None = None, where: str = "adapter"
) -> Iterator[tuple[str, Linear]]:
    """Yield (path, Linear) for `target`, with PEFT's meaning of it.

    A list names modules by the end of their path; a string is a regular expression that matches a whole path, or
    "all-linear": every Linear but lm_head. `layers` keeps those decoder layers only. Raises AdapterError where an entry
    matches nothing.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    return _select(model, linears, target, layers, where)


def select_targets(
    model: Llama, target: str | Sequence[str], layers: Sequence[int] | None = None, where: str = "adapter"
) -> Iterator[tuple[str, Linear | nn.Embedding]]:
    """As `select_linears`, and the token embedding where `target` names it (all-linear does not)."""
    modules: dict[str, Linear | nn.Embedding] = {EMBEDDING: model.model.embed_tokens}
    modules |= {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
    return _select(model, modules, target, layers, where)


def _select(
    model: Llama, modules: Mapping[str, M], target: str | Sequence[str], layers: Sequence[int] | None, where: str
) -> Iterator[tuple[str, M]]:
    if target == "all-linear":
        wanted = {path for path in modules if path not in ("lm_head", EMBEDDING)}
    else:
        wanted = matching(target, list(modules), where)
    if layers is not None:
        check_layers(model, layers, where)
        wanted = {path for path in wanted if layer_of(path) in layers}
    if not wanted:
        raise AdapterError(f"{where}: target_modules and layers_to_transform together select no module")
    yield from ((path, module) for path, module in modules.items() if path in wanted)


def matching(
    target: str | Sequence[str],
    paths: Sequence[str],
    where: str = "adapter",
    key: str = "target_modules",
    among: str = "this model has",
) -> set[str]:
    """Those of `paths` that `target` means: ends of paths, or one regular expression that matches a whole path.

    Raises AdapterError where an entry matches nothing; `key` and `among` are words of its message.
    """
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    known = f"{among} {', '.join(names)}"
    if isinstance(target, str):
        try:
            chosen = {path for path in paths if re.fullmatch(target, path)}
        except re.error as error:
            raise AdapterError(f"{where}.{key}: {target!r} is no regular expression: {error}") from None
        if not chosen:
            raise AdapterError(f"{where}.{key}: {target!r} matches no module; {known}")
        return chosen
    chosen = set()
    for entry in target:
        found = {path for path in paths if path == entry or path.endswith(f".{entry}")}
        if not found:
            raise AdapterError(f"{where}.{key}: {entry!r} names no module{did_you_mean(entry, names)}; {known}")
        chosen |= found
    return chosen


def layer_of(path: str) -> int | None:
    """The decoder layer that a module path lies in, or None."""
    found = re.match(r"model\.layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches the end of `path` (PEFT's rank_pattern and alpha_pattern)."""
    return next((value for key, value in patterns.items() if _ending(key).match(path)), default)


def check_patterns(patterns: Mapping[str, object], paths: Sequence[str], where: str) -> None:
    """Raise AdapterError for a pattern that matches none of the adapted modules."""
    for key in patterns:
        try:
            matched = any(_ending(key).match(path) for path in paths)
        except re.error as error:
            raise AdapterError(f"{where}: {key!r} is no regular expression: {error}") from None
        if not matched:
            raise AdapterError(f"{where}: {key!r} matches none of the adapted modules, so it would do nothing")


@lru_cache(maxsize=4096)  # a file may give every module a pattern of its own: re's own cache holds 512
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def check_layers(model: Llama, layers: Sequence[int], where: str) -> None:
    """Raise AdapterError for a layer that this model has not."""
    count = model.config.num_hidden_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise AdapterError(f"{where}.layers_to_transform: no layer {layer}; this model has layers 0 to {count - 1}")
