"""`tunesmith compare`: methods side by side at an equal budget, and a report of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, console, note, out, out_json
from tunesmith.errors import CheckFailed, ConfigError

if TYPE_CHECKING:
    from tunesmith.compare.grid import Grid
    from tunesmith.compare.table import Table


@command(app, "compare")
def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="GRID.YAML [KEY=VALUE ...]",
            help="The grid, and settings that replace its own: base.data.train=FILE.",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of cells and report; without it, runs/compare-GRID.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List the cells and what each may use; run nothing.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Make the report of what is there.")] = False,
    again: Annotated[bool, typer.Option("--retry", help="Try cells that failed once more.")] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No process for each cell: quicker, but memory is then everybody's.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Train and measure every cell of a grid at an equal budget, and write a report.

    What is finished is not repeated: the same command goes on where it was stopped.

    \b
    tunesmith compare examples/grids/quick.yaml
    tunesmith compare examples/grids/quick.yaml budget.examples=256 seeds=[0,1] --out runs/longer
    """
    open_files(method_file)
    path, overrides = _split(words or [])
    grid, methods = _read(path, overrides)
    target = folder or Path("runs") / f"compare-{path.stem}"
    if plan:
        _show_plan(grid, target, json)
        return
    table = _carry_out(grid, target, methods, None if report_only else _way(in_process), again)
    for lost in table.lost:
        note(f"{lost.kind}: {lost.cell.slug}: {lost.why}")
    if json:
        out_json({"report": str(target / "report.html"), "lines": _lines(table)})
    else:
        out(str(target / "report.html"))
    if not table.lines and not report_only:
        raise CheckFailed(f"compare: none of {len(grid.cells)} cells finished; {table.lost[0].why}")


def _carry_out(grid: Grid, target: Path, methods: tuple[str, ...], way: Any, again: bool) -> Table:
    """Run what is left of the grid (nothing without a `way`) and write the report."""
    from tunesmith.adapters.outside import opened_files
    from tunesmith.compare.conduct import Conductor, alone
    from tunesmith.compare.inputs import input_hashes
    from tunesmith.compare.publish import publish

    inputs = input_hashes(grid, opened_files())
    report = partial(publish, grid, target, inputs)
    with alone(target):
        if way is not None:
            Conductor(grid, target, inputs, way, say=note, changed=report, again=again, methods=methods).run()
        return report()


def _split(words: list[str]) -> tuple[Path, list[str]]:
    """The grid's file, and the overrides. Raises ConfigError."""
    from tunesmith.cli.train import split_words

    path, overrides = split_words(words)
    if path is None:
        raise ConfigError("compare: give the file of a grid, such as examples/grids/quick.yaml")
    return path, overrides


def _read(path: Path, overrides: list[str]) -> tuple[Grid, tuple[str, ...]]:
    """The grid, and the files of methods that a cell's process is handed: those that the user's grid names."""
    from tunesmith.adapters import open_named
    from tunesmith.adapters.outside import is_file, kinds_in, opened_files
    from tunesmith.compare.grid import expand
    from tunesmith.config.grid_file import read_grid

    spec = read_grid(path, overrides)
    opened: dict[str, str] = {}
    for method in spec.methods:
        adapter: dict[str, Any] = method.layer.get("adapter", {})
        for kind in kinds_in(adapter):
            if is_file(kind):
                opened[kind] = str(open_named({"kind": kind})["kind"])
    grid = expand(spec, opened)
    for line in grid.notes:
        note(f"note: {line}")
    return grid, tuple(map(str, opened_files()))


def _way(in_process: bool) -> Any:
    """How a cell is carried out."""
    if not in_process:
        from tunesmith.compare.child import run_in_child

        return run_in_child
    from tunesmith.cells import carry_out

    return partial(carry_out, console=console())


def _show_plan(grid: Grid, target: Path, as_json: bool) -> None:
    from tunesmith.compare.words import budget

    trials = {trial.slug for cell in grid.cells for trial in grid.trials(cell)}
    bases = {cell.slug for cell in grid.bases.values()}
    if as_json:
        cells = [{"cell": cell.slug, "run": cell.run.to_dict()} for cell in grid.cells]
        out_json({"out": str(target), "cells": cells, "trials": sorted(trials), "bases": sorted(bases)})
        return
    for cell in grid.in_order():
        out(cell.slug)
    each = budget(grid.spec.budget)
    out(f"{len(grid.cells)} cells, {len(trials)} trials of learning rates, {len(bases)} untuned; {each} each")


def _lines(table: Table) -> list[dict[str, Any]]:
    from tunesmith.compare.columns import columns

    shown = columns(table)
    lines = (*table.lines, *table.untuned)
    return [{column.title or "line": column.value(line) for column in shown} for line in lines]
