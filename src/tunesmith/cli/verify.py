"""`tunesmith verify` and `evaluate`: what was proved about a run, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, console, out, out_json


@command(app, "verify")
def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or any PEFT adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; without it, the one the adapter names.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Prove that a saved adapter does what was trained: keys, base, template, logits. Exit code 4 if it does not."""
    open_files(method_file)
    from tunesmith import api

    report = api.verify_path(path, base=base)
    if json:
        out_json(report)
    else:
        show_checks(report)
    if not report["ok"]:
        raise typer.Exit(4)


def show_checks(report: dict[str, Any]) -> None:
    """Print a report's checks, a line each: whether it held, its name, what was seen."""
    for check in report["checks"]:
        out(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']:<28} {check.get('detail', '')}".rstrip())
    failed = sum(not check["ok"] for check in report["checks"])
    out(f"{failed} of {len(report['checks'])} checks failed" if failed else f"all {len(report['checks'])} checks hold")


@command(app, "evaluate")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to measure.")],
    data: Annotated[str | None, typer.Option("--data", "-d", help="Rows to measure on; a run has its own.")] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metrics", help="Such as accuracy; may be repeated.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model of an adapter.")] = None,
    split: Annotated[str, typer.Option("--split", help="train, valid or test, where the data has them.")] = "test",
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Use only the first rows.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Measure a run, an adapter or a model on data: eval_loss, accuracy and other metrics."""
    names = [name.strip() for word in metrics or [] for name in word.split(",") if name.strip()]
    open_files(method_file)
    from tunesmith import api

    report = api.evaluate(target, data=data, metrics=names, base=base, split=split, rows=rows, console=console())
    if json:
        out_json(report)
        return
    for key, value in report.items():
        out(f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}")
