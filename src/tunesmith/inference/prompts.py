"""Prompts from a file: a line each, or rows of any of the data schemas, whose answers may be missing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.data.schemas import (
    Row,
    Turn,
    chat_row,
    default_instruction,
    labels,
    read_row,
    recognise,
    with_instruction,
)
from tunesmith.data.sources import READERS
from tunesmith.errors import DataError, did_you_mean

# A row that only asks: the key that tells its schema, and a stand-in for the answer, which no prompt shows.
ANSWERS: dict[tuple[str, ...], dict[str, Any]] = {
    ("instruction", "context"): {"response": "-"},
    ("instruction", "response"): {"response": "-", "context": ""},
    ("instruction",): {"output": "-"},
    ("prompt",): {"completion": "-"},
    ("question",): {"answer": 0},
}


def read_prompts(path: Path, *, system: str | None = None, instruction: str | None = None) -> list[Row]:
    """Rows to answer, each with its source "file:line".

    .jsonl, .json, .csv and .parquet hold rows of any schema of the training data: an answer that is there is what the
    model is asked for, not shown to it; {"prompt"}, {"instruction", "input"}, {"messages"} that end with the user,
    {"text"} and plain JSON strings ask as they are. Any other file is text, a prompt a line. `instruction` is put
    before classification texts (by default one that lists the file's labels), `system` before rows without a system
    text. Raises DataError.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(path.name, beside)}")
    try:
        rows = [_row(raw, f"{path}:{line}") for line, raw in _numbered(path)]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy or download it again") from None
    if not rows:
        raise DataError(f"{path}: holds no prompt; write one a line")
    names = labels(rows)
    if names or instruction:
        rows = with_instruction(rows, instruction or default_instruction(names))
    return [_with_system(row, system) for row in rows] if system else rows


def prompt_row(text: str, *, system: str | None = None, source: str = "prompt") -> Row:
    """One question as a row that waits for its answer. Raises DataError for an empty text."""
    messages = [{"role": "system", "content": system}] if system else []
    return chat_row([*messages, {"role": "user", "content": text}], source)


def _numbered(path: Path) -> Iterator[tuple[int, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    kind = "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])
    if kind in READERS and not kind.startswith(".txt"):
        yield from READERS[kind](path)
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    yield from ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _row(raw: object, source: str) -> Row:
    if isinstance(raw, str):
        return prompt_row(raw, source=source)
    if isinstance(raw, Mapping):
        messages = raw.get("messages")
        if isinstance(messages, list) and messages and _role(messages[-1]) == "user":
            return chat_row(messages, source)
        if "text" in raw and not any(key in raw for key in ("label", *(keys[0] for keys in ANSWERS))):
            return prompt_row(_text(raw["text"], source), source=source)
        answer = next((answer for keys, answer in ANSWERS.items() if all(key in raw for key in keys)), {})
        raw = {**answer, **{key: value for key, value in raw.items() if key not in answer or value not in (None, "")}}
    return read_row(raw, source, recognise(raw, source))


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _text(value: object, source: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{source}: field 'text' must be a string; correct or remove the row")
    return value


def _with_system(row: Row, system: str) -> Row:
    if row.turns[0].role == "system":
        return row
    return replace(row, turns=(Turn("system", system), *row.turns), fields={**row.fields, "system": system})
