"""Folders of labelled images: an image's label is the name of the folder that it lies in.

    FOLDER/CLASS/1.png   or   FOLDER/train/CLASS/1.png, FOLDER/valid/CLASS/7.png (or validation, val, dev), .../test/

A row is one of the classification schema without a text: it asks "Classify the image as ... or ...", or what
`data.instruction` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from tunesmith.data.schemas import Row, Turn
from tunesmith.errors import DataError

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))


def is_image_folder(folder: Path, splits: Mapping[str, Sequence[str]]) -> bool:
    """Does it hold folders of images, by class, or by split and class, and no file of rows?"""
    rows = (path.name.split(".")[0].split("-")[0].lower() for path in folder.iterdir() if path.is_file())
    if any(name in splits["train"] for name in rows):
        return False
    return any(_images(place) for place in _class_folders(folder, splits)[0].get("train", []))


def read_image_folder(
    folder: Path, splits: Mapping[str, Sequence[str]], limit: int | None = None
) -> dict[str, list[Row]]:
    """The rows of each split: the first image of every class, then the second ones; a row's source is its file.

    `splits`: the names that the folder of a split may have. `limit` takes the first rows of each. Raises DataError.
    """
    found, doubled = _class_folders(folder, splits)
    if doubled:
        raise DataError(f"{folder}: holds both {doubled[0]} and {doubled[1]}, the same split; keep one")
    rows = {split: list(islice(_in_turns(places), limit)) for split, places in found.items()}
    names = {place.name for place in found.get("train", [])}
    for split, places in found.items():
        if strange := sorted({place.name for place in places if _images(place)} - names):
            raise DataError(f"{folder}: {split} has a class {strange[0]!r} that train has not; correct the folders")
    return rows


def _class_folders(
    folder: Path, splits: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[Path]], tuple[str, str] | None]:
    """The folders of classes of each split; and two folders that are the same split, if there are."""
    inside = _folders(folder)
    named = {split: [place for place in inside if place.name.lower() in names] for split, names in splits.items()}
    doubled = next(((a.name, b.name) for a, b, *_ in (p for p in named.values() if len(p) > 1)), None)
    found = {split: _folders(places[0]) for split, places in named.items() if places}
    return (found if "train" in found else {"train": inside}), doubled


def _folders(place: Path) -> list[Path]:
    """Those in it that are not hidden, by name."""
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(place: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in islice(place.iterdir(), 1000))


def _in_turns(places: Sequence[Path]) -> Iterator[Row]:
    """One row of each class after the other, as long as it has some."""
    for together in zip_longest(*map(_rows, places)):
        yield from (row for row in together if row is not None)


def _rows(place: Path) -> Iterator[Row]:
    label = place.name
    fields = {"text": "", "label": label, "input": "", "output": label, "instruction": "", "prompt": ""}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            turns = (Turn("user", ""), Turn("assistant", label, True))
            yield Row(str(path), "classification", turns, label, (), fields, path)
