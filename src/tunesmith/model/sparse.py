"""Sparse attention: patterns of who sees whom, and the tiles that compute just those pairs.

    local        i - j < window
    strided      (i - j) mod stride = 0, or i - j < window                      (arXiv:1904.10509, section 4.2)
    fixed        i div block = j div block, or j mod block >= block - columns   (ibid.)
    factorized   the first half of the heads local, the others strided          (ibid., section 5.2)
    s2           the first half of the heads sees its own group, i div group = j div group; the groups of the others
                 begin group / 2 earlier. Trained so, evaluated with full attention     (LongLoRA, arXiv:2309.12307)

Query i sees key j only if j <= i; positions count from the example's own token 0, a shared prefix included. LongLoRA's
published code shifts by rolling the sequence, so that the first tokens sit in one group with the last and see them: a
leak of the future. Here groups are cut where the sequence begins and ends.

A pattern is a *field* for all heads, or one for each half of the KV heads. A field is a union of disjoint *rules*, and
a rule is cut into tiles whose queries see intervals of their keys. Work and memory are those of the tiles; no array
of all pairs exists. Attention over several rules is merged by log-sum-exp (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, where

from tunesmith.config.attention import AttentionSettings
from tunesmith.errors import ModelError
from tunesmith.model.layout import Layout, Rule, Tile

# Queries of a tile: fewer make the products too small to be fast, more compute too much that is hidden.
LEAST_QUERIES, MOST_QUERIES = 32, 128


class _Cut:
    """What rules share: positions become rows, and a model's own sliding window hides what is farther."""

    def spans(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Queries in [first, last) and keys, as ascending positions; each query sees keys[low:high]."""
        raise NotImplementedError

    def tiles(self, rows: np.ndarray, before: int, window: int | None) -> Iterator[Tile]:
        """See `layout.Rule`."""
        for queries, keys, low, high in self.spans(before, len(rows)):
            if window is not None:
                low = np.maximum(low, np.searchsorted(keys, queries - window + 1))
            seeing = low < high
            if not seeing.all():
                queries, low, high = queries[seeing], low[seeing], high[seeing]
            if len(queries):
                lowest = low.min()
                visible = np.stack([low, high], axis=1) - lowest
                yield Tile(rows[queries], rows[keys[lowest : high.max()]], visible)


@dataclass(frozen=True)
class Window(_Cut):
    """The last `size` keys."""

    size: int

    def spans(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """See `_Cut`."""
        for begin, end in _pieces(first, last, self.size // 4):
            queries, lowest = np.arange(begin, end), max(0, begin - self.size + 1)
            low = np.maximum(queries - self.size + 1, 0) - lowest
            yield queries, np.arange(lowest, end), low, queries + 1 - lowest


@dataclass(frozen=True)
class Stride(_Cut):
    """Every `size`-th key back, from `skip` * `size` back on."""

    size: int
    skip: int = 0

    def spans(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """See `_Cut`. Tokens of one residue class are a causal sequence by themselves."""
        for lead in range(first, min(first + self.size, last)):
            earlier, residue = divmod(lead, self.size)
            count = -(-(last - lead) // self.size)
            for begin, end in _pieces(0, count):
                queries = lead + self.size * np.arange(begin, end)
                seen = earlier + 1 + np.arange(begin, end) - self.skip
                yield queries, residue + self.size * np.arange(earlier + end), np.zeros_like(seen), seen


@dataclass(frozen=True)
class Blocks(_Cut):
    """Keys of the query's own block of `size`, the first of which is `shift` shorter."""

    size: int
    shift: int = 0

    def spans(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """See `_Cut`."""
        for start in range((first + self.shift) // self.size * self.size - self.shift, last, self.size):
            lowest = max(start, 0)
            for begin, end in _pieces(max(first, start), min(last, start + self.size)):
                queries = np.arange(begin, end)
                yield queries, np.arange(lowest, end), np.zeros_like(queries), queries + 1 - lowest


@dataclass(frozen=True)
class Columns(_Cut):
    """The last `count` keys of every block of `size` before the query's own."""

    size: int
    count: int

    def spans(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """See `_Cut`."""
        for begin, end in _pieces(max(first, self.size), last):
            queries = np.arange(begin, end)
            ends = self.size * np.arange(1, (end - 1) // self.size + 1)
            keys = (ends[:, None] + np.arange(-self.count, 0)).flatten()
            yield queries, keys, np.zeros_like(queries), queries // self.size * self.count


def _pieces(first: int, last: int, most: int = MOST_QUERIES) -> Iterator[tuple[int, int]]:
    """Cut [first, last) into pieces of at most `most`, within what a tile should have."""
    step = min(max(most, LEAST_QUERIES), MOST_QUERIES)
    for begin in range(first, last, step):
        yield begin, min(begin + step, last)


class Field(Protocol):
    """Who sees whom in one group of heads: `rules` is how it is computed, `sees` its definition."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Disjoint rules whose union this is."""

    def sees(self, i: Any, j: Any) -> Any:
        """Does the query at position i see the key at position j <= i? For tensors that broadcast."""


@dataclass(frozen=True)
class Local:
    """i - j < window."""

    window: int

    @property
    def rules(self) -> tuple[Rule, ...]:
        """See `Field`."""
        return (Window(self.window),)

    def sees(self, i: Any, j: Any) -> Any:
        """See `Field`."""
        return i - j < self.window


@dataclass(frozen=True)
class Strided:
    """(i - j) mod stride = 0, or i - j < window."""

    stride: int
    window: int = 0

    @property
    def rules(self) -> tuple[Rule, ...]:
        """See `Field`."""
        if not self.window:
            return (Stride(self.stride),)
        return (Window(self.window), Stride(self.stride, -(-self.window // self.stride)))

    def sees(self, i: Any, j: Any) -> Any:
        """See `Field`."""
        return ((i - j) % self.stride == 0) | (i - j < self.window)


@dataclass(frozen=True)
class Fixed:
    """i div block = j div block, or j mod block >= block - columns; `shift` moves the blocks' ends to the left."""

    block: int
    columns: int = 0
    shift: int = 0

    @property
    def rules(self) -> tuple[Rule, ...]:
        """See `Field`."""
        own = Blocks(self.block, self.shift)
        return (own, Columns(self.block, self.columns)) if self.columns else (own,)

    def sees(self, i: Any, j: Any) -> Any:
        """See `Field`."""
        own = (i + self.shift) // self.block == (j + self.shift) // self.block
        return own | (j % self.block >= self.block - self.columns)


FIELDS: dict[str, Callable[[Any], tuple[Field, ...]]] = {
    "local": lambda s: (Local(s.window),),
    "strided": lambda s: (Strided(s.stride, s.window or 0),),
    "fixed": lambda s: (Fixed(s.block, s.columns or 1),),
    "factorized": lambda s: (Local(s.window or s.stride), Strided(s.stride)),
    "s2": lambda s: (Fixed(s.group), Fixed(s.group, shift=s.group // 2)),
}
TRAINING_ONLY = {"s2"}


@dataclass(frozen=True)
class Pattern:
    """Sparse attention as a model holds it: one field for all heads, or one for each half of the KV heads."""

    name: str
    fields: tuple[Field, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def training_only(self) -> bool:
        """Is the model evaluated with full attention?"""
        return self.name in TRAINING_ONLY

    def split(self, kv_heads: int) -> list[tuple[int, int, Field]]:
        """The fields with the KV heads, from and up to, that have them: the first half is the larger one."""
        middle = -(-kv_heads // len(self.fields))
        return [(i * middle, min((i + 1) * middle, kv_heads), part) for i, part in enumerate(self.fields)]

    def sees(self, head: Any, kv_heads: int, i: Any, j: Any) -> Any:
        """Does query i of KV head `head` see key j <= i? For tensors that broadcast."""
        found = [part.sees(i, j) for part in self.fields]
        return found[0] if len(found) == 1 else where(head < self.split(kv_heads)[0][1], *found)

    def prepare(self, layout: Layout, windows: Iterable[int | None]) -> None:
        """Cut all tiles that attention over `layout` will need, so that a compiled block finds them."""
        for window in windows:
            for part in self.fields:
                for rule in part.rules:
                    layout.tiles(window, rule)

    def pairs(self, length: int) -> list[int]:
        """(query, key) pairs that the tiles of one sequence hold, for each field."""
        layout = Layout.single(length)
        tiles = [[layout.tiles(None, rule) for rule in part.rules] for part in self.fields]
        return [sum(count_pairs(part) for part in parts) for parts in tiles]


def count_pairs(tiles: tuple[Tensor, ...]) -> int:
    """Pairs that the queries of a layout's tiles see."""
    real = [(queries >= 0, visible) for queries, visible in zip(tiles[::3], tiles[2::3], strict=True)]
    return sum(int((visible[..., 1] - visible[..., 0])[there].sum()) for there, visible in real)


def count_products(tiles: tuple[Tensor, ...]) -> int:
    """Scores that are computed for these tiles, hidden and padded ones included."""
    batches = zip(tiles[::3], tiles[1::3], strict=True)
    return sum(queries.numel() * keys.shape[1] for queries, keys in batches)


def evaluated(pattern: Pattern | None) -> Pattern | None:
    """The pattern that a model evaluates with."""
    return None if pattern is None or pattern.training_only else pattern


def said(pattern: Pattern | None) -> str:
    """A pattern in words."""
    if pattern is None:
        return "full"
    return ", ".join([pattern.name, *(f"{key} {value}" for key, value in pattern.settings.items() if key != "pattern")])


def pattern_of(settings: AttentionSettings | None, kv_heads: int | None = None) -> Pattern | None:
    """The pattern that `settings` describe; None is full attention.

    Raises ModelError where a model has too few KV heads for it.
    """
    if settings is None or settings.pattern == "full":
        return None
    fields = FIELDS[settings.pattern](settings)
    if kv_heads is not None and kv_heads < len(fields):
        raise ModelError(
            f"model.attention: {settings.pattern} needs two KV heads, one for each half, and this model has "
            f"{kv_heads}; use local, strided or fixed"
        )
    return Pattern(settings.pattern, fields, settings.to_dict())
