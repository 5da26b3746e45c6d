"""defaults < YAML < key=value overrides < flags -> one Run.

Each layer is spread into entries (canonical path, value, where it was written); later layers replace earlier ones; the
sections are then built from what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import aliases, source
from tunesmith.config.sections import SECTIONS, Run
from tunesmith.config.source import Located
from tunesmith.config.validate import dotted, field_names, place, shown, validate_section
from tunesmith.errors import ConfigError, did_you_mean

_ROOT = ("output_dir", "name")
_MISSING = {
    ("model", "path"): "missing; say which model to adapt: --model NAME, or model_name_or_path in the YAML",
    ("data", "train"): "missing; say what to train on: --data FILE, or data_path in the YAML",
}


@dataclass(frozen=True)
class _Entry:
    path: tuple[str, ...]
    spelled: str
    value: Any
    origin: str
    below: source.Origins  # where the keys inside `value` were written


def load_run(
    path: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> tuple[Run, list[str]]:
    """Return the resolved run, and one-line notes for the user.

    `path` is a YAML file or None, `overrides` are `key=value` words, `flags` maps dotted canonical keys to values (None
    is a flag that was not given). Raises ConfigError, one line naming key, place and cure.
    """
    layers = [source.read(path)] if path is not None else []
    return run_of([*layers, override_layer(overrides), _flag_layer(flags or {})])


def run_of(layers: Sequence[Located]) -> tuple[Run, list[str]]:
    """Return the run that layers of settings describe, a later one replacing earlier ones, and notes for the user.

    A layer's keys are those of a YAML file: sections, dotted keys, aliases. Raises ConfigError.
    """
    entries, special = _merge(layers)
    notes = _special(entries, special)
    for required, message in _MISSING.items():
        if required not in entries:
            raise ConfigError(f"{dotted(*required)}: {message}")
    sections: dict[str, Any] = {
        name: validate_section(cls, _section(entries, name), name) for name, cls in SECTIONS.items()
    }
    root = {name: entries[(name,)].value for name in _ROOT if (name,) in entries}
    origins: source.Origins = {(name,): entries[(name,)].origin for name in root}
    adapter = _section(entries, "adapter")
    run = validate_section(Run, Located({**sections, **root, "adapter": adapter}, origins), "")
    return run, notes


def override_layer(overrides: Sequence[str]) -> Located:
    """Words `key=value` as a layer; where a spelling comes twice, the last one counts, as in a shell script.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    origins: source.Origins = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: an override is written key=value, such as train.epochs=3")
        where = f"override {word if len(word) <= 60 else word[:57] + '...'}"
        values[key] = source.parse_value(text, where)
        origins[(key,)] = where
    return Located(values, origins)


def _flag_layer(flags: Mapping[str, Any]) -> Located:
    given = {key: value for key, value in flags.items() if value is not None}
    return Located(given, {(key,): "command line" for key in given})


def _merge(layers: Sequence[Located]) -> tuple[dict[tuple[str, ...], _Entry], dict[str, _Entry]]:
    """All layers' entries, later ones replacing earlier ones; and, apart, the spellings without a canonical key."""
    merged: dict[tuple[str, ...], _Entry] = {}
    special: dict[str, _Entry] = {}
    for layer in layers:
        here: dict[tuple[str, ...], _Entry] = {}
        for entry in _spread(layer):
            if entry.path == ():
                special[entry.spelled] = entry
                continue
            other = here.get(entry.path)
            if other is not None:
                one, two = f"{other.spelled!r} ({other.origin})", f"{entry.spelled!r} ({entry.origin})"
                raise ConfigError(f"{dotted(*entry.path)}: set twice, by {one} and by {two}; keep one")
            here[entry.path] = entry
        merged.update(here)
    return merged, special


def _spread(layer: Located) -> list[_Entry]:
    """The entries of one layer: nested sections, dotted keys, aliases and shorthands all alike."""
    entries = []
    for key, value in layer.items():
        origin = layer.origins.get((key,), "")
        below = {path[1:]: where for path, where in layer.origins.items() if path[0] == key and len(path) > 1}
        if key in aliases.ALIASES or aliases.is_special(key):
            convert = aliases.CONVERTERS.get(key)
            value = convert(value) if convert else value
            entries.append(_Entry(aliases.ALIASES.get(key, ()), key, value, origin, below))
        elif key in _ROOT:
            entries.append(_Entry((key,), key, value, origin, below))
        elif key in SECTIONS or key == "adapter":
            entries += _spread_section(key, value, origin, below)
        else:
            section, dot, name = key.partition(".")
            if not dot or not name or (section not in SECTIONS and section != "adapter"):
                raise ConfigError(_unknown(key, origin))
            _check_name(section, name, origin)
            entries.append(_Entry((section, name), key, value, origin, below))
    return entries


def _spread_section(section: str, value: Any, origin: str, below: source.Origins) -> list[_Entry]:
    if value is None:
        return []
    if isinstance(value, str) and section in aliases.SHORTHANDS:
        return [_Entry(aliases.SHORTHANDS[section], section, value, origin, {})]
    if not isinstance(value, dict):
        known = ", ".join(field_names(SECTIONS[section])[:3]) if section in SECTIONS else "kind"
        raise ConfigError(f"{section}: should hold settings ({known}, ...), not {shown(value)}{place(origin)}")
    entries = []
    for name, item in value.items():
        where = below.get((name,), origin)
        _check_name(section, name, where)
        inner = {path[1:]: line for path, line in below.items() if path[0] == name and len(path) > 1}
        entries.append(_Entry((section, name), f"{section}.{name}", item, where, inner))
    return entries


def _check_name(section: str, name: str, origin: str) -> None:
    """Refuse an unknown key of a section; the adapter's own file knows its keys."""
    if section == "adapter" or name in field_names(SECTIONS[section]):
        return
    hint = did_you_mean(name, field_names(SECTIONS[section]))
    if not hint and name in aliases.ALIASES:
        hint = f"; did you mean '{dotted(*aliases.ALIASES[name])}'?"
    raise ConfigError(f"{section}.{name}: unknown key{place(origin)}{hint or _elsewhere(name)}")


def _unknown(key: str, origin: str) -> str:
    section, _, _ = key.partition(".")
    hint = f"; {aliases.HINTS[key]}" if key in aliases.HINTS else _elsewhere(key)
    if not hint:
        names = [
            *SECTIONS,
            "adapter",
            *_ROOT,
            *aliases.ALIASES,
            aliases.ACCUMULATION,
            aliases.NOTED,
            *(aliases.EIGHT_BITS, aliases.FOUR_BITS, *aliases.FOUR_BIT_SETTINGS),
        ]
        names += [f"{name}.{field}" for name, cls in SECTIONS.items() for field in field_names(cls)]
        hint = did_you_mean(key, names) or did_you_mean(section, [*SECTIONS, "adapter"])
    return f"{key}: unknown key{place(origin)}{hint}"


def _elsewhere(name: str) -> str:
    """The dotted key, where `name` alone is the name of a key in one section."""
    found = [f"{section}.{name}" for section, cls in SECTIONS.items() if name in field_names(cls)]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _section(entries: Mapping[tuple[str, ...], _Entry], section: str) -> Located:
    values: dict[str, Any] = {}
    origins: source.Origins = {}
    for path, entry in entries.items():
        if path[0] == section and len(path) == 2:
            values[path[1]] = entry.value
            origins[path[1:]] = entry.origin
            origins.update({(path[1], *inner): where for inner, where in entry.below.items()})
    return Located(values, origins)


def _special(entries: dict[tuple[str, ...], _Entry], special: Mapping[str, _Entry]) -> list[str]:
    """Answer the spellings that stand for no single key; return notes."""
    notes = []
    noted = special.get(aliases.NOTED)
    if noted is not None and noted.value not in (False, None):
        notes.append(f"{aliases.NOTED}: nothing to do: examples lie end to end and nothing is padded")
    if aliases.ACCUMULATION in special:
        _accumulate(entries, special[aliases.ACCUMULATION])
    return notes + _quantized(entries, special)


def _quantized(entries: dict[tuple[str, ...], _Entry], special: Mapping[str, _Entry]) -> list[str]:
    """`load_in_4bit` and `load_in_8bit` as quant.kind, with what belongs to them; return notes."""
    asked = {}
    for key in (aliases.FOUR_BITS, aliases.EIGHT_BITS):
        entry = special.get(key)
        if entry is not None and entry.value not in (True, False, None):
            raise ConfigError(f"{key}: should be true or false, not {shown(entry.value)}{place(entry.origin)}")
        if entry is not None and entry.value:
            asked[key] = entry
    kind = ("quant", "kind")
    if len(asked) == 2 or (asked and kind in entries):
        both = " and ".join(f"{e.spelled} ({e.origin})" for e in (*asked.values(), entries.get(kind)) if e is not None)
        raise ConfigError(f"quant.kind: set twice, by {both}; keep one")
    settings = {key: special[key] for key in aliases.FOUR_BIT_SETTINGS if key in special}
    if aliases.FOUR_BITS not in asked and settings:
        return [f"{', '.join(settings)}: nothing to do: load_in_4bit is not true"]
    for key, entry in asked.items():
        value = "llm-int8" if key == aliases.EIGHT_BITS else "nf4"
        entries[kind] = _Entry(kind, entry.spelled, value, entry.origin, {})
    for key, entry in settings.items():
        path = aliases.FOUR_BIT_SETTINGS[key]
        entries[path] = _Entry(path, key, entry.value, entry.origin, {})
    return []


def _accumulate(entries: dict[tuple[str, ...], _Entry], steps: _Entry) -> None:
    """batch_size = micro_batch * gradient_accumulation_steps, completed from the two that are given."""
    batch, micro = entries.get(("train", "batch_size")), entries.get(("train", "micro_batch"))
    for entry in (steps, batch, micro):
        if entry is not None and (not isinstance(entry.value, int) or isinstance(entry.value, bool) or entry.value < 1):
            raise ConfigError(
                f"{entry.spelled}: should be a whole number from 1 on, not {shown(entry.value)}{place(entry.origin)}"
            )
    here = f"{steps.spelled} {steps.value} ({steps.origin})"
    if micro is None and batch is None:
        raise ConfigError(
            f"{here} needs micro_batch_size or batch_size beside it: batch_size = micro_batch_size * {steps.spelled}"
        )
    if micro is not None:
        product = micro.value * steps.value
        if batch is None:
            entries[("train", "batch_size")] = _Entry(("train", "batch_size"), steps.spelled, product, steps.origin, {})
        elif batch.value != product:
            both = (
                f"{batch.spelled} {batch.value} ({batch.origin}) is not {micro.spelled} {micro.value} ({micro.origin})"
            )
            raise ConfigError(f"{both} * {here} = {product}; leave one of the three out")
    elif batch is not None:
        if batch.value % steps.value:
            raise ConfigError(f"{batch.spelled} {batch.value} ({batch.origin}) cannot be divided into {here}")
        size = batch.value // steps.value
        entries[("train", "micro_batch")] = _Entry(("train", "micro_batch"), steps.spelled, size, steps.origin, {})
