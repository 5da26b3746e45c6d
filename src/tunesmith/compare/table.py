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
from tunesmith.compare.statistics import Interval, compare, holm, over_both, over_change, over_rows, over_seeds
from tunesmith.evaluate.outcomes import Outcomes

DIFFERENT = 0.05  # below it a difference counts


@dataclass
class Line:
    """A row of the report. `letter` names it in plots.

    `gains` says how much better each figure is than the untuned base's: negative is lost.
    `p` is that it is as good as the best line, `p_base` as the untuned base: adjusted (Holm), None where not tested.
    """

    letter: str
    name: str
    method: str
    point: Mapping[str, Any]
    cells: Sequence[Found]
    planned: int
    base: Found | None = None
    untuned: bool = False
    figures: dict[str, Interval] = field(default_factory=dict)
    gains: dict[str, Interval] = field(default_factory=dict)
    p: float | None = None
    p_base: float | None = None
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

    def forgotten(self, line: Line) -> Interval | None:
        """The mean loss of the line on those figures, each counting alike; None where not measured."""
        found = [line.gains[name] for name in self.forgetting if name in line.gains]
        if not found or len(found) != len(self.forgetting):
            return None
        halves = [change.half for change in found if change.half is not None]
        half = math.hypot(*halves) / len(found) if len(halves) == len(found) else None
        return Interval(-math.fsum(change.mean for change in found) / len(found), half, "")

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
        line.gains = {name: change for name in line.figures if (change := _gain(line, name)) is not None}
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


def _gain(line: Line, name: str) -> Interval | None:
    if line.base is None or name not in line.base.result.figures:
        return None
    known = line.base.result.figures[name]
    sign = 1 if known.higher_is_better else -1
    pairs = pairs_of(line, [line.base], name)
    if len(pairs) != len(line.cells):
        return Interval(sign * (line.figures[name].mean - known.value), None, "")
    change = over_change([one for one, _ in pairs], pairs[0][1])
    return Interval(sign * change.mean, change.half, change.over)


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of the points (cost, gain) no other one beats: not dearer and not worse, and better in one of both."""
    return {
        i
        for i, (cost, gain) in enumerate(points)
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
    }


def _test(lines: Sequence[Line], figures: Mapping[str, Measured]) -> list[str]:
    """Mark the best line, and test the others against it and all against their untuned base; names the tests used."""
    main = next((name for name, figure in figures.items() if not figure.forgetting), None)
    measured = [line for line in lines if main in line.figures]
    if main is None or not measured:
        return []
    sign = 1 if figures[main].higher_is_better else -1
    best = max(measured, key=lambda line: sign * line.figures[main].mean)
    best.best = True
    tests: set[str] = set()
    against_best, against_base = [], []
    for line in measured:
        pairs = [] if line is best else pairs_of(line, best.cells, main)
        if pairs:
            line.p, test = compare([a for a, _ in pairs], [b for _, b in pairs])
            against_best.append(line)
            tests.add(test)
        pairs = [] if line.base is None else pairs_of(line, [line.base], main)
        if pairs:
            line.p_base, test = compare([a for a, _ in pairs], [pairs[0][1]], fixed=True)
            against_base.append(line)
            tests.add(test)
    for line, value in zip(against_best, holm([line.p for line in against_best if line.p is not None]), strict=True):
        line.p = value
    adjusted = holm([line.p_base for line in against_base if line.p_base is not None])
    for line, value in zip(against_base, adjusted, strict=True):
        line.p_base = value
    return sorted(tests)


def pairs_of(line: Line, others: Sequence[Found], name: str) -> list[tuple[Outcomes, Outcomes]]:
    """The rows of a line's cells and of others' (seed by seed, or of the untuned one), measured on the same rows."""
    of_seed = {cell.cell.run.train.seed: cell for cell in others}
    untuned = others[0] if others[0].costs is None else None
    found = []
    for one in line.cells:
        other = untuned or of_seed.get(one.cell.run.train.seed)
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
