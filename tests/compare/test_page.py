"""docs/compare.md: its grid expands, and its tables have every key that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.compare.made import grid_of

from tunesmith.config.grid import Budget, MeasuredSet, Search
from tunesmith.config.grid_file import _Top
from tunesmith.config.validate import field_names

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def keys(heading: str) -> set[str]:
    """What stands between back ticks in the first column of a section's table."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {word for cell in first for word in re.findall(r"`(\w+)`", cell)}


def test_its_grid_has_the_cells_that_it_says(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    grid = grid_of(tmp_path, text)
    assert len(grid.cells) == (1 + 4 + 1) * 2 * 2 * 2 * 3
    assert len({t.key({}) for cell in grid.cells for t in grid.trials(cell)}) == 3 * 3


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("A grid", set(field_names(_Top)) - {"name"}),
        ("The budget is equal and said", set(field_names(Budget))),
        ("Learning rates", set(field_names(Search))),
        (
            "What is measured",
            {*field_names(MeasuredSet), "tasks", "forgetting", "samples"} - {"name", "task", "settings"},
        ),
    ],
)
def test_its_tables_have_every_key(heading, known):
    assert keys(heading) == known


def test_its_counts_are_those_of_the_grids():
    from tests.compare.test_examples import CELLS

    listed = dict(re.findall(r"^\| \[([\w-]+)\.yaml\]\([^)]*\) \| (\d+) \|", PAGE, re.M))
    assert {name: int(count) for name, count in listed.items()} == {k: v for k, v in CELLS.items() if k != "quick"}
