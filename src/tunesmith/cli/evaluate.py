"""`tunesmith evaluate`: how good a run, an adapter or a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, console, out, out_json
from tunesmith.errors import ConfigError


@command(app, "evaluate")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="What to measure.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK.KEY=VALUE]...",
            help="Settings of tasks, such as hellaswag.shots=5, and of rows: data.cutoff=512.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Rows to measure on; a run has its own.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", "--metric", help="Such as accuracy; may be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME=PATH", help="A published set and its file; may be repeated."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option("--harness", metavar="NAME", help="A task of lm-evaluation-harness; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "--rows", min=1, help="Use only the first rows, or items of each task.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model of an adapter.")] = None,
    use: Annotated[
        str | None, typer.Option("--use", help="base measures what an adapter was trained on, without it.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, valid or test, where the data has them.")] = "test",
    items: Annotated[
        Path | None, typer.Option("--items", metavar="FILE", help="Write a JSON line about every item of the tasks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    method_file: MethodFiles = None,
) -> None:
    """Measure a run, an adapter or a model: on rows with metrics, and on published sets.

    \b
    tunesmith evaluate runs/NAME --metrics accuracy,eval_loss
    tunesmith evaluate runs/NAME --task hellaswag=hellaswag_val.jsonl --task wikitext=wiki.test.raw hellaswag.shots=5
    tunesmith evaluate runs/NAME --harness arc_easy harness.shots=25 --limit 100
    """
    if items is not None and not task:
        raise ConfigError("--items: only tasks have items; give --task NAME=PATH")
    open_files(method_file)
    from tunesmith import api

    report = api.evaluate(
        target, data=data, metrics=split_words(metrics), base=base, split=split, rows=limit, tasks=task or [],
        settings=words or [], harness=split_words(harness), use=use, items=items, device=device, dtype=dtype,
        console=console(),
    )  # fmt: skip
    if json:
        out_json(report)
    else:
        show_report(report)


def split_words(words: list[str] | None) -> list[str]:
    """Return the names of options that may be repeated, or hold several after commas."""
    return [name.strip() for word in words or [] for name in word.split(",") if name.strip()]


def show_report(report: dict[str, Any]) -> None:
    """Print a report, a line a figure: its name, its value, its 95% interval, what it was measured on."""
    for key, value in report.items():
        if key not in ("tasks", "harness"):
            out(f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}")
    for part in ("tasks", "harness"):
        for name, found in report.get(part, {}).items():
            for figure, measured in found["figures"].items():
                out(f"{f'{name} {figure}':<40} {show_figure(measured)}")
            said = [f"{key} {show_value(value)}" for key, value in found["stated"].items() if value is not None]
            out(f"  {', '.join(said)}")


def show_value(value: Any) -> str:
    """Return what was stated of a measurement, in a few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def show_figure(figure: dict[str, Any]) -> str:
    """Return a figure as `0.5120  [0.4971, 0.5269]  of 4,300`."""
    interval = "" if figure["interval"] is None else "[{:.4f}, {:.4f}]".format(*figure["interval"])
    return f"{figure['value']:<10.4f} {interval:<24} of {figure['count']:,}"
