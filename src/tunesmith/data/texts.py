"""A file of texts to be labelled, of any size: read row by row, checked whole before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.sources import raw_rows, text_lines
from tunesmith.errors import DataError

MOST_KEYS = 1_000

TextRow = tuple[str, dict[str, Any]]  # the text, and the row's other keys


@dataclass(frozen=True)
class Texts:
    """How many rows a file has, and all keys that they have beside the text, in the order met."""

    path: Path
    column: str
    rows: int
    keys: tuple[str, ...]

    def read(self, start: int = 0) -> Iterator[TextRow]:
        """The rows from number `start` on."""
        return islice(_texts(self.path, self.column), start, None)


def scan_texts(path: Path, column: str = "text") -> Texts:
    """Read a file once, so that a wrong row is named before any is used. Raises DataError."""
    rows = 0
    keys: dict[str, None] = {}
    for _, others in _texts(path, column):
        rows += 1
        keys |= dict.fromkeys(others)
        if len(keys) > MOST_KEYS:
            raise DataError(f"{path}: its rows have more than {MOST_KEYS:,} different keys; bring them to one schema")
    if not rows:
        raise DataError(f"{path}: holds no text; give it rows")
    return Texts(path, column, rows, tuple(keys))


def _texts(path: Path, column: str) -> Iterator[TextRow]:
    """A text a line of .txt; elsewhere a JSON string, or the `column` of a row."""
    if path.name.lower().endswith((".txt", ".txt.gz")):
        yield from ((line, {}) for _, line in text_lines(path) if line.strip())
        return
    for line, row in raw_rows(path):
        where = f"{path}:{line}"
        text = row.get(column) if isinstance(row, Mapping) else row
        if not isinstance(text, str) or not text.strip():
            keys = f" (keys here: {', '.join(map(str, list(row)[:8]))})" if isinstance(row, Mapping) else ""
            raise DataError(f"{where}: has no text in {column!r}{keys}; correct the row, or name another --column")
        if not _is_unicode(text):
            raise DataError(f"{where}: field {column!r} holds half of a surrogate pair, which is no text; correct it")
        others = {str(key): value for key, value in row.items() if key != column} if isinstance(row, Mapping) else {}
        yield text, others


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
