"""ScienceQA as it is published: multiple-choice questions of school, some with an image, some with a hint (2209.09513).

    problems.json       {"1": {"question", "choices", "answer", "hint", "image", "grade", "subject", ...}, ...}
    pid_splits.json     {"train": ["1", ...], "val": [...], "test": [...]}
    captions.json       {"captions": {"1": "a map of ..."}}, optional: a caption stands in for the image
    images/SPLIT/ID/image.png, or SPLIT/ID/image.png, optional: without that folder there are no images

A question becomes a row of the multiple-choice schema: question, context (hint, then caption), options; the answer is
"The answer is (X)". Its strata are those of the published tables: NAT, SOC, LAN by subject; TXT with a hint, IMG with
an image, NO with neither (TXT and IMG may both hold); G1-6, G7-12 by grade.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.schemas import Row, find_schema, read_row
from tunesmith.errors import DataError, did_you_mean

PROBLEMS, SPLITS, CAPTIONS = "problems.json", "pid_splits.json", "captions.json"
STRATA = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = {f"grade{number}": "G1-6" if number <= 6 else "G7-12" for number in range(1, 13)}
MAX_BYTES = 1 << 30  # of a file


def is_scienceqa(folder: Path) -> bool:
    """Does this folder hold ScienceQA as it is published?"""
    return (folder / PROBLEMS).is_file() and (folder / SPLITS).is_file()


def splits_of(folder: Path) -> list[str]:
    """The names of its splits. Raises DataError."""
    return list(_object(Path(folder) / SPLITS))


def read_scienceqa(
    folder: Path, split: str = "train", *, captions: bool = False, limit: int | None = None
) -> list[Row]:
    """The questions of a split, in the order of pid_splits.json.

    `captions` puts the caption of each image behind the hint. `row.image` is the image's path where there is an images
    folder; `strata(row)` says which rows of the published table a question counts in. A row's source is "FILE:ID".
    Raises DataError naming file and question.
    """
    folder = Path(folder)
    problems, named = _object(folder / PROBLEMS), _object(folder / SPLITS)
    if split not in named:
        raise DataError(
            f"{folder / SPLITS}: has no split {split!r}{did_you_mean(split, named)}; has {', '.join(named)}"
        )
    said = _captions(folder) if captions else {}
    places = [place for place in (folder / "images", folder) if (place / split).is_dir()]
    rows = []
    for pid in islice(map(str, named[split]), limit):
        where = f"{folder / PROBLEMS}:{pid}"
        if not isinstance(problems.get(pid), dict):
            raise DataError(f"{where}: {SPLITS} names this question, and it is not there; download the files again")
        rows.append(_row(problems[pid], pid, where, said.get(pid, ""), places[0] / split if places else None))
    if not rows:
        raise DataError(f"{folder / SPLITS}: split {split!r} holds no question")
    return rows


def strata(row: Row) -> tuple[str, ...]:
    """The rows of the published table that a question counts in, in the order of STRATA."""
    return tuple(row.fields["strata"].split())


def _row(problem: Mapping[str, Any], pid: str, where: str, caption: str, images: Path | None) -> Row:
    hint = _text(problem, "hint", where)
    raw = {
        "question": problem.get("question"),
        "choices": problem.get("choices"),
        "answer": problem.get("answer"),
        "context": " ".join(part for part in (hint, caption.strip()) if part),
    }
    row = read_row(raw, where, find_schema("multiple-choice"))
    name = _text(problem, "image", where)
    subject, grade = _text(problem, "subject", where), _text(problem, "grade", where)
    if subject not in SUBJECTS or grade not in GRADES:
        raise DataError(f"{where}: subject {subject[:40]!r}, grade {grade[:40]!r}: not ScienceQA's; correct the file")
    kinds = {"TXT": bool(hint), "IMG": bool(name), "NO": not hint and not name}
    kinds |= {SUBJECTS[subject]: True, GRADES[grade]: True}
    image = images / pid / Path(name).name if images is not None and name else None
    fields = {**row.fields, "strata": " ".join(stratum for stratum in STRATA if kinds.get(stratum))}
    return replace(row, image=image, fields=fields)


def _captions(folder: Path) -> Mapping[str, str]:
    found = _object(folder / CAPTIONS)
    captions = found.get("captions", found)
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise DataError(f'{folder / CAPTIONS}: should hold {{"captions": {{ID: text}}}}; download it again')
    return captions


def _text(problem: Mapping[str, Any], key: str, where: str) -> str:
    """An optional text; null is none."""
    value = problem.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field {key!r} must be a string; correct the file")
    return (value or "").strip()


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DataError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size >> 20} MiB: not ScienceQA's file, which has 30")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; ScienceQA is {PROBLEMS}, {SPLITS} and, for captions, {CAPTIONS}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({str(error)[:80]}); download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: should hold an object by question; download it again")
    return found
