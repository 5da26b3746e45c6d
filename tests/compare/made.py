"""Cells' folders written by hand, so that what reads them can be tested without training anything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tunesmith.compare.grid import Cell, Grid, expand
from tunesmith.compare.read import folder_of
from tunesmith.compare.record import Failure, Measured, Result, write_failure, write_result
from tunesmith.config.grid_file import read_grid
from tunesmith.evaluate.outcomes import Outcomes

INPUTS = {"d": "0"}
BASE = "base: {model: m, data: d}\nbudget: {examples: 64}\n"


def grid_of(folder: Path, text: str, *overrides: str) -> Grid:
    """The grid of a YAML text."""
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return expand(read_grid(path, overrides))


def rights(share: float, count: int = 200, seed: int = 0) -> Outcomes:
    """Rows of which that share is right; the same rows are hard for all, as on real data."""
    hard = random.Random(seed).sample(range(count), count)
    values = [0.0] * count
    for row in hard[: round(share * count)]:
        values[row] = 1.0
    return Outcomes(tuple(values), (1.0,) * count)


def write_cell(
    cell: Cell,
    out: Path,
    outcomes: dict[str, Outcomes],
    *,
    parameters: int = 1000,
    speed: float = 1000.0,
    peak: float = 1.0,
    steps: int = 8,
    samples: tuple[dict[str, str], ...] = (),
    forgetting: tuple[str, ...] = (),
    lower: tuple[str, ...] = ("eval_loss",),
    valid: dict[str, float] | None = None,
    used: dict[str, Any] | None = None,
    whole: dict[str, float] | None = None,
) -> Path:
    """The folder of a finished cell: `steps` steps of 80 tokens at `speed` tokens a second.

    `whole`: figures that have no rows, lower being better.
    """
    folder = folder_of(cell, out, INPUTS)
    folder.mkdir(parents=True, exist_ok=True)
    if cell.role != "base":
        (folder / "config.yaml").write_text(cell.run.dump_yaml(), encoding="utf-8")
        (folder / "verify.json").write_text(json.dumps({"ok": True}), encoding="utf-8")
        lines = [
            {"step": i, "loss": 3.0 / i + 1 / parameters, "num_tokens": 80 * i, "tokens_per_second": speed,
             "peak_memory_gib": peak, **({"eval_loss": 2.0 / i} if i % 4 == 0 else {})}
            for i in range(1, steps + 1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    figures = {
        name: Measured(
            one.ratio,
            len(one.values),
            name not in lower,
            name.split(" ")[0] if " " in name else "",
            "rows",
            None,
            name in forgetting,
        )
        for name, one in outcomes.items()
    }
    figures |= {name: Measured(value, 1, False) for name, value in (whole or {}).items()}
    known = {"examples": 8 * steps, "rate": 1e-3, "parameters": parameters, "file_bytes": 4 * parameters}
    facts = {**known, "seconds": 12.5, "own_process": True, "step_seconds": 80 / speed, **(used or {})}
    key = cell.key(INPUTS)
    result = Result(key, cell.role, figures, {} if cell.role == "base" else facts, valid or {}, samples)
    write_result(folder, result, outcomes)
    return folder


def fail_cell(cell: Cell, out: Path, kind: str, why: str) -> Path:
    """The folder of a failed cell."""
    folder = folder_of(cell, out, INPUTS)
    write_failure(folder, cell.key(INPUTS), Failure(kind, why))
    return folder
