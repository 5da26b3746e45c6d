"""A task: a published set, how its rows are read, and what is measured on them.

A file that holds one ends with

    TASK = Task("hellaswag", "endings of everyday scenes", Settings, read, measure)

and stands in the table of evaluate/suite.py. `Settings` is a frozen pydantic dataclass (`extra="forbid"`) whose fields
have defaults; a user sets them as hellaswag.shots=5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.data.sources import raw_rows
from tunesmith.errors import DataError
from tunesmith.evaluate.figures import Figure
from tunesmith.evaluate.subject import Subject

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a task found.

    `figures` by name, the main one first. `stated`: how it was measured, such as window or shots, as plain values.
    `each`: of some figures, the value of every item in order, which paired tests need. `samples`: a record of every
    item, for whoever wants to read them; may be empty. `notes`: what is suspicious about them, a line each.
    """

    figures: Mapping[str, Figure]
    stated: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Task:
    """`read(path, settings)` gives the items of a file or folder; raises DataError with file and line.

    `measure(subject, items, settings)` takes at least one item; `subject` has a model, its tokenizer, template, acting
    adapters and budget, and no rows. `about` is one line for lists.
    """

    name: str
    about: str
    settings: type
    read: Callable[[Path, Any], Sequence[Any]]
    measure: Callable[[Subject, Sequence[Any], Any], Result]


def read_items(path: Path, item: Callable[[Any, str], T]) -> list[T]:
    """`item(raw row, "file:line")` of each row of a published file (.jsonl, .jsonl.gz, .parquet, ...).

    Raises DataError with file and line, and for a file without any.
    """
    items = [item(raw, f"{path}:{line}") for line, raw in raw_rows(path)]
    if not items:
        raise DataError(f"{path}: holds no problem; give it data or name another file")
    return items
