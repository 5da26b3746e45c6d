"""What a long command has finished, one JSON line each, so that it goes on where it was killed.

{"key": what was asked for, whole, "record": what came of it}

A finished piece of work counts for exactly the key it was done under: other settings, rows or sizes are other work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.files import append_line, atomic_write_text

Record = dict[str, Any]


class Ledger:
    """The lines of one file; `fresh` forgets those that are there. A line that a kill has torn is dropped."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() and not fresh else ""
        whole = [line for line in text.splitlines() if _parsed(line) is not None]
        for line in map(_parsed, whole):
            if line is not None:
                self._records[_name(line["key"])] = line["record"]
        atomic_write_text(path, "".join(f"{line}\n" for line in whole))

    def find(self, key: Mapping[str, Any]) -> Record | None:
        """What came of this work, if it was finished; an error is not: it is tried again."""
        record = self._records.get(_name(key))
        return None if record is None or record.get("error") else record

    def error(self, key: Mapping[str, Any]) -> str | None:
        """Why this work failed when it was last tried; None where it did not."""
        return self._records.get(_name(key), {}).get("error")

    def add(self, key: Mapping[str, Any], record: Record) -> None:
        """Write a line."""
        self._records[_name(key)] = record
        append_line(self.path, json.dumps({"key": dict(key), "record": record}, allow_nan=False))


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"key", "record"} <= found.keys() else None
