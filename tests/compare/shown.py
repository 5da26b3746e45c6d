"""A whole report of cells that are written by hand, with everything that a report can show."""

from __future__ import annotations

from pathlib import Path

from tests.compare.made import INPUTS, fail_cell, grid_of, rights, write_cell

from tunesmith.compare.grid import Grid
from tunesmith.compare.publish import publish
from tunesmith.compare.table import Table
from tunesmith.evaluate.outcomes import Outcomes

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\n| a | [x](javascript:alert(3)) `*_&amp;"
TEXT = """
name: Sentiment, small
base: {model: m, data: d, train: {weight_decay: 0.1}}
methods:
  - {name: LoRA, kind: lora, axes: {rank: [1, 4, 16], dropout: [0.0, 0.1]}}
  - {name: prompt tuning, kind: prompt, axes: {virtual_tokens: [8, 25, 80]}}
  - {name: full, kind: full}
seeds: [0, 1]
budget: {examples: 64, memory: 4}
search: {rates: 3}
measure: {metrics: [accuracy, eval_loss], rows: 200, forgetting: [{name: general, data: g, metrics: [accuracy]}]}
"""


def losses(mean: float, count: int = 200) -> Outcomes:
    """A loss a row, around a mean."""
    return Outcomes(tuple(mean + (i % 7 - 3) / 10 for i in range(count)), (1.0,) * count)


def write_all(folder: Path, text: str = TEXT, said: str = "negative") -> tuple[Grid, Table]:
    """Cells of every kind in FOLDER/cells, and their report."""
    grid = grid_of(folder, text)
    lines = list(grid.lines)
    for cell in grid.cells:
        number = lines.index(cell.line)
        share = 0.6 + 0.02 * number + 0.01 * cell.run.train.seed
        outcomes = {"accuracy": rights(share), "eval_loss": losses(1 - number / 20), "general accuracy": rights(0.5)}
        if cell.method == "full" and cell.run.train.seed == 1:
            fail_cell(cell, folder, "diverged", f"the loss is nan {said}")
            continue
        samples = tuple(
            {"prompt": f"{q} {said}", "expected": "positive", "answer": said} for q in ("A joy.", "A bore.")
        )
        write_cell(
            cell,
            folder,
            outcomes,
            parameters=1000 * (number + 1) ** 3,
            speed=1500.0 - 100 * number,
            peak=0.5 + number / 10,
            steps=40,
            samples=samples,
            forgetting=("general accuracy",),
        )
    for cell in grid.bases.values():
        outcomes = {"accuracy": rights(0.5), "eval_loss": losses(2.0), "general accuracy": rights(0.55)}
        samples = ({"prompt": f"A joy. {said}", "expected": "positive", "answer": f"I cannot. {said}"},)
        write_cell(cell, folder, outcomes, samples=samples, forgetting=("general accuracy",))
    for cell in grid.cells:
        for trial in grid.trials(cell):
            write_cell(trial, folder, {}, valid={"eval_loss": 0.5 + trial.run.train.learning_rate})
    return grid, publish(grid, folder, INPUTS)
