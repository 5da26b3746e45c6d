"""Rows in files, folders and zip archives, and what each kind of file holds, told by the keys of its first row.

| kind      | keys of a row                                        | who publishes it              |
|-----------|------------------------------------------------------|-------------------------------|
| ratings   | question_id, answer1_id, answer2_id, score           | Vicuna, QLoRA                 |
| votes     | model_1 and model_2 (or model_a and model_b), ...    | this command, Chatbot Arena   |
| answers   | question_id, text or choices or generation           | Vicuna, MT-bench, QLoRA       |

Names of files say what an archive's author called a system; they are never believed on who is answer 1.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tunesmith.data.sources import MAX_LINE, raw_rows
from tunesmith.errors import DataError

MAX_MEMBER = 1 << 30  # bytes of one file of an archive, unpacked
Rows = list[tuple[int, dict[str, Any]]]  # (line, row)


@dataclass(frozen=True)
class Found:
    """One file of rows: `where` names it in messages, `stem` is its name without folder and ending."""

    where: str
    stem: str
    rows: Rows


RATING_KEYS = {"answer1_id", "answer2_id", "score"}
PAIRS = (("model_1", "model_2"), ("model_a", "model_b"))
ANSWER_KEYS = ("choices", "generation", "turns", "answer")


def kind_of(row: dict[str, Any]) -> str | None:
    """`ratings`, `votes` or `answers`; None for anything else, such as questions and prompts."""
    if row.keys() >= RATING_KEYS:
        return "ratings"
    if any(a in row and b in row for a, b in PAIRS):
        return "votes"
    said = any(key in row for key in ANSWER_KEYS) or ("text" in row and ("answer_id" in row or "model_id" in row))
    questions = "turns" in row and "model_id" not in row and "choices" not in row
    return "answers" if "question_id" in row and said and not questions else None


def collect(path: Path) -> Iterator[tuple[str | None, Found]]:
    """(kind, file) of what is at `path`: a file of rows, a zip archive, or all .jsonl and .zip files of a folder.

    Raises DataError for what is not there or cannot be read.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jsonl", ".zip") and p.is_file())
        if not files:
            raise DataError(f"{path}: holds no .jsonl and no .zip file; name the files themselves")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder")
    for file in files:
        for found in _archive(file) if file.suffix.lower() == ".zip" else [_file(file)]:
            yield (kind_of(found.rows[0][1]) if found.rows else None), found


def _file(path: Path) -> Found:
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".json", ".csv", ".parquet"):
        raise DataError(f"{path}: unknown kind of file; give .jsonl, .json, .csv, .parquet or .zip")
    return Found(str(path), path.stem, [(line, _object(raw, f"{path}:{line}")) for line, raw in raw_rows(path)])


def _archive(path: Path) -> Iterator[Found]:
    """The .jsonl files of a zip archive; nothing of it is written anywhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if member.is_dir() or not member.filename.lower().endswith(".jsonl"):
                    continue
                where = f"{path}:{member.filename}"
                if member.file_size > MAX_MEMBER:
                    raise DataError(f"{where}: {member.file_size >> 20} MiB when unpacked; unpack it yourself")
                with archive.open(member) as file:
                    yield Found(where, Path(member.filename).stem, _lines(file, where))
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: is not a readable zip archive ({error}); copy or download it again") from None


def _lines(file: IO[bytes], where: str) -> Rows:
    rows: Rows = []
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            raise DataError(f"{where}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
        if raw.strip():
            rows.append((number, _object(_parse(raw, f"{where}:{number}"), f"{where}:{number}")))
    return rows


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        raise DataError(f"{where}: is not JSON; correct or remove the line") from None


def _object(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: should be an object with keys; correct or remove the line")
    return raw


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A field that must be a text (or an id that is a number). Raises DataError naming file and line."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {key!r} should be a text, not {str(value)[:40]!r}; correct or remove the line")
    return value


def numbers_of(value: object, where: str) -> tuple[float, float]:
    """Two scores. Raises DataError where they are none."""
    if isinstance(value, list | tuple) and len(value) == 2:
        try:
            first, second = (float(part) for part in value)
        except (TypeError, ValueError):
            first = second = float("nan")
        if abs(first) < float("inf") and abs(second) < float("inf"):
            return first, second
    raise DataError(f"{where}: should be two scores, not {str(value)[:40]!r}; correct or remove the line")


def sort_out(paths: Sequence[Path], note: Callable[[str], None]) -> dict[str, list[Found]]:
    """The files at `paths` by kind; what is neither judgments nor answers is left out, and `note` says so."""
    kinds: dict[str, list[Found]] = {"ratings": [], "votes": [], "answers": []}
    for path in paths:
        passed = 0
        for kind, found in collect(path):
            if kind is not None:
                kinds[kind].append(found)
            elif path.is_file() and path.suffix.lower() != ".zip":
                keys = ", ".join(list(found.rows[0][1])[:8]) if found.rows else "no rows"
                raise DataError(f"{path}: holds neither judgments nor answers (found: {keys})")
            else:
                passed += 1
        if passed:
            note(f"{path}: left out {passed} .jsonl files that hold neither judgments nor answers")
    return kinds
