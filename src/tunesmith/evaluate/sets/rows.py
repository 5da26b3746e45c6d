"""Rows of a published set: from one file, or from the file of a split in a folder such as a hub's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.sources import READERS, SPLITS, raw_rows
from tunesmith.errors import DataError, did_you_mean
from tunesmith.evaluate.choice import ChoiceSettings, Question, measure, with_examples
from tunesmith.evaluate.tasks import Task

MAX_FILES = 10_000  # of a folder
KINDS = {f".{kind.rpartition('.')[2]}" for kind in READERS}  # a name's last suffix
SEPARATORS = str.maketrans("-_.", "   ")

Raw = Mapping[str, Any]


def choice_task(
    name: str,
    about: str,
    row: Callable[[Raw, str], Question],
    *,
    split: str = "valid",
    examples: str = "train",
    within: str = "",
    describe: Callable[[str], str] = lambda group: "",
) -> Task:
    """A task of a set whose `row` makes a question of a row and its "file:line".

    `split` has the answers and `examples` the shots, of a folder; `within`: the part of a folder that holds several
    sets. `describe` says what comes before the questions of a group.
    """

    def read(path: Path, settings: ChoiceSettings) -> list[Question]:
        def questions(place: Path, part: str) -> list[Question]:
            return [row(raw, where) for where, raw in rows_of(place, part, within)]

        found = questions(path, settings.split or split)
        pool = questions(examples_of(path, settings), examples) if settings.shots else []
        return with_examples(found, pool, settings.shots, describe)

    return Task(name, about, ChoiceSettings, read, measure)


def examples_of(path: Path, settings: ChoiceSettings) -> Path:
    """Where the solved examples are: as the settings say, or the folder itself. Raises DataError."""
    if settings.shots_from is not None:
        return Path(settings.shots_from).expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: is one file, so examples must come from another; name it with shots_from")
    return path


def rows_of(path: Path, split: str, within: str = "") -> Iterator[tuple[str, Raw]]:
    """("file:line", row) of a file, or of the files of `split` below a folder. Raises DataError."""
    empty = True
    for file in files_of(path, split, within) if path.is_dir() else [path]:
        for line, raw in raw_rows(file):
            if not isinstance(raw, Mapping):
                raise DataError(f"{file}:{line}: a row must be an object with keys; correct or remove it")
            empty = False
            yield f"{file}:{line}", raw
    if empty:
        raise DataError(f"{path}: holds no row; give it data or name another file")


def files_of(folder: Path, split: str, within: str = "") -> list[Path]:
    """The file of `split` below a folder, or its shards, by the words of their names. Raises DataError."""
    names = set(SPLITS.get(split, (split,)))
    files = [p for p in islice(sorted(folder.rglob("*")), MAX_FILES) if p.suffix.lower() in KINDS and p.is_file()]
    if within:
        files = [p for p in files if any(part.startswith(within) for part in p.relative_to(folder).parts)]
    found = [p for p in files if names & set(p.name.lower().translate(SEPARATORS).split())]
    if not found:
        seen = ", ".join(str(p.relative_to(folder)) for p in files[:8]) or "none"
        raise DataError(f"{folder}: has no {split} file of {within or 'the set'} (files here: {seen}); name the file")
    if len(found) > 1 and not all("-of-" in p.name and p.parent == found[0].parent for p in found):
        listed = ", ".join(str(p.relative_to(folder)) for p in found[:4])
        raise DataError(f"{folder}: more than one {split} file ({listed}); name the one that is meant")
    return found


def text(raw: Raw, key: str, where: str) -> str:
    """A text of a row. Raises DataError."""
    value = raw.get(key)
    if not isinstance(value, str):
        keys = [str(k) for k in raw]
        near = did_you_mean(key, keys) if key not in keys else ""
        raise DataError(f"{where}: field {key!r} must be a string (keys here: {', '.join(keys[:8])}){near}")
    return value


def texts(raw: Raw, key: str, where: str) -> tuple[str, ...]:
    """A list of at least two texts. Raises DataError."""
    value = raw.get(key)
    if not isinstance(value, Sequence) or len(value) < 2 or not all(isinstance(one, str) for one in value):
        raise DataError(f"{where}: field {key!r} must be a list of two strings or more; correct or remove the row")
    return tuple(value)


def number(value: object, count: int, where: str, key: str, first: int = 0) -> int:
    """The option that a number means, counted from `first`, given as a number or as text. Raises DataError."""
    if value in (None, ""):
        raise DataError(f"{where}: has no {key!r}: a file without answers cannot be measured; take the validation file")
    try:
        found = int(value) - first if isinstance(value, int | str) and not isinstance(value, bool) else -1
    except ValueError:
        found = -1
    if not 0 <= found < count:
        raise DataError(
            f"{where}: field {key!r} is {str(value)[:40]!r}; it must be from {first} to {first + count - 1}"
        )
    return found
