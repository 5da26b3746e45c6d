"""report.html: one file that opens from disk with no network. All text is escaped; only our own script runs.

The policy in the head (compare/style.py) allows our own style and script, and no fetching.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from tunesmith.compare import words
from tunesmith.compare.columns import Column, columns, number, pivots
from tunesmith.compare.grid import label, short
from tunesmith.compare.plots import COLOURS, Point, curves, scatter
from tunesmith.compare.style import POLICY, SCRIPT, STYLE
from tunesmith.compare.table import Line, Table, front

LINES_A_PLOT = 6  # more than that cannot be told apart

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""


def page(table: Table) -> str:
    """The whole page."""
    sections = [
        _list(words.summary(table)),
        _section("Results", _main(table)),
        *(_section(f"{p.title}: {table.main}", _pivot(table, p)) for p in pivots(table)),
        _section("What it costs", _fronts(table)),
        _section("Loss", _curves(table)),
        _section("Samples", _samples(table)),
        _section("What was compared", _rows(("axis", "values"), words.varied(table))),
        _section("What was measured", _rows(("set", "rows and how they were asked"), words.measured(table))),
        _section("How", _list(words.how(table))),
        _section(
            "The search for learning rates", _rows(("search", "rate", "on validation rows"), words.searched(table))
        ),
        _section("What was not compared", _missing(table)),
        _section("Held fixed", _rows(("setting", "value"), words.held_fixed(table))),
    ]
    body = "\n".join(section for section in sections if section)
    title = html.escape(table.grid.spec.name)
    return PAGE.format(policy=POLICY, title=title, style=STYLE, body=body, script=SCRIPT)


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{inside}</section>" if inside else ""


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>' if body else ""


def _main(table: Table) -> str:
    """The table that sorts by any head."""
    shown = columns(table)
    heads = "".join(
        f'<th scope="col" aria-sort="none"{" data-number=1" if column.number else ""}'
        f'{_class(column)} title="{html.escape(column.about)}">'
        f"<button>{html.escape(column.title or 'line')}</button></th>"
        for column in shown
    )
    body = "".join(
        f"<tr{_kind(line)}>" + "".join(_cell(column, line) for column in shown) + "</tr>"
        for line in (*table.lines, *table.untuned)
    )
    if not body:
        return '<p class="dim">No cell is finished yet.</p>'
    told = "A head sorts the table. Letters name lines in the plots."
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="dim">{told}</p>'
    )


def _class(column: Column) -> str:
    return ' class="number"' if column.number else ' class="word"'


def _kind(line: Line) -> str:
    return ' class="best"' if line.best else ' class="untuned"' if line.untuned else ""


def _cell(column: Column, line: Line) -> str:
    value = column.value(line)
    key = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return f'<td{_class(column)} data-v="{html.escape(key)}">{html.escape(column.text(line))}</td>'


def _pivot(table: Table, pivot: object) -> str:
    down, rows = pivot.rows  # type: ignore[attr-defined]
    across, heads = pivot.across  # type: ignore[attr-defined]
    made = []
    for name, line in zip(rows, pivot.cells, strict=True):  # type: ignore[attr-defined]
        made.append([f"{name}", *(_mean(table, one) for one in line)])
    return _rows((f"{down} \\ {across}", *heads), made)


def _mean(table: Table, line: Line | None) -> str:
    if line is None or table.main not in line.figures:
        return "-"
    one = line.figures[table.main or ""]
    return number(one.mean) + ("" if one.half is None else f" ± {one.half:.4f}") + (" (best)" if line.best else "")


def _fronts(table: Table) -> str:
    """The main figure against memory, time and what was forgotten."""
    main = table.main
    if main is None:
        return ""
    asked = [
        ("peak memory, GiB", lambda line: line.mean("peak_gib")),
        ("training, s", lambda line: line.mean("seconds")),
        ("trained parameters", lambda line: line.mean("parameters")),
        ("forgotten", lambda line: None if (lost := table.forgotten(line)) is None else lost.mean),
    ]
    sign = 1 if table.figures[main].higher_is_better else -1
    methods = _methods(table)
    plots = []
    for across, cost in asked:
        known = [(line, x) for line in table.lines if main in line.figures and (x := cost(line)) is not None]
        if len(known) < 2:
            continue
        ahead = front([(x, sign * line.figures[main].mean) for line, x in known])
        points = [
            Point(
                x, line.figures[main].mean, line.letter, methods.index(line.method), line.figures[main].half, i in ahead
            )
            for i, (line, x) in enumerate(known)
        ]
        plots.append(scatter(f"{main} against {across}", across, main, points))
    keys = "".join(f'<span class="key c{i % COLOURS}">{html.escape(name)}</span>' for i, name in enumerate(methods))
    told = "Filled: no other line is both cheaper and better (Pareto front). Bars are 95% intervals."
    return f'<p>{keys}</p><p class="dim">{told}</p><div class="plots">{"".join(plots)}</div>' if plots else ""


def _curves(table: Table) -> str:
    """Training and held-out loss of the first seed of each line: all together, or by method where they are many."""
    groups = [("", list(table.lines))]
    if len(table.lines) > LINES_A_PLOT:
        of = {method: [line for line in table.lines if line.method == method] for method in _methods(table)}
        groups = [
            (f"{method}: ", lines[at : at + LINES_A_PLOT])
            for method, lines in of.items()
            for at in range(0, len(lines), LINES_A_PLOT)
        ]
    plots = [
        curves(f"{name}{what}", what, [(line.letter, getattr(line.cells[0], key)) for line in lines])
        for what, key in (("training loss", "loss"), ("held-out loss", "held_out"))
        for name, lines in groups
    ]
    drawn = [plot for plot in plots if plot]
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _methods(table: Table) -> list[str]:
    """The methods of the lines, in the order of the grid."""
    return list(dict.fromkeys(line.method for line in table.lines))


def _samples(table: Table) -> str:
    """Each sampled prompt once, and what every line answered."""
    shown = [line for line in (*table.untuned, *table.lines) if line.cells[0].result.samples]
    prompts: dict[tuple[str, str], list[tuple[Line, str]]] = {}
    for line in shown:
        for sample in line.cells[0].result.samples:
            asked = (sample.get("prompt", ""), sample.get("expected", ""))
            prompts.setdefault(asked, []).append((line, sample.get("answer", "")))
    parts = []
    for at, ((prompt, expected), answers) in enumerate(prompts.items(), 1):
        rows = [(line.letter, _called(table, line), text) for line, text in answers]
        parts.append(
            f"<details{' open' if at == 1 else ''}><summary>Sample {at}</summary><pre>{html.escape(prompt)}</pre>"
            f"{_rows(('line', '', 'answer'), [('', 'expected', expected), *rows])}</details>"
        )
    return "".join(parts)


def _called(table: Table, line: Line) -> str:
    axes = table.axes
    return ", ".join([line.method, *(f"{short(k, axes)} {label(line.point[k])}" for k in axes if k in line.point)])


def _missing(table: Table) -> str:
    rows = words.not_compared(table)
    told = _rows(("cell", "", "why"), rows) if rows else "<p>Every cell of the grid is in the table.</p>"
    if table.strangers:
        told += _list([f"Left out, of other settings or data: {name}" for name in table.strangers])
    return told
