"""Rows to token ids, and to which of them are targets.

Each stretch of a row between two boundaries of supervision is encoded once, in one call, so a prompt gets the ids that
`apply_chat_template` gives; the boundary itself is never merged over. Only where a text contains what looks like a
special token is a stretch encoded in pieces, so that no text can become a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.data.chat import special_pattern
from tunesmith.data.report import DataReport, Tally, content
from tunesmith.data.schemas import Row
from tunesmith.data.segments import Answers, Segment, Template
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.model.sight import Picture
    from tunesmith.tokenizer import Tokenizer

__all__ = [
    "CUTS",
    "Cut",
    "DataReport",
    "EncodedSet",
    "Encoder",
    "Example",
    "Prompt",
    "encode_prompt",
    "encode_row",
    "encode_rows",
]

Cut = Literal["answer-end", "prompt-start", "drop"]
CUTS: tuple[Cut, ...] = ("answer-end", "prompt-start", "drop")


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row: `ids` int32[n], `supervised` bool[n] (token i is a target), its source, whether it was cut, and
    its image.
    """

    ids: np.ndarray
    supervised: np.ndarray
    source: str
    cut: bool = False
    picture: Picture | None = None


class Prompt(list[int]):
    """Token ids to be answered, and the image that they are asked about."""

    def __init__(self, ids: Iterable[int], picture: Picture | None = None) -> None:
        super().__init__(ids)
        self.picture = picture


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded rows in the order of the file, and what was found on the way."""

    examples: tuple[Example, ...]
    report: DataReport


def encode_prompt(row: Row, template: Template, tokenizer: Tokenizer) -> Prompt:
    """Return the ids of everything before the row's last answer, BOS included where the model expects it."""
    return Prompt(Encoder(tokenizer).run(template.prompt(row))[0], picture_of(row))


def picture_of(what: Row | Sequence[int]) -> Picture | None:
    """The opened image of a row (see vision/open.py), or of a prompt; None where there is none."""
    found = what.image if isinstance(what, Row) else getattr(what, "picture", None)
    return None if isinstance(found, (Path, bytes)) else found


def encode_row(
    row: Row,
    template: Template,
    tokenizer: Tokenizer,
    *,
    cutoff: int,
    train_on_inputs: bool = False,
    answers: Answers = "all",
    cut: Cut = "answer-end",
) -> Example:
    """Encode one row to at most `cutoff` tokens.

    Unsupervised tokens after the last target (a newline after the end of turn) are left out: nothing is learned from
    them. Raises DataError for a row over the cutoff when `cut` is "drop".
    """
    encoder = Encoder(tokenizer)
    example, _ = encoder.example(row, template, cutoff, train_on_inputs, answers, cut)
    if example is None:
        raise DataError(
            f"{row.source}: longer than data.cutoff={cutoff} tokens; raise it, or choose data.cut=answer-end"
        )
    return example


def encode_rows(
    rows: Iterable[Row],
    template: Template,
    tokenizer: Tokenizer,
    *,
    cutoff: int,
    train_on_inputs: bool = False,
    answers: Answers = "all",
    cut: Cut = "answer-end",
    against: EncodedSet | None = None,
) -> EncodedSet:
    """Encode rows and count what was found; `against` is the set (training) with which shared rows are counted.

    Raises DataError when there is no row, or when no row has a supervised token.
    """
    encoder = Encoder(tokenizer)
    seen = {content(example) for example in against.examples} if against else set()
    tally = Tally(template, tokenizer, cutoff, seen)
    examples: list[Example] = []
    for row in rows:
        example, lost = encoder.example(row, template, cutoff, train_on_inputs, answers, cut)
        tally.add(row, example, lost)
        if example is not None:
            examples.append(example)
    report = tally.report()
    if not report.rows:
        raise DataError("no data row to encode; check the file, data.limit and data.cut")
    if not report.supervised:
        raise DataError(
            f"none of {report.rows} rows has a supervised token: all answers lie beyond data.cutoff={cutoff} tokens or "
            'are marked "loss": false; raise data.cutoff, or set data.cut=prompt-start'
        )
    return EncodedSet(tuple(examples), report)


class Encoder:
    """Encodes the segments of many rows; keeps what they share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        self._tokens = tokenizer.special_tokens
        self._special_ids = frozenset(self._tokens.values())
        self._bos = tokenizer.bos_id
        self._short: dict[tuple[str, bool], list[int]] = {}

    def example(
        self, row: Row, template: Template, cutoff: int, train_on_inputs: bool, answers: Answers, cut: Cut
    ) -> tuple[Example | None, int]:
        """Return the row's Example (None: dropped as too long) and how many targets the cutoff took from it."""
        if cutoff < 2 or cut not in CUTS:
            raise DataError(f"data.cutoff={cutoff}, data.cut={cut!r}: cutoff must be at least 2, cut one of {CUTS}")
        segments = template.segments(row, answers=answers)
        ids, flags = self.run(segments)
        supervised = np.array(flags, dtype=np.bool_)
        tokens = np.array(ids, dtype=np.int32)
        if train_on_inputs:
            supervised[:] = tokens != self._bos if self._bos is not None else True
        if len(supervised):
            supervised[0] = False  # nothing comes before it that could predict it
        end = int(np.flatnonzero(supervised)[-1]) + 1 if supervised.any() else len(tokens)
        tokens, supervised = tokens[:end], supervised[:end]
        if end <= cutoff:
            return Example(tokens, supervised, row.source, picture=picture_of(row)), 0
        if cut == "drop":
            return None, int(supervised.sum())
        kept = self._kept(segments, tokens, supervised, cutoff, cut)
        lost = int(supervised.sum() - supervised[kept].sum())
        return Example(tokens[kept], supervised[kept], row.source, True, picture_of(row)), lost

    def run(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Return ids and which of them are targets; BOS comes first where the model expects it and none is there."""
        ids: list[int] = []
        flags: list[bool] = []
        start = True  # the next text begins a sequence: no earlier text that it continues
        for supervised, group in groupby(segments, key=self._stretch):
            for piece in self._pieces(list(group), start):
                ids += piece
                flags += [supervised[0]] * len(piece)
            start = bool(ids) and ids[-1] == self._bos
        if self._tokenizer.add_bos and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids], [False, *flags]
        return ids, flags

    def _stretch(self, segment: Segment) -> tuple[bool, str]:
        """Neighbours with equal keys are encoded together; a special token that is a whole segment stands alone."""
        alone = segment.special and segment.text in self._tokens
        return segment.supervised, segment.text if alone else ""

    def _pieces(self, stretch: list[Segment], start: bool) -> Iterator[list[int]]:
        """Ids of segments alike in supervision: of all their text at once, unless a text holds a special token."""
        text = "".join(segment.text for segment in stretch)
        if len(stretch) == 1 and stretch[0].special and text in self._tokens:
            yield [self._tokens[text]]
            return
        trusted = self._count_trusted(stretch, text)
        if trusted is not None:
            whole = self._encode(text, True, not start)
            if sum(i in self._special_ids for i in whole) == trusted:
                yield whole
                return
        for k, segment in enumerate(stretch):
            yield self._encode(segment.text, segment.special, not start or k > 0)

    def _count_trusted(self, stretch: list[Segment], text: str) -> int | None:
        """How many special tokens the template's own text holds; None when one touches a text that is not its own."""
        found = [match.span() for match in self._special.finditer(text)]
        at = 0
        for segment in stretch:
            end = at + len(segment.text)
            if not segment.special and any(a < end and b > at for a, b in found):
                return None
            at = end
        return len(found)

    def _encode(self, text: str, special: bool, continuation: bool) -> list[int]:
        if len(text) > 32:
            return self._tokenizer.encode(text, special=special, continuation=continuation)
        key = (f"{int(continuation)}{text}", special)  # labels and short template texts come back in every row
        if key not in self._short:
            if len(self._short) > 10_000:
                self._short.clear()
            self._short[key] = self._tokenizer.encode(text, special=special, continuation=continuation)
        return self._short[key]

    def _kept(
        self, segments: Sequence[Segment], ids: np.ndarray, supervised: np.ndarray, cutoff: int, cut: Cut
    ) -> np.ndarray:
        """Positions kept under `cut`: from the left of the prompt after its preamble, then from the answer's end."""
        positions = np.arange(len(ids))
        if cut == "answer-end" or not supervised.any():
            return positions[:cutoff]
        preamble = self.run(segments[:1])[0] if segments[0].special else ids[:1].tolist()
        head = 0
        while head < len(preamble) and preamble[head] == ids[head]:
            head += 1
        first = int(np.flatnonzero(supervised)[0])
        head = min(head, first, cutoff // 2)
        removed = min(len(ids) - cutoff, first - head)
        return np.delete(positions, slice(head, head + removed))[:cutoff]
