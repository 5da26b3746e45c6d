"""report.md, report.csv and cells.csv: the same report for a repository, and its numbers for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from tunesmith.compare import words
from tunesmith.compare.columns import columns, number, pivots
from tunesmith.compare.table import Line, Table


def markdown(table: Table) -> str:
    """The report without its plots."""
    shown = columns(table)
    main = table.main
    parts = [f"# {_plain(table.grid.spec.name)}", _list(words.summary(table))]
    lines = [*table.lines, *table.untuned]
    if lines:
        head = [column.title or "line" for column in shown]
        parts.append(_grid(head, [[column.text(line) for column in shown] for line in lines]))
    for pivot in pivots(table):
        (down, names), (across, heads) = pivot.rows, pivot.across
        made = [[name, *(_mean(main, line) for line in row)] for name, row in zip(names, pivot.cells, strict=True)]
        parts += [f"## {_plain(pivot.title)}: {_plain(main or '')}", _grid([f"{down} \\ {across}", *heads], made)]
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        ("What was compared", ("axis", "values"), words.varied(table)),
        ("What was measured", ("set", "rows and how they were asked"), words.measured(table)),
        ("The search for learning rates", ("search", "rate", "on validation rows"), words.searched(table)),
        ("What was not compared", ("cell", "", "why"), words.not_compared(table)),
        ("Held fixed", ("setting", "value"), words.held_fixed(table)),
    ]
    parts += ["## How", _list(words.how(table))]
    for title, head_of, rows in tables:
        if rows:
            parts += [f"## {title}", _grid(head_of, rows)]
    if table.strangers:
        parts.append(_list(f"Left out, of other settings or data: {name}" for name in table.strangers))
    return "\n\n".join(part for part in parts if part) + "\n"


def lines_csv(table: Table) -> str:
    """A row a line: the columns of the table as plain numbers, and each figure's half interval."""
    shown = columns(table)
    names = list(table.figures)
    head = ["cells", *(column.title or "line" for column in shown), *(f"{name} interval" for name in names)]
    rows = [
        [line.name, *(column.value(line) for column in shown), *(_half(line, name) for name in names)]
        for line in (*table.lines, *table.untuned)
    ]
    return _csv(head, rows)


def cells_csv(table: Table) -> str:
    """A row a finished cell: folder, seed, every figure and cost."""
    names = list(table.figures)
    costs = (
        "parameters",
        "file_bytes",
        "rate",
        "steps",
        "examples",
        "tokens",
        "seconds",
        "tokens_per_second",
        "peak_gib",
    )
    rows = []
    for line in (*table.lines, *table.untuned):
        for cell in line.cells:
            figures = [cell.result.figures[name].value if name in cell.result.figures else None for name in names]
            used = [None if cell.costs is None else getattr(cell.costs, name) for name in costs]
            seed = None if line.untuned else cell.cell.run.train.seed
            rows.append([line.letter, line.name, cell.folder.name, seed, *figures, *used])
    return _csv(["line", "cells", "folder", "seed", *names, *costs], rows)


def _half(line: Line, name: str) -> float | None:
    return line.figures[name].half if name in line.figures else None


def _mean(main: str | None, line: Line | None) -> str:
    if line is None or main not in line.figures:
        return "-"
    one = line.figures[main or ""]
    return number(one.mean) + ("" if one.half is None else f" ± {one.half:.4f}")


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in [head, *rows]:
        writer.writerow([_harmless(cell) for cell in row])
    return file.getvalue()


def _harmless(cell: object) -> object:
    """Text that a spreadsheet would take for a formula, with a quote before it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    made = [list(map(_plain, row)) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(map(_plain, head)), ["---"] * len(head), *made])


def _plain(text: str) -> str:
    """Text that stays in its cell and makes no tag, link or emphasis."""
    one = " ".join(str(text).split())
    for sign in ("\\", "|", "`", "*", "_", "[", "]"):
        one = one.replace(sign, f"\\{sign}")
    return one.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
