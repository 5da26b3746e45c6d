"""What the report says in words, for the page and the Markdown: what was compared, how, and what was not."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.compare.grid import defaults, flat, label, short
from tunesmith.compare.read import Found, Lost
from tunesmith.compare.table import DIFFERENT, Line, Table
from tunesmith.config.grid import Budget
from tunesmith.evaluate.run import find_metric

ROOM = 1.02  # of a budget: what planning by a few steps cannot know
TESTS = {
    "McNemar": "McNemar's exact test on the rows that only one of the two has right",
    "bootstrap": "a paired bootstrap over the rows, 10,000 draws",
    "seeds": "Welch's t test, whose error is that over the seeds and that over the rows (bootstrap)",
}
NOT_SHOWN = (
    "data.train",
    "output_dir",
    "name",
    "log",
    "adapter",
    "train.resume",
    "train.seed",
    "evaluate.best",
    "evaluate.samples",
)


def summary(table: Table) -> list[str]:
    """How much of the grid is there, and which line is best."""
    grid = table.grid
    done = sum(len(line.cells) for line in table.lines)
    seeds = len(grid.spec.seeds)
    lines = [
        f"{done} of {len(grid.cells)} cells are finished: {len(grid.lines)} lines, {seeds} seed{'s' * (seeds > 1)}."
    ]
    best = next((line for line in table.lines if line.best), None)
    main = table.main
    if best is not None and main is not None:
        figure = best.figures[main]
        width = "" if figure.half is None else f" ± {figure.half:.4f}"
        lines.append(f"Best {main}: {best.letter} ({_called(table, best.letter)}), {figure.mean:.4f}{width}.")
        tied = [line.letter for line in table.lines if line.p is not None and line.p >= DIFFERENT]
        if tied:
            lines.append(f"Not told apart from it (p of {DIFFERENT:g} or more): {', '.join(tied)}.")
        items = {cell.result.figures[main].items for cell in best.cells if main in cell.result.figures}
        if others := [line.letter for line in table.lines if not _on_rows(line, main, items)]:
            lines.append(
                f"Measured on other rows than the best, wholly or in part, so not to be compared with it: "
                f"{', '.join(others)}. Give held-out rows of their own (a folder with test rows, or measure.data)."
            )
        if no_better := [line.letter for line in table.lines if _no_better(line, main)]:
            lines.append(f"No better than the untuned base, as far as these rows tell: {', '.join(no_better)}.")
    return lines


def _on_rows(line: Line, main: str, items: set[str]) -> bool:
    """Was every cell of the line measured on one of these sets of rows?"""
    return all(cell.result.figures[main].items in items for cell in line.cells if main in cell.result.figures)


def _no_better(line: Line, main: str) -> bool:
    gain = line.gains.get(main)
    return gain is not None and (gain.mean <= 0 or line.p_base is not None and line.p_base >= DIFFERENT)


def how(table: Table) -> list[str]:
    """How it was made: the budget, the search, what was measured on which rows, which intervals and tests."""
    spec = table.grid.spec
    lines = [f"Budget of a cell: {budget(spec.budget)}. What each used is in the table."]
    if spec.search:
        lines += _search(table)
    else:
        lines.append("Learning rates: each method's own default, or as the grid says; nothing was searched.")
    for name, figure in table.figures.items():
        better = "higher is better" if figure.higher_is_better else "lower is better"
        lines.append(f"{name}: {figure.count} items{', to show what was forgotten' * figure.forgetting}; {better}.")
    if any(one.split == "valid" for one in spec.measure.sets):
        lines.append(
            "It is measured on validation rows, which chose checkpoints and rates too: figures are optimistic."
        )
    over = sorted({interval.over for line in table.lines for interval in line.figures.values()})
    if over:
        lines.append(f"± is half of the 95% interval, over {' or '.join(over)}.")
    if table.tests:
        tests = "; ".join(TESTS[name] for name in table.tests)
        lines.append(f"p, against the best line and against the untuned base: {tests}; adjusted by Holm's method.")
    elif len(table.lines) > 1:
        lines.append(f"Nothing was tested: {table.main} is not kept row by row, or was measured on different rows.")
    if table.forgetting:
        lines.append(f"forgotten: the mean of what was lost on {', '.join(table.forgetting)}; positive is lost.")
    lines += _over_budget(table)
    shared = [cell for line in table.lines for cell in line.cells if not cell.result.used.get("own_process", True)]
    if shared:
        lines.append("Cells shared a process: a cell's peak memory includes what those before it have left.")
    notes = dict.fromkeys(note for line in table.lines for cell in line.cells for note in cell.result.notes)
    return [*lines, *notes]


def _search(table: Table) -> list[str]:
    """How rates were searched, on which lines, and where the best was an end of what was tried."""
    search = table.grid.spec.search
    if search is None:
        return []
    lines = [
        f"Learning rates: {search.rates} for each {search.per}, a factor of {search.factor:g} apart, on "
        f"{search.share:.0%} of the budget in all; chosen by {search.metric} on validation rows, never on the rows "
        "measured here. The table's costs are those of the cell itself."
    ]
    if search.per == "method" and len(table.searches) < len(table.lines):
        tried = ", ".join(table.searches)
        lines.append(f"A method's other lines use the rate that was found for its first: {tried}.")
    for name, trials in table.searches.items():
        found = [one for one in trials if isinstance(one, Found) and search.metric in one.result.valid]
        rates = sorted(float(trial.cell.run.train.learning_rate or 0) for trial in trials)
        if len(found) < 2:
            continue
        sign = 1 if find_metric(search.metric).higher_is_better else -1
        best = max(found, key=lambda one: sign * one.result.valid[search.metric]).cell.run.train.learning_rate
        if best in (rates[0], rates[-1]):
            end = "lowest" if best == rates[0] else "highest"
            lines.append(f"{name}: the {end} rate that was tried was the best, so a better one may lie beyond it.")
    return lines


def _over_budget(table: Table) -> list[str]:
    """Cells that took more than the budget's seconds or memory, which are planned from a few steps."""
    given, lines = table.grid.spec.budget, []
    for line in table.lines:
        for cell in line.cells:
            costs = cell.costs
            if costs is None:
                continue
            for limit, took, unit in ((given.seconds, costs.seconds, "s"), (given.memory, costs.peak_gib, "GiB")):
                if limit is not None and took > ROOM * limit:
                    lines.append(f"{line.letter} took {took:.4g} {unit}, over its budget of {limit:g} {unit}.")
    return lines


def measured(table: Table) -> list[tuple[str, str]]:
    """Each set that was measured: where its rows are, which of them, and how they were asked."""
    asked = table.grid.spec.measure
    rows = []
    for one in (*asked.sets, *asked.forgetting):
        said = [one.task or ", ".join(one.metrics), one.data or f"the run's own data, {one.split}"]
        said += [f"the first {one.rows}"] if one.rows is not None else []
        said += [f"template {one.template}"] if one.template else []
        said += [f"{key} {label(value)}" for key, value in one.settings.items()]
        rows.append((one.called or "own rows", "; ".join(said)))
    return rows


def not_compared(table: Table) -> list[tuple[str, str, str]]:
    """(cell, what became of it, why) for every cell without a result."""
    return [(lost.cell.slug, lost.kind, lost.why) for lost in table.lost]


def searched(table: Table) -> list[tuple[str, str, str]]:
    """(search, rate, what came of it) for every trial."""
    search = table.grid.spec.search
    rows = []
    for leader, trials in table.searches.items():
        name = table.grid.leaders[leader].method if search and search.per == "method" else leader
        for trial in trials:
            rate = f"{trial.cell.run.train.learning_rate:g}"
            rows.append((name, rate, _trial(trial, search.metric if search else "")))
    return rows


def _trial(trial: Found | Lost, metric: str) -> str:
    if isinstance(trial, Lost):
        return f"{trial.kind}: {trial.why}"
    value = trial.result.valid.get(metric)
    spent = f"{trial.costs.examples:,} examples, {trial.costs.seconds:.1f} s" if trial.costs else ""
    return f"{metric} {'-' if value is None else f'{value:.4f}'} ({spent})"


def held_fixed(table: Table) -> list[tuple[str, str]]:
    """Settings that all cells share and that are not the defaults, by dotted key."""
    cells = table.grid.cells
    settings = [flat(cell.run) for cell in cells]
    known = defaults(cells[0].run)
    shared = {key: value for key, value in settings[0].items() if all(one[key] == value for one in settings)}
    rows = [("data.train", cells[0].run.data.train)] if "data.train" in shared else []
    for key, value in shared.items():
        told = key in NOT_SHOWN or key.split(".")[0] in NOT_SHOWN
        if not told and value != known.get(key):
            rows.append((key, label(value)))
    return rows


def varied(table: Table) -> list[tuple[str, str]]:
    """Each axis with its values."""
    spec, axes = table.grid.spec, table.axes
    rows = [("methods", _listed([method.name for method in spec.methods]))] if len(spec.methods) > 1 else []
    for key in axes:
        values = dict.fromkeys(label(cell.point[key]) for cell in table.grid.cells if key in cell.point)
        rows.append((f"{short(key, axes)} ({key})" if short(key, axes) != key else key, _listed(list(values))))
    return [*rows, ("seeds", ", ".join(map(str, spec.seeds)))]


def _listed(values: Sequence[str]) -> str:
    """Values with commas between them; with semicolons where one has a comma of its own."""
    return ("; " if any("," in value for value in values) else ", ").join(values)


def budget(given: Budget) -> str:
    """A budget in words."""
    units = {
        "examples": "{:,} examples",
        "tokens": "{:,} tokens",
        "seconds": "{:g} seconds of steps",
        "memory": "{:g} GiB",
    }
    known = [(name, getattr(given, name)) for name in units]
    return ", ".join(units[name].format(value) for name, value in known if value is not None)


def _called(table: Table, letter: str) -> str:
    line = next(line for line in table.lines if line.letter == letter)
    return ", ".join(
        [line.method, *(f"{short(k, table.axes)} {label(line.point[k])}" for k in table.axes if k in line.point)]
    )
