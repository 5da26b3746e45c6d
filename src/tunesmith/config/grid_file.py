"""A comparison, as grid.yaml says it: what all cells share, what differs, what each may use, what is measured.

base: {model: ..., data: ..., train: ...}      keys of a run's configuration (docs/configuration.md)
methods: [lora, {name: small, kind: lora, rank: 2, set: {train.weight_decay: 0.1}, axes: {dropout: [0, 0.1]}}]
axes: {train.batch_size: [8, 16]}              any key of a run
sizes: [500, 2000]                             data.limit
templates: [chat, alpaca]                      data.template
seeds: [0, 1, 2]                               train.seed
budget: {examples: 2000}                       one or more of examples, tokens, seconds, memory
search: {rates: 3}                             learning rates, a method, inside the budget
measure: {split: test, rows: 500, metrics: [accuracy]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tunesmith.config import source
from tunesmith.config.grid import Budget, GridSpec, Measure, MeasuredSet, MethodSpec, Search
from tunesmith.config.load import override_layer
from tunesmith.config.sections import STRICT
from tunesmith.config.source import Located, Origins
from tunesmith.config.validate import dotted, field_names, place, shown, validate_section
from tunesmith.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _Top:
    """The keys of grid.yaml itself; what is Any is read further down."""

    base: Any = Field(description="What all cells share: keys of a run's configuration.")
    methods: Any = Field(default=None, description="Adapters: a name, or a mapping with `kind` and its settings.")
    axes: Any = Field(default=None, description="Keys of a run, each with a list of values.")
    sizes: Any = Field(default=None, description="Values of data.limit.")
    templates: Any = Field(default=None, description="Values of data.template.")
    seeds: Any = Field(default=(0,), description="Values of train.seed.")
    budget: Any = Field(description="What each cell may use.")
    search: Any = Field(default=None, description="Search for learning rates.")
    measure: Any = Field(default=None, description="What is measured.")
    name: str | None = Field(default=None, min_length=1, description="Title of the report; none: the file's name.")
    folder: str = Field(default=".", min_length=1, description="Where data lie whose names begin with ./")
    baseline: bool = Field(default=True, description="Measure the untuned base too.")
    keep: Literal["adapter", "checkpoints", "measures"] = Field(
        default="adapter",
        description="What a finished cell's folder keeps: its adapter, its checkpoints too, or neither.",
    )


_SHORT = {"sizes": "data.limit", "templates": "data.template"}
_OF_METHOD = ("name", "set", "axes")  # keys of an entry of `methods` that are no settings of the adapter


def read_grid(path: Path, overrides: Sequence[str] = ()) -> GridSpec:
    """Read a grid.yaml. `overrides` are words such as `budget.examples=100` or `base.data.train=my.jsonl`.

    Raises ConfigError naming file and line.
    """
    given, base_overrides = _with_overrides(source.read(path), overrides)
    required = {"base": "what all cells share, such as base: {model: ..., data: ...}", "budget": "what each may use"}
    for key, what in required.items():
        if given.get(key) is None:
            raise ConfigError(f"{key}: missing in {path.name}; it says {what}")
    top = validate_section(_Top, given, "")
    base = _mapping(given, "base")
    methods = _methods(given, base)
    search = None if top.search is None else validate_section(Search, _mapping(given, "search"), "search")
    spec = GridSpec(
        name=top.name or path.stem,
        folder=Path(top.folder).expanduser(),
        base=base,
        overrides=base_overrides,
        methods=methods,
        axes=_axes(given),
        seeds=_seeds(given),
        budget=validate_section(Budget, _mapping(given, "budget"), "budget"),
        search=search,
        measure=_measure(given),
        baseline=top.baseline,
        keep=top.keep,
    )
    return replace(spec, measure=_placed(spec))


def _placed(spec: GridSpec) -> Measure:
    """What is measured, with its data where they are."""
    found = {
        key: tuple(replace(one, data=spec.placed(one.data)) for one in getattr(spec.measure, key))
        for key in ("sets", "forgetting")
    }
    return replace(spec.measure, sets=found["sets"], forgetting=found["forgetting"])


def _with_overrides(read: Located, words: Sequence[str]) -> tuple[Located, Located]:
    """The file's mapping with the words in it, and apart those that begin with `base.`."""
    layer = override_layer(words)
    values, origins = dict(read), dict(read.origins)
    base: dict[str, Any] = {}
    base_origins: Origins = {}
    for key, value in layer.items():
        head, _, rest = key.partition(".")
        if head == "base" and rest:
            base[rest], base_origins[(rest,)] = value, layer.origins[(key,)]
        elif not rest:
            values[head], origins[(head,)] = value, layer.origins[(key,)]
        else:
            inner = values.get(head)
            if inner is not None and not isinstance(inner, dict):
                raise ConfigError(
                    f"{key}: {head} holds no settings that could be replaced{place(origins.get((head,)))}"
                )
            values[head] = {**(inner or {}), rest: value}
            origins[(head, rest)] = layer.origins[(key,)]
    return Located(values, origins), Located(base, base_origins)


def _below(located: Located, *path: str) -> Origins:
    """The origins of what stands below `path`."""
    size = len(path)
    return {keys[size:]: where for keys, where in located.origins.items() if keys[:size] == path and len(keys) > size}


def _where(located: Located, *path: str) -> str | None:
    """Where `path` was written; for an entry of a list its first key, else the nearest key above."""
    origins = located.origins
    below = [where for keys, where in origins.items() if keys[: len(path)] == path]
    above = [origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins]
    return next(iter([*below[:1], *above]), None)


def _mapping(given: Located, key: str) -> Located:
    value = given.get(key)
    if value is None:
        return Located({})
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: should hold settings, not {shown(value)}{place(_where(given, key))}")
    return Located(value, _below(given, key))


def _values(given: Located, *path: str) -> list[Any]:
    """The list of an axis: not empty, no value twice."""
    found: Any = given
    for key in path:
        found = found[int(key)] if isinstance(found, list) else found[key]
    at = place(_where(given, *path))
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{dotted(*path)}: should be a list of values, such as [1, 2], not {shown(found)}{at}")
    for number, value in enumerate(found):
        if any(value == other and type(value) is type(other) for other in found[:number]):
            raise ConfigError(f"{dotted(*path)}: {shown(value)} is there twice{at}")
    return found


def _seeds(given: Located) -> tuple[int, ...]:
    if "seeds" not in given:
        return (0,)
    seeds = _values(given, "seeds")
    if any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
        raise ConfigError(
            f"seeds: should be whole numbers from 0 on, not {shown(seeds)}{place(_where(given, 'seeds'))}"
        )
    return tuple(seeds)


def _axes(given: Located) -> Located:
    """All axes but methods and seeds, by key of a run."""
    named = _mapping(given, "axes")
    values = {key: _values(given, "axes", key) for key in named}
    origins: Origins = {(key,): _where(given, "axes", key) or "" for key in named}
    for short, key in _SHORT.items():
        if given.get(short) is None:
            continue
        if key in values:
            raise ConfigError(f"{short}: is axes.{key}, which is given too{place(_where(given, short))}; keep one")
        values[key], origins[(key,)] = _values(given, short), _where(given, short) or ""
    if "train.seed" in values or "seed" in values:
        raise ConfigError(f"axes: write seeds: [0, 1], not an axis of seeds{place(_where(given, 'axes'))}")
    return Located(values, origins)


def _methods(given: Located, base: Located) -> tuple[MethodSpec, ...]:
    listed = given.get("methods")
    own = any(str(key).partition(".")[0] == "adapter" for key in base)
    if listed is None:
        spec = base.get("adapter", "lora")
        return (
            MethodSpec(str(spec.get("kind", "lora") if isinstance(spec, dict) else spec), Located({}), Located({})),
        )
    if own:
        raise ConfigError(
            f"base.adapter: methods say which adapters are compared{place(_where(given, 'base', 'adapter'))}"
        )
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"methods: should be a list of adapters, such as [lora, full]{place(_where(given, 'methods'))}"
        )
    found = tuple(_method(given, str(number), entry) for number, entry in enumerate(listed))
    names = [method.name for method in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            at = place(_where(given, "methods", str(number)))
            raise ConfigError(
                f"methods: two are called {name!r}{at}; give each a name of its own: {{name: ..., kind: ...}}"
            )
    return found


def _method(given: Located, number: str, entry: Any) -> MethodSpec:
    entry = {"kind": entry} if isinstance(entry, str) else entry
    at = place(_where(given, "methods", number))
    if not isinstance(entry, dict) or not isinstance(entry.get("kind", "lora"), str):
        raise ConfigError(f"methods: an entry is a method's name or a mapping with its kind, not {shown(entry)}{at}")
    kind = entry.get("kind", "lora")
    name = entry.get("name", Path(kind).stem)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"methods.{number}.name: should be a word, not {shown(name)}{at}")
    below = _below(given, "methods", number)
    for key in ("set", "axes"):
        if not isinstance(entry.get(key, {}), dict):
            raise ConfigError(f"methods.{number}.{key}: should hold settings, not {shown(entry[key])}{at}")
    settings = {"kind": kind, **{key: value for key, value in entry.items() if key not in (*_OF_METHOD, "kind")}}
    layer = {"adapter": settings, **entry.get("set", {})}
    origins: Origins = {("adapter", *keys): where for keys, where in below.items() if keys[0] not in _OF_METHOD}
    origins |= {keys[1:]: where for keys, where in below.items() if keys[0] == "set" and len(keys) > 1}
    axes = {
        key if "." in key else f"adapter.{key}": _values(given, "methods", number, "axes", key)
        for key in entry.get("axes", {})
    }
    lines: Origins = {
        (key if "." in key else f"adapter.{key}",): _where(given, "methods", number, "axes", key) or ""
        for key in entry.get("axes", {})
    }
    return MethodSpec(name, Located(layer, origins), Located(axes, lines))


def _measure(given: Located) -> Measure:
    """`measure:`: keys of one set of rows at the top, `tasks` and `forgetting` as lists of sets."""
    read = _mapping(given, "measure")
    own = {"samples", "tasks", "forgetting"}
    known = (*own, *field_names(MeasuredSet))
    for key in read:
        if key not in known or key in ("task", "settings"):
            hint = "; a task is an entry of tasks" if key in ("task", "settings") else did_you_mean(key, known)
            raise ConfigError(f"measure.{key}: unknown key{place(read.origins.get((key,)))}{hint}")
    samples = read.get("samples", 3)
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ConfigError(
            f"measure.samples: should be a whole number, not {shown(samples)}{place(_where(read, 'samples'))}"
        )
    rows = Located({key: value for key, value in read.items() if key not in own}, read.origins)
    sets = [validate_section(MeasuredSet, rows, "measure")] if rows else []
    sets += _sets(read, "tasks")
    if not sets:
        sets = [MeasuredSet(split="valid", metrics=("eval_loss",))]
    forgetting = _sets(read, "forgetting")
    names = [one.called for one in (*sets, *forgetting)]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(
                f"measure: two sets are called {name!r}{place(_where(read, 'forgetting'))}; give one a name"
            )
    return Measure(tuple(sets), tuple(forgetting), samples)


def _sets(read: Located, key: str) -> list[MeasuredSet]:
    """The sets of a list below `measure`; each has data of its own."""
    listed = read.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ConfigError(f"measure.{key}: should be a list of sets, such as [{{task: gsm8k, data: ...}}]")
    found = []
    for number, entry in enumerate(listed):
        where = f"measure.{key}.{number}"
        one = validate_section(MeasuredSet, Located(entry, _below(read, key, str(number))), where)
        if one.data is None:
            raise ConfigError(f"{where}.data: missing; say where its rows are{place(_where(read, key, str(number)))}")
        found.append(one)
    return found
