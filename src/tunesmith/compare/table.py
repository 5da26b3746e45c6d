"""From finished cells to the lines of the report: means, intervals, tests against the best, what was lost.

A line is a method at one point of the axes; its seeds are averaged. The first figure of the grid's measures decides
which line is best; every other line is tested against it on the rows that both were measured on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.compare.grid import Grid
from tunesmith.compare.read import Costs, Found, Lost, read_cell, strangers
from tunesmith.compare.record import Measured
from tunesmith.compare.statistics import Interval, compare, holm, over_both, over_rows, over_seeds

DIFFERENT = 0.05  # below it a difference counts


@dataclass
class Line:
    """A row of the report. `letter` names it in plots; `p` is adjusted (Holm), None for the best and the untested."""

    letter: str
    name: str
    method: str
    point: Mapping[str, Any]
    cells: Sequence[Found]
    planned: int
    base: Found | None = None
    untuned: bool = False
    figures: dict[str, Interval] = field(default_factory=dict)
    p: float | None = None
    test: str = ""
    best: bool = False

    @property
    def costs(self) -> list[Costs]:
        """What each of its seeds took."""
        return [cell.costs for cell in self.cells if cell.costs is not None]

    def mean(self, of: str) -> float | None:
        """The mean over seeds of a number of `Costs`; of the peak memory the largest."""
        values = [float(getattr(costs, of)) for costs in self.costs]
        if not values:
            return None
        return max(values) if of == "peak_gib" else math.fsum(values) / len(values)

    def lost(self, name: str) -> float | None:
        """How much worse a figure is than the base's: positive is forgotten."""
        if self.base is None or name not in self.figures or name not in self.base.result.figures:
            return None
        known = self.base.result.figures[name]
        change = self.figures[name].mean - known.value
        return -change if known.higher_is_better else change


@dataclass(frozen=True)
class Table:
    """All that the report shows. `figures` are named in the order of the grid, the main one first."""

    grid: Grid
    out: Path
    lines: Sequence[Line]
    untuned: Sequence[Line]
    figures: Mapping[str, Measured]
    lost: Sequence[Lost]
    strangers: Sequence[str]
    searches: Mapping[str, Sequence[Found | Lost]]
    tests: Sequence[str]

    @property
    def main(self) -> str | None:
        """The figure that decides; None where nothing is finished."""
        return next((name for name, figure in self.figures.items() if not figure.forgetting), None)

    @property
    def forgetting(self) -> list[str]:
        """The main figure of each set that shows what was forgotten: those that are averaged are of one direction."""
        firsts: dict[str, str] = {}
        for name, figure in self.figures.items():
            if figure.forgetting:
                firsts.setdefault(figure.of, name)
        shares = [name for name in firsts.values() if self.figures[name].higher_is_better]
        return shares or list(firsts.values())[:1]

    def forgotten(self, line: Line) -> float | None:
        """The mean loss of the line on those figures; None where not measured."""
        found = [lost for name in self.forgetting if (lost := line.lost(name)) is not None]
        return math.fsum(found) / len(found) if found and len(found) == len(self.forgetting) else None

    @property
    def axes(self) -> list[str]:
        """The axes that have several values among the grid's cells."""
        values: dict[str, list[Any]] = {}
        for cell in self.grid.cells:
            for key, value in cell.point.items():
                if value not in values.setdefault(key, []):
                    values[key].append(value)
        return [key for key, found in values.items() if len(found) > 1 or len(self.grid.cells) == 1]


def tabulate(grid: Grid, out: Path, inputs: Mapping[str, str]) -> Table:
    """Read every cell of the grid and make the lines, the best first. Damaged cells are in `lost`, in no average."""
    read = {cell: read_cell(cell, out, inputs) for cell in grid.in_order()}
    bases = {name: read[cell] for name, cell in grid.bases.items()}
    lines = []
    for name, cells in grid.lines.items():
        found = [one for cell in cells if isinstance(one := read[cell], Found)]
        if found:
            base = bases.get(name)
            known = base if isinstance(base, Found) else None
            lines.append(Line("", name, cells[0].method, cells[0].point, found, len(cells), known))
    untuned = [
        Line("", one.cell.slug, one.cell.method, one.cell.point, [one], 1, untuned=True)
        for one in dict.fromkeys(bases.values())
        if isinstance(one, Found)
    ]
    figures: dict[str, Measured] = {}
    for line in (*lines, *untuned):
        for one in line.cells:
            figures |= {name: figure for name, figure in one.result.figures.items() if name not in figures}
        line.figures = {name: interval(line, name) for name in line.cells[0].result.figures}
    searches: dict[str, Sequence[Found | Lost]] = {}
    for name in grid.lines:
        leader = grid.leaders[name]
        if leader.line not in searches and (trials := grid.trials(leader)):
            searches[leader.line] = [read_cell(trial, out, inputs) for trial in trials]
    table = Table(
        grid, out, lines, untuned, figures, [one for one in read.values() if isinstance(one, Lost)],
        strangers(grid, out, inputs), searches, _test(lines, figures),
    )  # fmt: skip
    _order(table)
    return table


def interval(line: Line, name: str) -> Interval:
    """A figure of a line: over its seeds, or over the rows of its only one."""
    found = [cell for cell in line.cells if name in cell.result.figures]
    if len(found) > 1:
        values = [cell.result.figures[name].value for cell in found]
        rows_of = [cell.outcomes[name] for cell in found if name in cell.outcomes]
        alike = len(rows_of) == len(found) and len({cell.result.figures[name].items for cell in found}) == 1
        return over_both(values, rows_of) if alike else over_seeds(values)
    figure, rows = found[0].result.figures[name], found[0].outcomes.get(name)
    if rows is not None:
        return over_rows(rows)
    ends = figure.interval
    return Interval(figure.value, None if ends is None else (ends[1] - ends[0]) / 2, f"{figure.count} rows")


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of the points (cost, gain) no other one beats: not dearer and not worse, and better in one of both."""
    return {
        i
        for i, (cost, gain) in enumerate(points)
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
    }


def _test(lines: Sequence[Line], figures: Mapping[str, Measured]) -> list[str]:
    """Mark the best line and test the others against it; returns the names of the tests that were used."""
    main = next((name for name, figure in figures.items() if not figure.forgetting), None)
    measured = [line for line in lines if main in line.figures]
    if main is None or not measured:
        return []
    sign = 1 if figures[main].higher_is_better else -1
    best = max(measured, key=lambda line: sign * line.figures[main].mean)
    best.best = True
    tested = []
    for line in measured:
        pairs = [] if line is best else _pairs(line, best, main)
        if pairs:
            line.p, line.test = compare([a for a, _ in pairs], [b for _, b in pairs])
            tested.append(line)
    for line, value in zip(tested, holm([line.p for line in tested if line.p is not None]), strict=True):
        line.p = value
    return sorted({line.test for line in tested})


def _pairs(line: Line, best: Line, name: str) -> list[tuple[Any, Any]]:
    """The rows of both lines, seed by seed, where both were measured on the same rows."""
    of_best = {cell.cell.run.train.seed: cell for cell in best.cells}
    found = []
    for one in line.cells:
        other = of_best.get(one.cell.run.train.seed)
        if other is None or name not in one.outcomes or name not in other.outcomes:
            continue
        same = one.result.figures[name].items == other.result.figures[name].items
        if same and len(one.outcomes[name].values) == len(other.outcomes[name].values):
            found.append((one.outcomes[name], other.outcomes[name]))
    rows = {len(a.values) for a, _ in found}
    return found if len(rows) == 1 else []


def _order(table: Table) -> None:
    """Letters in the order of the grid; the untuned base is 0."""
    for number, line in enumerate(table.lines):
        line.letter = letters(number)
    for number, line in enumerate(table.untuned):
        line.letter = f"0{letters(number).lower()}" if len(table.untuned) > 1 else "0"


def letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    found = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        found = chr(ord("A") + rest) + found
    return found
