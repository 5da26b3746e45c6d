"""`tunesmith inspect` and `env`: look at files and at the machine, changing nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.shell import app, command, out, out_json

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@command(app, "inspect")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run folder, an adapter folder or a model folder.")],
    json: Json = False,
) -> None:
    """Say what a folder or file holds: method, settings, tensors, sizes. Reads headers only; loads no weights."""
    from tunesmith.export.inspect import inspect_path

    show(inspect_path(path), json)


@command(app, "env")
def env(json: Json = False) -> None:
    """Print what a bug report needs: versions, processor, memory, GPUs, folders."""
    from tunesmith.hardware import describe

    show(describe(), json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON, or as aligned lines with nested mappings and lists of mappings indented."""
    if as_json:
        out_json(report)
    else:
        _lines(report, 0)


def _lines(report: dict[str, Any], depth: int) -> None:
    for key, value in report.items():
        label = f"{'  ' * depth}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            out(label)
            _lines(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                out(label)
                _lines(item, depth + 1)
        else:
            words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            out(f"{label:<28} {'-' if words in (None, '') else words}")
