"""`tunesmith verify`: what was proved about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, out, out_json


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
