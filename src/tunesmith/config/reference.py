"""Write the configuration reference from the types: `python -m tunesmith.config.reference > docs/configuration.md`."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from tunesmith.config.aliases import (
    ACCUMULATION,
    ALIASES,
    EIGHT_BITS,
    FOUR_BIT_SETTINGS,
    FOUR_BITS,
    HINTS,
    NOTED,
    SHORTHANDS,
)
from tunesmith.config.attention import AttentionSettings
from tunesmith.config.sections import SECTIONS, Run

HEAD = """# Configuration

<!-- Generated from the types: python -m tunesmith.config.reference > docs/configuration.md -->

A run is described by a YAML file, by `key=value` words after it, and by a few flags of `tunesmith train`; each replaces
what comes before it: defaults < YAML < overrides < flags.

    tunesmith train config.yaml train.epochs=3 adapter.rank=16 --name second-try

Keys may be nested (`train:` with `epochs: 3` below it) or dotted (`train.epochs: 3`). `model: NAME`, `data: PATH` and
`adapter: KIND` on one line stand for {shorthands}. YAML is read by the rules of version 1.2:
`1e-4` is a number; `yes`, `no` and `on` are words, so a switch is written `true` or `false`. An unknown key, a value of
the wrong type or out of range, and a key given twice are errors that name the line. The resolved configuration is
written to `config.yaml` of the run folder; training from that file repeats the run.

An example:

    model: smollm2-135m-instruct
    data:
      train: movie-reviews
      limit: 1000
    adapter:
      kind: lora
      rank: 16
      target_modules: all-linear
    train:
      batch_size: 16
      learning_rate: 3e-4
    evaluate:
      metrics: [accuracy]
"""


def reference() -> str:
    """Return the whole of docs/configuration.md."""
    parts = [HEAD.format(shorthands=", ".join(f"`{'.'.join(path)}`" for path in SHORTHANDS.values()))]
    root = {name: field for name, field in _fields(Run).items() if name not in SECTIONS}
    for name, cls in SECTIONS.items():
        parts.append(f"## {name}\n\n{_first_line(cls)}\n\n{settings_table(cls, f'{name}.')}")
        if name == "model":
            parts.append(f"{_first_line(AttentionSettings)}\n\n{settings_table(AttentionSettings, 'model.attention.')}")
    parts.append(f"## The adapter and the run\n\n{_table(Run, root, '')}")
    parts.append(ADAPTER)
    parts.append(_aliases())
    return "\n".join(parts)


ADAPTER = """`adapter` is checked by the method that `adapter.kind` names, which refuses what it does not know.
[Methods](methods.md) lists every method's settings.
"""


def settings_table(cls: Any, prefix: str) -> str:
    """A Markdown table of a settings dataclass: key, type, default, description."""
    return _table(cls, _fields(cls), prefix)


def _aliases() -> str:
    rows = [f"| `{name}` | `{'.'.join(path)}` |" for name, path in ALIASES.items()]
    rows.append(f"| `{ACCUMULATION}` | `train.batch_size` = `train.micro_batch` * this, where it is not given |")
    rows.append(f"| `{NOTED}` | accepted; nothing to do, since nothing is padded |")
    rows.append(f"| `{FOUR_BITS}` | `quant.kind` = nf4, or what `bnb_4bit_quant_type` says |")
    rows.append(f"| `{EIGHT_BITS}` | `quant.kind` = llm-int8 |")
    rows += [f"| `{key}` | `{'.'.join(path)}`, beside `{FOUR_BITS}` |" for key, path in FOUR_BIT_SETTINGS.items()]
    hints = "\n".join(f"| `{name}` | {hint} |" for name, hint in HINTS.items())
    return (
        "## Well-known spellings\n\nAccepted at the top level of the YAML and as overrides. A spelling and the key it "
        "stands for, both in one place, are an error.\n\n| spelling | stands for |\n|---|---|\n"
        + "\n".join(rows)
        + "\n\nNot accepted, but answered with what to write instead:\n\n| spelling | answer |\n|---|---|\n"
        + hints
        + "\n"
    )


def _fields(cls: Any) -> dict[str, FieldInfo]:
    return dict(cls.__pydantic_fields__)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _table(cls: type, fields: dict[str, FieldInfo], prefix: str) -> str:
    hints = get_type_hints(cls, include_extras=True)
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        kind = "mapping" if name == "adapter" else _type(hints[name], field.metadata)
        lines.append(f"| `{prefix}{name}` | {kind} | {_default(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        empty = field.default_factory in (dict, tuple, list)
        return "none" if empty else "see right" if field.default_factory_takes_validated_data else "`{kind: lora}`"
    value = field.default
    if value is None or value is MISSING or value == ():
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(hint: Any, metadata: list[Any]) -> str:
    limits = _limits(metadata)
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        limits = limits or _limits([part for item in more for part in getattr(item, "metadata", [])])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0], [])}"
    if get_origin(hint) is Mapping:
        return "mapping of " + " to ".join(_type(part, []) for part in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        branches = [_type(branch, []) for branch in get_args(hint) if branch is not type(None)]
        return f"{' or '.join(branches)}{limits}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", AttentionSettings: "mapping"}
    return f"{names.get(hint, str(hint))}{limits}"


def _limits(metadata: list[Any]) -> str:
    signs = [(Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<=")]
    found = [
        f"{sign} {'2^63' if getattr(item, name) == 2**63 else getattr(item, name)}"
        for item in metadata
        if not isinstance(item, MinLen)
        for cls, name, sign in signs
        if isinstance(item, cls)
    ]
    return f" {', '.join(found)}" if found else ""


if __name__ == "__main__":
    sys.stdout.write(reference())
