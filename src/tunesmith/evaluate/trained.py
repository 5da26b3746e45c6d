"""Rows asked as a run was trained: among its labels, with its instruction, whatever of them a file happens to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.adapters.peft_format import adapter_folder
from tunesmith.config import DataSection, Run, load_run
from tunesmith.data.catalog import resolve_data
from tunesmith.data.schemas import Row, labels, with_instruction
from tunesmith.data.sources import read_splits


def trained_run(target: Path) -> Run | None:
    """The run at `target`, a run folder or the adapter in one; None where there is none. Raises ConfigError."""
    folders = (target,) if adapter_folder(target) is None else (target, target.parent)
    config = next((path for folder in folders if (path := folder / "config.yaml").is_file()), None)
    return None if config is None else load_run(config)[0]


def as_trained(section: DataSection) -> DataSection:
    """A run's `section` with the labels and the instruction that its training took from its data, where it names none.

    Unchanged where the data is not text and label. Raises DataError, CatalogError where the data cannot be read.
    """
    if section.labels and section.instruction is not None:
        return section
    path = resolve_data(section.train)
    rows = read_splits(path, schema=section.schema, limit=section.limit, instruction=section.instruction).train
    if rows[0].kind != "classification":
        return section
    return replace(section, labels=section.labels or labels(rows), instruction=rows[0].fields["instruction"])


def ask_as_trained(
    rows: Sequence[Row], section: DataSection, trained: DataSection
) -> tuple[list[Row], tuple[str, ...]]:
    """`rows` with the instruction of `trained` where `section` has none, and the labels that an answer is chosen among.

    These are `section`'s, else those of `trained`, else all that occur: give all rows of a file, not its first ones,
    which may hold one label only. None where no row has a label.
    """
    if section.instruction is None and trained.instruction is not None:
        rows = with_instruction(rows, trained.instruction)
    found = labels(rows)
    return list(rows), (section.labels or trained.labels or found) if found else ()


def unknown_labels(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows whose label is none of `names`: no answer to them can be right."""
    return [row for row in rows if row.label is not None and row.label not in names]
