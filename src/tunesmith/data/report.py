"""What was found in the data while it was encoded: counts shown before training starts, each with its cure."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunesmith.data.schemas import Row
from tunesmith.data.segments import Template

if TYPE_CHECKING:
    from tunesmith.model.sight import Picture
    from tunesmith.tokenizer import Tokenizer


class _Encoded(Protocol):
    """The parts of an Example that are counted."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def supervised(self) -> np.ndarray: ...
    @property
    def source(self) -> str: ...
    @property
    def cut(self) -> bool: ...
    @property
    def picture(self) -> Picture | None: ...


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of rows, unless they say tokens.

    `rows` were kept, `dropped` were over the cutoff under data.cut=drop; `tokens` and `supervised` count tokens; `cut`
    rows lost tokens to the cutoff, `cut_in_answer` lost targets; `no_supervised` have no target left; `no_eos` have
    targets but the last one is not an end of turn; `double_bos` have two BOS in a row; `duplicates` repeat an earlier
    row; `shared` also occur in the set compared with; `longest` is in tokens, after cutting; `examples` names one row
    of each count.
    """

    schema: str
    template: str
    cutoff: int
    rows: int
    dropped: int
    tokens: int
    supervised: int
    cut: int
    cut_in_answer: int
    no_supervised: int
    no_eos: int
    double_bos: int
    duplicates: int
    shared: int
    longest: int
    longest_source: str
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def share(self) -> float:
        """Supervised tokens over all tokens, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def table(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in the order they are shown."""
        return [
            ("schema", self.schema),
            ("template", self.template),
            ("rows", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,} (longest row {self.longest:,}: {self.longest_source})"),
            ("supervised tokens", f"{self.supervised:,} ({self.share:.1%})"),
            ("rows cut", f"{self.cut:,} (in the answer {self.cut_in_answer:,}; cutoff {self.cutoff:,} tokens)"),
            ("rows dropped", f"{self.dropped:,}"),
            ("rows without a target", f"{self.no_supervised:,}"),
            ("rows without EOS", f"{self.no_eos:,}"),
            ("rows with two BOS", f"{self.double_bos:,}"),
            ("duplicate rows", f"{self.duplicates:,}"),
            ("rows shared with train", f"{self.shared:,}"),
        ]

    def lines(self) -> list[str]:
        """Return the table as aligned lines of plain text."""
        pairs = self.table()
        width = max(len(name) for name, _ in pairs)
        return [f"{name:<{width}}  {value}" for name, value in pairs]

    def problems(self) -> list[str]:
        """Return a line for each thing that is wrong with the data, with an example and the cure."""
        named = dict(self.examples)
        texts = {
            "cut_in_answer": "end inside the answer, so the model learns to stop short or never; raise data.cutoff, "
            "or set data.cut=prompt-start or drop",
            "no_supervised": "have no supervised token and teach nothing; raise data.cutoff or remove them",
            "no_eos": "have no supervised EOS, so the model may never stop; raise data.cutoff, or use a template "
            "that ends answers with an end-of-turn token",
            "double_bos": "begin with two BOS tokens; take the BOS out of the template or the text",
            "shared": "also occur in the training set, so their score says little; remove them from one of the two",
            "dropped": "were longer than data.cutoff and are left out; raise data.cutoff to keep them",
        }
        total = self.rows + self.dropped
        found = [(getattr(self, key), key, text) for key, text in texts.items()]
        lines = [f"{n:,} of {total:,} rows {text} (such as {named.get(key, '?')})" for n, key, text in found if n]
        if self.duplicates > 0.01 * self.rows:
            lines.append(
                f"{self.duplicates:,} of {total:,} rows repeat an earlier row (such as {named['duplicates']}); "
                "remove them"
            )
        return lines


class Tally:
    """Counts rows as they are encoded."""

    def __init__(self, template: Template, tokenizer: Tokenizer, cutoff: int, against: Set[bytes]) -> None:
        self._template = template.name
        self._cutoff = cutoff
        self._against = against
        self._bos = tokenizer.bos_id
        stops = {tokenizer.special_tokens.get(text) for text in template.stop}
        self._ends = {*tokenizer.eos_ids, *stops} - {None}
        self._seen: set[bytes] = set()
        self._kinds: dict[str, None] = {}
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._longest = (0, "")

    def add(self, row: Row, example: _Encoded | None, lost: int) -> None:
        """Count one row: its Example (None where it was dropped) and the targets that the cutoff took."""
        self._kinds[row.kind] = None
        if example is None:
            self._count("dropped", row.source)
            return
        ids = example.ids
        targets = int(example.supervised.sum())
        raw = content(example)
        found = {
            "cut": example.cut,
            "cut_in_answer": lost > 0,
            "no_supervised": targets == 0,
            "no_eos": targets > 0 and int(ids[np.flatnonzero(example.supervised)[-1]]) not in self._ends,
            "double_bos": self._bos is not None and bool(np.any((ids[1:] == self._bos) & (ids[:-1] == self._bos))),
            "duplicates": _digest(raw) in self._seen,
            "shared": raw in self._against,
        }
        for name, is_so in found.items():
            if is_so:
                self._count(name, row.source)
        self._seen.add(_digest(raw))
        for name, n in (("rows", 1), ("tokens", len(ids)), ("supervised", targets)):
            self._counts[name] = self._counts.get(name, 0) + n
        if len(ids) > self._longest[0]:
            self._longest = (len(ids), row.source)

    def report(self) -> DataReport:
        """Return the counts so far."""
        names = ("rows", "dropped", "tokens", "supervised", "cut", "cut_in_answer", "no_supervised", "no_eos")
        counts = {name: self._counts.get(name, 0) for name in (*names, "double_bos", "duplicates", "shared")}
        return DataReport(
            schema=", ".join(self._kinds),
            template=self._template,
            cutoff=self._cutoff,
            longest=self._longest[0],
            longest_source=self._longest[1],
            examples=tuple(self._first.items()),
            **counts,
        )

    def _count(self, name: str, source: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._first.setdefault(name, source)


def content(example: _Encoded) -> bytes:
    """What makes a row another one: its tokens, and its image."""
    return example.ids.tobytes() + (b"" if example.picture is None else example.picture.key.encode())


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()
