"""Read what cells left: a finished one with its curves and costs, a failed one, a damaged one, or none yet.

A damaged folder is named with what is wrong in it; nothing of it is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.compare.grid import Cell, Grid, speed_of
from tunesmith.compare.record import Failure, Result, read_object, read_outcomes, read_result
from tunesmith.errors import DamagedRun
from tunesmith.evaluate.outcomes import Outcomes
from tunesmith.files import damage
from tunesmith.train.log import read_metrics

CELLS = "cells"
WAITING = "not run"  # a failure that is another cell's
FOLDER_HASH = 8  # letters of a cell's key that its folder's name ends with


@dataclass(frozen=True)
class Costs:
    """What training a cell took. `seconds` are those of its optimizer steps, however often it was interrupted."""

    steps: int
    examples: int
    tokens: int
    seconds: float
    peak_gib: float
    rate: float
    parameters: int
    file_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of training rows a second of optimizer steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, eq=False)
class Found:
    """A finished cell. `costs` is None for the untuned base; curves are (step, value)."""

    cell: Cell
    folder: Path
    result: Result
    outcomes: Mapping[str, Outcomes]
    costs: Costs | None
    loss: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class Lost:
    """A cell without a result: `kind` is failed, waiting, damaged or missing, `why` a line for a person.

    A waiting cell needs another one that failed: its search, its timed steps.
    """

    cell: Cell
    folder: Path
    kind: str
    why: str


def folder_of(cell: Cell, out: Path, inputs: Mapping[str, str]) -> Path:
    """Where the cell runs: OUT/cells/NAME-HASH. Changed settings or data have a folder of their own."""
    return out / CELLS / f"{cell.slug}-{cell.key(inputs)[:FOLDER_HASH]}"


def read_cell(cell: Cell, out: Path, inputs: Mapping[str, str]) -> Found | Lost:
    """What there is of a cell."""
    folder = folder_of(cell, out, inputs)
    try:
        result = read_result(folder, cell.key(inputs))
        if isinstance(result, Failure):
            kind = "waiting" if result.kind == WAITING else "failed"
            return Lost(cell, folder, kind, f"{result.kind}: {result.error}")
        if result is None:
            return Lost(cell, folder, "missing", "not run yet" if not folder.exists() else "begun, and not finished")
        return _found(cell, folder, result)
    except DamagedRun as error:
        return Lost(cell, folder, "damaged", f"{error}; remove {folder} and run the command again")


def strangers(grid: Grid, out: Path, inputs: Mapping[str, str]) -> list[str]:
    """Names of finished folders in OUT/cells that are none of the grid's: of other settings, or of other data."""
    own = {folder_of(cell, out, inputs).name for cell in _all(grid)}
    there = (out / CELLS).iterdir() if (out / CELLS).is_dir() else ()
    return sorted(path.name for path in there if path.is_dir() and path.name[:1] != "." and path.name not in own)


def _all(grid: Grid) -> list[Cell]:
    trials = [trial for cell in grid.cells for trial in grid.trials(cell)]
    trained = [*grid.cells, *trials]
    speeds = [speed_of(cell) for cell in trained] if grid.spec.budget.seconds is not None else []
    return [*trained, *speeds, *grid.bases.values()]


def _found(cell: Cell, folder: Path, result: Result) -> Found:
    outcomes = read_outcomes(folder)
    for name, one in outcomes.items():
        figure = result.figures.get(name)
        if figure is None or not math.isclose(one.ratio, figure.value, rel_tol=1e-5, abs_tol=1e-7):
            raise DamagedRun(f"outcomes.json: the rows of {name} do not make its figure")
    if cell.role == "base":
        return Found(cell, folder, result, outcomes, None, (), ())
    if (folder / "adapter").is_dir() and (wrong := damage(folder / "adapter", hashes=False)):
        raise DamagedRun(f"adapter: {wrong}")
    verified = read_object(folder / "verify.json")
    if verified.get("ok") is not True:
        raise DamagedRun("verify.json: what was saved is not what was trained")
    lines = read_metrics(folder / "metrics.jsonl")
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)) or not lines:
        raise DamagedRun("metrics.jsonl: steps are missing or double")
    return Found(cell, folder, result, outcomes, _costs(lines, result), *(_curve(lines, k) for k in _CURVES))


_CURVES = ("loss", "eval_loss")


def _costs(lines: Sequence[Mapping[str, Any]], result: Result) -> Costs:
    try:
        totals = [int(line["num_tokens"]) for line in lines]
        parts = [after - before for before, after in zip([0, *totals], totals, strict=False)]
        seconds = math.fsum(t / float(line["tokens_per_second"]) for t, line in zip(parts, lines, strict=True) if t)
        used = result.used
        return Costs(
            steps=len(lines),
            examples=int(used["examples"]),
            tokens=totals[-1],
            seconds=seconds,
            peak_gib=max(float(line["peak_memory_gib"]) for line in lines),
            rate=float(used["rate"]),
            parameters=int(used["parameters"]),
            file_bytes=int(used["file_bytes"]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise DamagedRun("metrics.jsonl: numbers are missing") from None


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
