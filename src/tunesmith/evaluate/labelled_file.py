"""A file of labels that a killed process leaves in a state to go on from: every row in it exactly once, in order.

Beside OUT lies OUT.progress.json: what the labels come from (hashes and settings), how many rows are done, and the
length and SHA-256 of OUT then. It is written after each chunk, once that is on the disk; what OUT holds beyond it was
cut off in the middle and is taken away before going on. Where OUT or anything that it comes from has changed, going on
is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.texts import TextRow
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.labelling import Labelled
from tunesmith.files import append_line, atomic_write_json

OWN = ("text", "label", "probability")
FORMATS = (".jsonl", ".csv")


@dataclass
class Progress:
    """What OUT holds: `rows` of the input are done, it is `bytes` long then, with this `sha256`; counts of them."""

    source: dict[str, Any]
    rows: int = 0
    bytes: int = 0
    sha256: str = ""
    cut: int = 0
    left_out: int = 0
    probability: float = 0.0  # summed over the rows that were written
    labels: dict[str, int] = field(default_factory=dict)


class LabelledFile:
    """OUT, begun or gone on with.

    `source` says what the labels come from, `keys` what the input's rows hold beside the text. Raises ConfigError for
    another ending than .jsonl and .csv, DataError where OUT cannot be gone on with.
    """

    def __init__(self, path: Path, source: dict[str, Any], keys: Sequence[str]) -> None:
        check_format(path)
        self.path, self.keys = path, tuple(keys)
        self._digest = hashlib.sha256()
        self._sidecar = path.with_name(f"{path.name}.progress.json")
        self.progress = self._found(source) if self._sidecar.is_file() else self._begun(source)
        if path.suffix == ".csv" and not self.progress.bytes:
            self._append([_csv([*OWN, *map(_name, self.keys)])])

    def add(self, rows: Sequence[TextRow], found: Sequence[Labelled], min_probability: float) -> None:
        """Append what was found of the next rows; labels below `min_probability` are left out. Raises DiskError."""
        progress, lines = self.progress, []
        for (text, others), one in zip(rows, found, strict=True):
            progress.cut += one.cut
            if one.probability < min_probability:
                progress.left_out += 1
                continue
            progress.labels[one.label] = progress.labels.get(one.label, 0) + 1
            progress.probability += one.probability
            lines.append(self._line(text, others, one))
        progress.rows += len(rows)
        self._append(lines)

    def _begun(self, source: dict[str, Any]) -> Progress:
        if self.path.exists():
            raise DataError(
                f"{self.path}: is there already, and {self._sidecar.name} is not; remove it, or choose another --out"
            )
        self.progress = Progress(source)
        self._append([])  # from now on OUT is known to be ours
        return self.progress

    def _found(self, source: dict[str, Any]) -> Progress:
        again = f"remove {self.path.name} and {self._sidecar.name}, or choose another --out"
        try:
            progress = Progress(**json.loads(self._sidecar.read_text(encoding="utf-8")))
            was, left = dict(progress.source), int(progress.bytes)
        except (OSError, ValueError, TypeError, RecursionError):
            raise DataError(f"{self._sidecar}: cannot be read; {again}") from None
        changed = [key for key in {**source, **was} if source.get(key) != was.get(key)]
        if changed:
            raise DataError(f"{self.path}: was begun with another {', '.join(changed)}; {again}")
        if self.path.is_file():
            with self.path.open("rb") as file:
                while left and (data := file.read(min(left, 1 << 20))):
                    self._digest.update(data)
                    left -= len(data)
        if left or self._digest.hexdigest() != progress.sha256:
            raise DataError(f"{self.path}: is not what was written; {again}")
        if self.path.is_file() and self.path.stat().st_size > progress.bytes:
            os.truncate(self.path, progress.bytes)
        return progress

    def _append(self, lines: Sequence[str]) -> None:
        """Lines first, and on the disk; then the word that they are there."""
        if lines:
            text = "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair
            append_line(self.path, text)
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            data = f"{text}\n".encode()
            self._digest.update(data)
            self.progress.bytes += len(data)
        self.progress.sha256 = self._digest.hexdigest()
        atomic_write_json(self._sidecar, asdict(self.progress))

    def _line(self, text: str, others: Mapping[str, Any], found: Labelled) -> str:
        own = (text, found.label, round(found.probability, 6))
        if self.path.suffix == ".csv":
            return _csv([*own, *(_cell(others.get(key)) for key in self.keys)])
        row = {**dict(zip(OWN, own, strict=True)), **{_name(key): value for key, value in others.items()}}
        return json.dumps(row, ensure_ascii=False, default=str)


def check_format(path: Path) -> None:
    """Raise ConfigError for a file that is neither .jsonl nor .csv."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--out {path}: should end with {' or '.join(FORMATS)}")


def _name(key: str) -> str:
    """A key of the input's rows; one that is called like ours gets `given_` before it."""
    return f"given_{key}" if key in OWN else key


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _csv(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # with these in it a cell is quoted
    return buffer.getvalue().removesuffix("\r\n")
