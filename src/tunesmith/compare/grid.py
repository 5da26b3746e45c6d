"""What to run: the cells of a grid, each with its resolved run, and the order in which they are run.

methods x axes x seeds  ->  cells        a line is what they have in common but the seed: a row of the report
                            trials       of the search: a learning rate each, on a share of the budget
                            speeds       where the budget is in seconds: a few steps that are timed
                            bases        the model as it is, measured like the others
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from tunesmith.adapters import find_method
from tunesmith.adapters.outside import is_file, kinds_in, with_names
from tunesmith.config import Located, Run, validate_section
from tunesmith.config.grid import MOST_CELLS, Budget, GridSpec, MethodSpec, Search
from tunesmith.config.load import run_of
from tunesmith.config.sections import LOSS_METRICS
from tunesmith.errors import ConfigError
from tunesmith.evaluate.run import find_metric
from tunesmith.evaluate.suite import find_task

FORMAT = 1  # of what a cell's folder holds
SPEED_STEPS = 6
MOST_SLUG = 110  # letters of a folder's name, the hash after them aside
_DEFAULTS = Located({"evaluate.samples": 0})  # samples are taken when a cell is measured

Role = Literal["cell", "trial", "speed", "base"]


@dataclass(frozen=True, eq=False)
class Cell:
    """One piece of work with a folder of its own.

    `slug` begins the folder's name. `point` holds the axes' values by key, the seed aside. `budget` is what its own
    training may use, `rates` what a search is to choose from (empty: none), `identity` all that its result depends on.
    """

    role: Role
    slug: str
    line: str
    method: str
    point: Mapping[str, Any]
    run: Run
    budget: Budget | None
    rates: tuple[float, ...]
    identity: Mapping[str, Any]

    def key(self, inputs: Mapping[str, str]) -> str:
        """The hash of what its result depends on, `inputs` (hashes of the data by path) included."""
        text = json.dumps([FORMAT, self.role, self.identity, dict(inputs)], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Grid:
    """All cells of a comparison. `leaders` gives, for a line, the cell whose search finds its learning rate."""

    spec: GridSpec
    cells: tuple[Cell, ...]
    bases: Mapping[str, Cell]  # by line
    leaders: Mapping[str, Cell]
    notes: tuple[str, ...]

    @property
    def lines(self) -> dict[str, list[Cell]]:
        """The cells of each line, in the order of the grid."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.line, []).append(cell)
        return found

    def trials(self, cell: Cell) -> list[Cell]:
        """The trials that choose the cell's learning rate; empty without a search."""
        search = self.spec.search
        if search is None:
            return []
        leader = self.leaders[cell.line]
        return [_trial(leader, rate, search, self.spec.budget) for rate in leader.rates]

    def in_order(self) -> Iterator[Cell]:
        """Bases, then one seed after the other: what is there when time runs out is a whole grid of fewer seeds."""
        yield from dict.fromkeys(self.bases.values())
        for seed in self.spec.seeds:
            yield from (cell for cell in self.cells if cell.run.train.seed == seed)

    def paths(self) -> list[str]:
        """The names of all data that cells train on or are measured on."""
        named = [name for cell in self.cells for name in (cell.run.data.train, cell.run.data.valid)]
        sets = (*self.spec.measure.sets, *self.spec.measure.forgetting)
        return sorted({name for name in (*named, *(one.data for one in sets)) if name is not None})

    def files(self) -> list[str]:
        """The names of other files that results depend on: templates, and rows that examples are taken from."""
        sets = (*self.spec.measure.sets, *self.spec.measure.forgetting)
        templates = [*(cell.run.data.template for cell in self.cells), *(one.template for one in sets)]
        shots = [one.settings.get("shots_from") for one in sets]
        named = [*(str(name) for name in templates if name and name.endswith(".jinja")), *map(str, filter(None, shots))]
        return sorted(set(named))


def expand(spec: GridSpec, opened: Mapping[str, str] | None = None) -> Grid:
    """Every cell of a grid.

    `opened` maps the files of the user's own methods to their kinds. Raises ConfigError where an axis does not fit a
    method, a setting is wrong, or the grid is too large.
    """
    count = sum(len(_points(spec, method)) for method in spec.methods) * len(spec.seeds)
    if count > MOST_CELLS:
        raise ConfigError(f"{spec.name}: {count} cells, more than {MOST_CELLS}; take values or axes out")
    _check_names(spec)
    cells: list[Cell] = []
    notes: dict[str, None] = {}
    lines: dict[str, None] = {}
    for method in spec.methods:
        for point, line in _points(spec, method):
            if line in lines:
                raise ConfigError(f"methods: two lines would be called {line!r}; give methods other names")
            lines[line] = None
            for seed in spec.seeds:
                run, said = _run(spec, method, point, seed, opened or {})
                notes |= dict.fromkeys(said)
                cells.append(_cell(spec, method.name, point, line, run))
    leaders: dict[str, Cell] = {}
    for cell in cells:
        of = cell.method if spec.search is None or spec.search.per == "method" else cell.line
        first = next(c for c in cells if of in (c.method, c.line))
        leaders[cell.line] = first
    grid = Grid(spec, tuple(cells), _bases(spec, cells) if spec.baseline else {}, leaders, tuple(notes))
    for cell in leaders.values():
        grid.trials(cell)  # a budget that leaves nothing for them is refused here
    return grid


def speed_of(cell: Cell) -> Cell:
    """The few timed steps that say how long a step of the cell's line takes."""
    train = replace(cell.run.train, max_steps=SPEED_STEPS, epochs=float(SPEED_STEPS), seed=0, learning_rate=None)
    run = replace(cell.run, train=train)
    budget = None if cell.budget is None or cell.budget.memory is None else Budget(memory=cell.budget.memory)
    slug = f"speed_{cell.line}"[:MOST_SLUG]
    return replace(cell, role="speed", slug=slug, run=run, budget=budget, rates=(), identity=_identity(run, budget))


def label(value: Any) -> str:
    """A value of an axis as a short text."""
    if isinstance(value, dict):
        return " ".join(f"{key} {label(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(label, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def short(key: str, keys: Sequence[str]) -> str:
    """The last part of an axis' key, or the whole of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) < 2 else key


def _check_names(spec: GridSpec) -> None:
    """Raise ConfigError for a metric, a task or a task's setting that is not there, before hours are spent."""
    for one in (*spec.measure.sets, *spec.measure.forgetting):
        for metric in one.metrics:
            find_metric(metric, "measure.metrics")
        if one.task is not None:
            validate_section(
                find_task(one.task, "measure.task").settings, one.settings, f"measure.{one.called}.settings"
            )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_+.-]+", "-", text).strip("-.")[:28] or "x"


def _points(spec: GridSpec, method: MethodSpec) -> list[tuple[dict[str, Any], str]]:
    """Each combination of a method's axes, and what its line is called."""
    both = set(spec.axes) & set(method.axes)
    if both:
        raise ConfigError(f"methods: {method.name} has an axis {min(both)} of its own, and the grid has one; keep one")
    axes = {**spec.axes, **method.axes}
    parts = [_value_slugs(short(key, list(axes)), values) for key, values in axes.items()]
    points = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    names = ("_".join([_slug(method.name), *chosen])[:MOST_SLUG] for chosen in product(*parts))
    return list(zip(points, names, strict=True))


def _value_slugs(name: str, values: Sequence[Any]) -> list[str]:
    """`name=value` for each value, in letters that a folder may have, no two alike."""
    found: list[str] = []
    for number, value in enumerate(values):
        slug = f"{_slug(name)}={_slug(label(value))}"
        found.append(f"{slug}-{number}" if slug in found else slug)
    return found


def _run(
    spec: GridSpec, method: MethodSpec, point: Mapping[str, Any], seed: int, opened: Mapping[str, str]
) -> tuple[Run, list[str]]:
    """The resolved run of a cell. Raises ConfigError."""
    axes = Located({**point, "train.seed": seed}, {**spec.axes.origins, **method.axes.origins})
    run, notes = run_of([_DEFAULTS, spec.base, spec.overrides, method.layer, axes])
    adapter = with_names(run.adapter, opened) if any(is_file(kind) for kind in kinds_in(run.adapter)) else run.adapter
    try:
        validate_section(find_method(str(adapter["kind"])).settings, adapter, "adapter")
    except ConfigError as error:
        raise ConfigError(f"methods: {method.name}: {error}") from None
    train, bounded = run.train, spec.budget.bounds_steps
    if bounded and (train.max_steps is not None or train.epochs != 1.0):
        what = "train.epochs" if train.max_steps is None else "train.max_steps"
        raise ConfigError(f"{what}: the budget says how long every cell trains; take it out of the grid")
    for metric in (*run.evaluate.metrics, run.evaluate.best):
        find_metric(metric)
    if run.train.resume is not None:
        raise ConfigError("train.resume: a comparison goes on by itself; take it out of the grid")
    data = replace(run.data, train=spec.placed(run.data.train) or "", valid=spec.placed(run.data.valid))
    if len(spec.seeds) > 1 and data.valid_size and data.valid_seed is None:
        data = replace(data, valid_seed=spec.seeds[0])  # all seeds are measured on the same rows
    return replace(run, adapter=dict(adapter), data=data), notes


def _cell(spec: GridSpec, method: str, point: Mapping[str, Any], line: str, run: Run) -> Cell:
    rates = _rates(spec.search, run, point)
    budget = spec.budget if spec.search is None else spec.budget.part(1 - spec.search.share)
    measured = {"measure": asdict(spec.measure), "search": None if spec.search is None else asdict(spec.search)}
    identity = {**_identity(run, budget), **measured, "rates": rates}
    tail = f"_seed={run.train.seed}"
    slug = f"{line[: MOST_SLUG - len(tail)]}{tail}"
    return Cell("cell", slug, line, method, dict(point), run, budget, rates, identity)


def _identity(run: Run, budget: Budget | None) -> dict[str, Any]:
    """What a training depends on: neither its name nor where it reports to.

    Settings at their defaults are left out, so that a later version's new ones do not make other cells.
    """
    known = defaults(run)
    settings = {key: value for key, value in flat(run).items() if value != known.get(key, _NO_DEFAULT)}
    rate = run.train.learning_rate or find_method(str(run.adapter["kind"])).learning_rate
    return {"run": settings, "rate": rate, "budget": None if budget is None else asdict(budget)}


def flat(run: Run) -> dict[str, Any]:
    """A run's settings by dotted key; the adapter's mapping whole."""
    found: dict[str, Any] = {}
    for section, value in run.to_dict().items():
        whole = not isinstance(value, dict) or section == "adapter"
        found |= {section: value} if whole else {f"{section}.{key}": one for key, one in value.items()}
    return {key: value for key, value in found.items() if key.split(".")[0] not in ("name", "output_dir", "log")}


def defaults(run: Run) -> dict[str, Any]:
    """The settings' defaults by dotted key; those that have none are not there."""
    found: dict[str, Any] = {}
    for section in fields(run):
        value = getattr(run, section.name)
        described: Mapping[str, Any] = getattr(type(value), "__pydantic_fields__", {})
        for key, field in described.items():
            if field.default_factory is None and not field.is_required():
                plain = field.default
                found[f"{section.name}.{key}"] = list(plain) if isinstance(plain, tuple) else plain
    return found


_NO_DEFAULT = object()


def _rates(search: Search | None, run: Run, point: Mapping[str, Any]) -> tuple[float, ...]:
    """The rates to try: around the method's default, or the rate that the grid gives."""
    if search is None:
        return ()
    if any(key.rpartition(".")[2] == "learning_rate" for key in point):
        raise ConfigError("search: learning rates are an axis of the grid already; keep one of the two")
    if search.metric not in (*LOSS_METRICS, *run.evaluate.metrics):
        raise ConfigError(
            f"search.metric: {search.metric!r} is not measured during training; add it to base.evaluate.metrics"
        )
    centre = run.train.learning_rate or find_method(str(run.adapter["kind"])).learning_rate
    first = -((search.rates - 1) // 2)
    return tuple(float(f"{centre * search.factor**power:.3g}") for power in range(first, first + search.rates))


def _trial(leader: Cell, rate: float, search: Search, budget: Budget) -> Cell:
    """The leader's run at one rate, on its part of the budget."""
    run = replace(leader.run, train=replace(leader.run.train, learning_rate=rate))
    part = budget.part(search.share / len(leader.rates))
    of = leader.method if search.per == "method" else leader.line
    slug = f"trial_{_slug(of) if search.per == 'method' else of}"[: MOST_SLUG - 16] + f"_rate={rate:g}"
    return replace(leader, role="trial", slug=slug, run=run, budget=part, rates=(), identity=_identity(run, part))


def _bases(spec: GridSpec, cells: Sequence[Cell]) -> dict[str, Cell]:
    """For each line the untuned base: what a model answers depends on these settings alone."""
    made: dict[str, Cell] = {}
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.run.model.init == "random":
            continue
        of_base = (*_OF_BASE, *(_OF_ROWS if _uses_run_rows(spec) else ()))
        settings = {key: v for key, v in _identity(cell.run, None)["run"].items() if key.startswith(of_base)}
        identity = {"run": settings, "measure": asdict(spec.measure)}
        name = json.dumps(identity, sort_keys=True, default=list)
        if name not in made:
            point = {key: value for key, value in cell.point.items() if key.startswith(of_base)}
            parts = ["untuned", *(f"{_slug(key.rpartition('.')[2])}={_slug(label(v))}" for key, v in point.items())]
            told = "untuned base"
            if any(other.slug == "_".join(parts)[:MOST_SLUG] for other in made.values()):  # a method's own `set`
                parts.append(_slug(cell.method))
                told = f"{told} of {cell.method}"
            slug = "_".join(parts)[:MOST_SLUG]
            made[name] = Cell("base", slug, slug, told, point, cell.run, None, (), identity)
        found[cell.line] = made[name]
    return found


# What an untuned model's answers depend on, and which rows are the run's own.
_OF_BASE = ("model.", "quant.", "data.template", "data.cut", "data.schema", "data.instruction", "data.labels")
_OF_ROWS = ("data.train", "data.valid", "evaluate.rows")


def _uses_run_rows(spec: GridSpec) -> bool:
    """Is something measured on the run's own rows?"""
    return any(one.data is None for one in spec.measure.sets)
