"""`tunesmith merge`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, out_report

Base = Annotated[str | None, typer.Option("--base", help="Base model; without it, the one the adapter names.")]
Onto = Annotated[
    str | None,
    typer.Option("--onto", metavar="MODEL|dequantized", help="Of a quantized base: the 16-bit model to fold into."),
]


@command(app, "merge")
def merge(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder or an adapter folder.")],
    destination: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the merged model to.")],
    base: Base = None,
    onto: Onto = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision written; auto is the base's own.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write a merge that lost much, or over a folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Fold an adapter into its base, and report how much of it survived rounding.

    \b
    tunesmith merge runs/NAME -o merged
    tunesmith merge runs/NAME -o merged --onto MODEL      # trained on a quantized copy of MODEL
    """
    open_files(method_file)
    from tunesmith import api

    report = api.merge(target, base=base, out=destination, onto=onto, dtype=dtype, force=force)
    out_report(report, destination, json)
