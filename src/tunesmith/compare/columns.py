"""The columns of the report's table: one list for the page, the Markdown and the CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.compare.grid import label, short
from tunesmith.compare.statistics import Interval
from tunesmith.compare.table import DIFFERENT, Line, Table

Value = float | int | str | None


@dataclass(frozen=True)
class Pivot:
    """Two axes of a method against each other: the main figure's means, None where there is none."""

    title: str
    rows: tuple[str, Sequence[str]]
    across: tuple[str, Sequence[str]]
    cells: Sequence[Sequence[Line | None]]


@dataclass(frozen=True)
class Column:
    """`value` sorts and goes into the CSV, `text` is shown. `about` explains the head."""

    title: str
    value: Callable[[Line], Value]
    text: Callable[[Line], str]
    about: str = ""
    number: bool = True


def columns(table: Table) -> list[Column]:
    """Every column that has something to show."""
    axes = table.axes
    found = [
        Column("", lambda line: line.letter, lambda line: line.letter, "letter in the plots", False),
        Column("method", lambda line: line.method, lambda line: line.method, "", False),
        *(_axis(key, axes) for key in axes),
        *(_figure(table, name) for name, figure in table.figures.items() if not figure.forgetting),
    ]
    if any(line.p is not None for line in table.lines):
        found.append(Column("p", _p, _p_text, "that it is as good as the best: paired test, adjusted (Holm)"))
    if table.main is not None:
        found.append(_change(f"gain: {table.main}", lambda line: line.gains.get(str(table.main)), 1))
    found += [_lost(name) for name, figure in table.figures.items() if figure.forgetting]
    if len(table.forgetting) > 1:
        found.append(
            _change("forgotten", table.forgotten, 1, f"mean of {', '.join(table.forgetting)}; positive is lost")
        )
    found += [
        _cost("parameters", "parameters", lambda v: f"{v:,.0f}", "trained"),
        _plain("file, MB", _megabytes, lambda v: f"{v:,.2f}", "the adapter's tensors"),
        _cost("rate", "rate", lambda v: f"{v:g}", "peak learning rate"),
        _cost("examples", "examples", lambda v: f"{v:,.0f}", "rows seen in training"),
        _cost("tokens", "tokens", lambda v: f"{v:,.0f}", "tokens of those rows"),
        _cost("train, s", "seconds", lambda v: f"{v:,.1f}", "optimizer steps alone"),
        _cost("tokens/s", "tokens_per_second", lambda v: f"{v:,.0f}", "in training"),
        _cost("peak, GiB", "peak_gib", lambda v: f"{v:.2f}", "memory, the most of all seeds"),
        _plain("all, s", _all_seconds, lambda v: f"{v:,.0f}", "loading, validation and checks included"),
    ]
    seeds = Column("seeds", lambda line: len(line.cells), lambda line: f"{len(line.cells)}/{line.planned}", "finished")
    found.append(seeds)
    shown = [*table.lines, *table.untuned]
    return [column for column in found if any(column.value(line) is not None for line in shown)]


def pivots(table: Table) -> list[Pivot]:
    """A table for each method that two axes vary; or of methods against the only axis."""
    found = []
    planned = {cell.line: cell for cell in table.grid.cells}
    methods = list(dict.fromkeys(cell.method for cell in planned.values()))
    for method in methods:
        points = [cell.point for cell in planned.values() if cell.method == method]
        varied = [key for key in points[0] if len({label(point[key]) for point in points}) > 1]
        if len(varied) == 2:
            found.append(_pivot(table, method, varied[0], varied[1], method))
    axes = table.axes
    shared = all(axes == list(cell.point) for cell in planned.values())
    if not found and shared and len(axes) == 1 and len(methods) > 1:
        found.append(_pivot(table, f"method and {short(axes[0], axes)}", "", axes[0], None))
    return found


def _pivot(table: Table, title: str, down: str, across: str, method: str | None) -> Pivot:
    """`down` is an axis, or empty for the method."""

    def of(method: str, point: Mapping[str, Any], key: str) -> str:
        return label(point[key]) if key else method

    cells = [cell for cell in table.grid.cells if method is None or cell.method == method]
    rows = list(dict.fromkeys(of(cell.method, cell.point, down) for cell in cells))
    heads = list(dict.fromkeys(label(cell.point[across]) for cell in cells))
    at = {
        (of(line.method, line.point, down), label(line.point[across])): line
        for line in table.lines
        if method is None or line.method == method
    }
    names = [short(key, table.axes) if key else "method" for key in (down, across)]
    return Pivot(title, (names[0], rows), (names[1], heads), [[at.get((row, head)) for head in heads] for row in rows])


def number(value: float) -> str:
    """A figure in four digits."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _axis(key: str, axes: Sequence[str]) -> Column:
    def value(line: Line) -> Value:
        found: Any = line.point.get(key)
        if key not in line.point:
            return None
        return found if isinstance(found, int | float) and not isinstance(found, bool) else text(line)

    def text(line: Line) -> str:
        return label(line.point[key]) if key in line.point else "-"

    return Column(short(key, axes), value, text, key)


def _figure(table: Table, name: str) -> Column:
    def text(line: Line) -> str:
        one = line.figures.get(name)
        if one is None:
            return "-"
        return number(one.mean) + ("" if one.half is None else f" ± {one.half:.4f}")

    better = "higher" if table.figures[name].higher_is_better else "lower"
    about = f"mean and 95% interval; {better} is better"
    return Column(name, lambda line: line.figures[name].mean if name in line.figures else None, text, about)


def _p(line: Line) -> Value:
    return 1.0 if line.best else line.p


def _p_text(line: Line) -> str:
    if line.best:
        return "best"
    if line.p is None:
        return "-"
    said = "<0.001" if line.p < 0.001 else f"{line.p:.3f}"
    return said if line.p < DIFFERENT else f"{said} (not told apart)"


def _lost(name: str) -> Column:
    about = "against the untuned base, with its 95% interval; positive is worse"
    return _change(f"lost: {name}", lambda line: line.gains.get(name), -1, about)


def _change(title: str, of: Callable[[Line], Interval | None], sign: int, about: str = "") -> Column:
    """A change with its interval, times `sign`."""

    def value(line: Line) -> Value:
        found = of(line)
        return None if found is None else sign * found.mean

    def text(line: Line) -> str:
        found = of(line)
        if found is None:
            return "-"
        return f"{sign * found.mean:+.4f}" + ("" if found.half is None else f" ± {found.half:.4f}")

    return Column(title, value, text, about or "against the untuned base, with its 95% interval; positive is better")


def _plain(title: str, value: Callable[[Line], float | None], text: Callable[[float], str], about: str = "") -> Column:
    def shown(line: Line) -> str:
        found = value(line)
        return "-" if found is None else text(found)

    return Column(title, value, shown, about)


def _cost(title: str, of: str, text: Callable[[float], str], about: str) -> Column:
    return _plain(title, lambda line: line.mean(of), text, about)


def _megabytes(line: Line) -> float | None:
    found = line.mean("file_bytes")
    return None if found is None else found / 1e6


def _all_seconds(line: Line) -> float | None:
    """The mean of the cells that ran without a break."""
    known = [cell.result.used.get("seconds") for cell in line.cells]
    whole = [float(value) for value in known if isinstance(value, int | float)]
    return sum(whole) / len(whole) if whole else None
