"""`tunesmith predict`: label a large file of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, note, out_report


@command(app, "predict")
def predict(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What labels the texts.")],
    file: Annotated[
        Path, typer.Option("--file", "-f", help="Texts: .jsonl, .csv, .parquet, .json, or .txt with a text a line.")
    ],
    destination: Annotated[Path, typer.Option("--out", "-o", help="File of labels to write: .jsonl or .csv.")],
    labels: Annotated[
        str | None, typer.Option("--labels", help="Labels, such as spam,ham; a run knows its own.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="Put before each text; a run knows its own.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="Key of the rows that holds the text.")] = "text",
    base: Annotated[str | None, typer.Option("--base", help="Base model of an adapter.")] = None,
    cutoff: Annotated[
        int | None, typer.Option("--cutoff", min=8, help="Longest text in tokens, prompt included; else the context.")
    ] = None,
    min_probability: Annotated[
        float, typer.Option("--min-probability", help="Leave out rows whose label is less probable.")
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Write a label and its probability for every text of a file; killed and started again, it goes on.

    \b
    tunesmith predict runs/NAME --file texts.jsonl --out labels.jsonl
    """
    open_files(method_file)
    names = [name.strip() for name in (labels or "").split(",") if name.strip()]
    from tunesmith.predict import predict as carry_out

    report = carry_out(
        target, file, destination, names=names, instruction=instruction, column=column, base=base, cutoff=cutoff,
        min_probability=min_probability, note=note,
    )  # fmt: skip
    out_report(report, destination, json)
