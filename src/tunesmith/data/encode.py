"""Rows to token ids, and to which of them are targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row: `ids` int32[n], `supervised` bool[n] (token i is a target), its `source` and whether it was `cut`."""

    ids: np.ndarray
    supervised: np.ndarray
    source: str
    cut: bool = False


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found while encoding; counts are of rows unless they say tokens."""

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


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded rows in the order of the file, and what was found on the way."""

    examples: tuple[Example, ...]
    report: DataReport
