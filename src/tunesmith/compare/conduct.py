"""Carry out a grid: what is there already is not repeated, what was begun goes on, what fails stops nothing else.

    bases -> each cell: [its line's speed] -> [its search's trials, the best rate] -> the cell -> a line of the report

`carry_out` does one piece of work, in a process of its own by default (compare/child.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from tunesmith.compare.grid import Cell, Grid, speed_of
from tunesmith.compare.read import WAITING, Found, Lost, folder_of, read_cell
from tunesmith.compare.record import FAILED, Failure, write_failure
from tunesmith.errors import ConfigError
from tunesmith.evaluate.run import find_metric
from tunesmith.files import clean_leftovers

T = TypeVar("T")
Task = dict[str, Any]
LOCK = ".lock"


class Conductor:
    """Runs the cells of a grid into OUT, one after the other.

    `carry_out(task)` leaves a result or a failure in the task's folder. `say` takes lines for the user, `changed` is
    called whenever a cell is over. `again` tries failed cells once more.
    """

    def __init__(
        self,
        grid: Grid,
        out: Path,
        inputs: Mapping[str, str],
        carry_out: Callable[[Task], None],
        *,
        say: Callable[[str], None],
        changed: Callable[[], object] = lambda: None,
        again: bool = False,
        methods: tuple[str, ...] = (),
    ) -> None:
        self.grid, self.out, self.inputs, self.carry_out = grid, out, inputs, carry_out
        self.say, self.changed, self.again, self.methods = say, changed, again, methods
        self._tried: set[Path] = set()

    def run(self) -> None:
        """Work through the grid. Raises Interrupted, DiskError; whatever else happens to a cell is its own failure."""
        cells = list(self.grid.in_order())
        clean_leftovers(self.out / "cells")
        for number, cell in enumerate(cells, 1):
            began, known = time.perf_counter(), read_cell(cell, self.out, self.inputs)
            head = f"[{number}/{len(cells)}] {cell.slug}"
            if isinstance(known, Found):
                self.say(f"{head}: there already")
                continue
            found = self._settle(cell, known, head)
            seconds = time.perf_counter() - began
            self.say(f"{head}: {outcome(found)}" + (f" ({seconds:.0f} s)" if seconds >= 1 else ""))
            self.changed()

    def _settle(self, cell: Cell, known: Lost, head: str) -> Found | Lost:
        """The cell's result, after its speed and its rate are known."""
        if not self._to_do(known):
            return known
        try:
            speed = self._speed(cell, head)
            rate = self._rate(cell, head)
        except _CannotRunError as error:
            write_failure(known.folder, cell.key(self.inputs), Failure(WAITING, str(error)))
            return read_cell(cell, self.out, self.inputs)
        return self._carry_out(cell, speed, rate)

    def _to_do(self, known: Lost) -> bool:
        """A damaged folder stays as it is; a failed cell is tried again only where that is asked for."""
        if known.kind == "failed" and self.again and known.folder not in self._tried:
            (known.folder / FAILED).unlink(missing_ok=True)
            return True
        return known.kind in ("missing", "waiting")

    def _part(self, cell: Cell, head: str, speed: float | None) -> Found | Lost:
        """The result of a trial or of timed steps, made if need be."""
        known = read_cell(cell, self.out, self.inputs)
        if isinstance(known, Lost) and self._to_do(known):
            self.say(f"{head}: {cell.slug}")
            return self._carry_out(cell, speed, None)
        return known

    def _carry_out(self, cell: Cell, speed: float | None, rate: float | None) -> Found | Lost:
        folder = folder_of(cell, self.out, self.inputs)
        self._tried.add(folder)
        self.carry_out(self._task(cell, folder, speed, rate))
        found = read_cell(cell, self.out, self.inputs)
        if isinstance(found, Lost) and found.kind == "missing":
            write_failure(
                folder, cell.key(self.inputs), Failure("error", "it ended and left neither result nor reason")
            )
            return read_cell(cell, self.out, self.inputs)
        return found

    def _task(self, cell: Cell, folder: Path, speed: float | None, rate: float | None) -> Task:
        """All that carrying out a cell takes, as JSON has it."""
        spec = self.grid.spec
        return {
            "role": cell.role,
            "key": cell.key(self.inputs),
            "folder": str(folder),
            "run": cell.run.to_dict(),
            "budget": None if cell.budget is None else asdict(cell.budget),
            "speed": speed,
            "rate": rate,
            "measure": asdict(spec.measure),
            "keep": spec.keep,
            "methods": list(self.methods),
        }

    def _speed(self, cell: Cell, head: str) -> float | None:
        """Seconds an optimizer step of the cell's line, where the budget is in seconds."""
        if self.grid.spec.budget.seconds is None or cell.role == "base":
            return None
        found = self._part(speed_of(cell), head, None)
        if isinstance(found, Lost):
            raise _CannotRunError(f"its timed steps: {found.why}")
        return float(found.result.used["step_seconds"])

    def _rate(self, cell: Cell, head: str) -> float | None:
        """The rate whose trial did best on validation rows; None without a search."""
        best: tuple[float, float] | None = None
        why = []
        metric = self.grid.spec.search.metric if self.grid.spec.search else ""
        trials = [] if cell.role == "base" else self.grid.trials(cell)
        for trial in trials:
            found = self._part(trial, head, self._speed(trial, head))
            rate = trial.run.train.learning_rate or 0.0
            if isinstance(found, Lost):
                why.append(f"{rate:g} {found.why}")
                if found.kind == "damaged":
                    raise _CannotRunError(f"its search: {found.why}")
            elif metric not in found.result.valid:
                raise _CannotRunError(f"its search: {metric} was not measured; give held-out rows (data.valid_size)")
            else:
                value = found.result.valid[metric]
                value = value if find_metric(metric).higher_is_better else -value
                best = max(best or (value, rate), (value, rate), key=lambda one: (one[0], -one[1]))
        if trials and best is None:
            raise _CannotRunError(f"no rate of its search trained: {'; '.join(why)}")
        return None if best is None else best[1]


class _CannotRunError(Exception):
    """What a cell needs before it can run is not to be had."""


def outcome(found: Found | Lost) -> str:
    """A cell's first figure, or what became of it, as a few words."""
    if isinstance(found, Lost):
        return f"{found.kind}: {found.why}"
    figures = list(found.result.figures.items())
    return ", ".join(f"{name} {figure.value:.4g}" for name, figure in figures[:2]) or "done"


@contextmanager
def alone(out: Path) -> Any:
    """Hold OUT for this process. Raises ConfigError where another one works in it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{out}: another tunesmith compare is at work there; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
