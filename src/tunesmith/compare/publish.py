"""Write a grid's report: report.html, report.md, report.csv and cells.csv, from the cells' folders alone.

The same folders give the same bytes: no clock and no chance is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunesmith.compare.grid import Grid
from tunesmith.compare.page import page
from tunesmith.compare.table import Table, tabulate
from tunesmith.compare.text import cells_csv, lines_csv, markdown
from tunesmith.files import atomic_write_text

REPORT = "report.html"


def publish(grid: Grid, out: Path, inputs: Mapping[str, str]) -> Table:
    """Read OUT/cells and write the report beside them. Raises DiskError."""
    table = tabulate(grid, out, inputs)
    atomic_write_text(out / "report.md", markdown(table))
    atomic_write_text(out / "report.csv", lines_csv(table))
    atomic_write_text(out / "cells.csv", cells_csv(table))
    atomic_write_text(out / REPORT, page(table))
    return table
