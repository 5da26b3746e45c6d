"""`tunesmith combine`: one adapter from several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.shell import app, command, out_report
from tunesmith.errors import ConfigError


@command(app, "combine")
def combine(
    parts: Annotated[
        list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="Adapter or run folders, each with its weight.")
    ],
    destination: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the adapter to.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; without it, the one the adapters name.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the weighted sum of adapters as one adapter, and check its logits; for LoRA and BitFit.

    \b
    tunesmith combine runs/formal=0.7 runs/short=0.3 -o both
    """
    weights = read_weights(parts)
    from tunesmith import api

    report = api.combine(weights, base=base, out=destination)
    out_report(report, destination, json)


def read_weights(words: list[str]) -> dict[str, float]:
    """Return the weight of each folder, from words FOLDER=WEIGHT. Raises ConfigError."""
    weights: dict[str, float] = {}
    for word in words:
        path, equals, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
            weight = 0.0
        if not equals or not path:
            raise ConfigError(f"{word}: write the adapter's folder and its weight as FOLDER=WEIGHT, such as runs/a=0.7")
        if path in weights:
            raise ConfigError(f"{word}: {path} is given twice; add its weights up")
        weights[path] = weight
    return weights
