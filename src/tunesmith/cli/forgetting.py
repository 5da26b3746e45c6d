"""`tunesmith forgetting`: what a run gained, and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.evaluate import split_words
from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, note, out, out_json

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@command(app, "forgetting")
def forgetting(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="What was trained.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK.KEY=VALUE]...",
            help="Settings of tasks, such as hellaswag.shots=5, and of rows: data.cutoff=512.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", "-g", metavar="NAME=PATH", help="A set that was not trained for; may be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME=PATH", help="A set that was; may be repeated."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Rows of the target; a run has its own.")] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metrics", help="Of the rows, such as accuracy.")] = None,
    split: Annotated[str, typer.Option("--split", help="train, valid or test, where the data has them.")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first rows and items.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; without it, the adapter's own.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Json = False,
    method_file: MethodFiles = None,
) -> None:
    """Measure a run with its adapter off and on: what it gained on its target, what it forgot of the rest.

    \b
    tunesmith forgetting runs/NAME --general hellaswag=hellaswag_val.jsonl --general wikitext=wiki.test.raw
    tunesmith forgetting runs/NAME -g arc_challenge=ARC.jsonl -t gsm8k=dev.jsonl gsm8k.template=true --metrics eval_loss
    """
    open_files(method_file)
    from tunesmith.forgetting import forgetting as measure

    report = measure(
        target, general=general or [], tasks=task or [], base=base, device=device, dtype=dtype, say=note, data=data,
        metrics=split_words(metrics), split=split, rows=limit, settings=words or [],
    )  # fmt: skip
    if json:
        out_json(report)
    else:
        show_forgetting(report)


def show_forgetting(report: Mapping[str, Any]) -> None:
    """Print what was gained and what was forgotten, a line a figure."""
    if "general" in report:
        found = report["general"]
        interval = "" if found["interval"] is None else "  [{:+.4f}, {:+.4f}]".format(*found["interval"])
        out(f"forgotten {found['forgotten']:+.4f}{interval}  mean accuracy of {', '.join(found['tasks'])}")
    out(f"{'':<40}{'before':>10}{'after':>10}{'change':>10}")
    for part in ("general_tasks", "general_text", "target"):
        for name, entry in report.get(part, {}).items():
            line(f"{name} {entry['figure']}", entry["before"], entry["after"], entry["interval"])
            for figure, sides in entry["figures"].items():
                line(f"  {figure}", sides["before"], sides["after"])
    for name, entry in report.get("rows", {}).get("metrics", {}).items():
        line(name, entry["before"], entry["after"])


def line(name: str, before: float, after: float, interval: list[float] | None = None) -> None:
    """Print a figure before and after, its change, and the change's interval where it has one."""
    ends = "" if interval is None else "  [{:+.4f}, {:+.4f}]".format(*interval)
    out(f"{name:<40}{before:>10.4f}{after:>10.4f}{after - before:>+10.4f}{ends}")
