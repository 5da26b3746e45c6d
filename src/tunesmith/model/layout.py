"""Who sees whom: segments of one flat row, and the tiles of work that attention over them needs.

A row holds segments end to end. A segment sees itself causally and all of its ancestors whole, so a prefix that several
examples share stands in the row once:

    row       [ preamble | question 1 | question 2 | question 2, answer a | question 2, answer b ]
    parents      -1           0            0                  2                       2

Positions count from the root ancestor's first token, so every example is numbered as if it stood alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from tunesmith.model.sight import Picture


class Cut(NamedTuple):
    """How large tiles are: long segments skip the half of the pairs that causality forbids."""

    queries: int  # of a tile
    scores: int  # of one batch of tiles, per head
    padding: float  # and how many times those that are not padding


BATCHED = Cut(256, 1 << 20, 1.5)  # batched products hold all scores of a batch at once, and compute padding too
NATIVE = Cut(512, 1 << 22, 2.0)  # native kernels hold a few rows of them, and gather each tile's keys


@dataclass(frozen=True)
class Tile:
    """Queries `query` of one segment against the keys `keys` that at least one of them may see (row indices).

    Query i sees its tile's keys from visible[i, 0] up to visible[i, 1].
    """

    query: np.ndarray
    keys: np.ndarray
    visible: np.ndarray


class Rule(Protocol):
    """A set of (query, key) pairs that tiles can express; hashable. See model/sparse.py."""

    def tiles(self, rows: np.ndarray, before: int, window: int | None) -> Iterator[Tile]:
        """Cut the queries from position `before` on; `rows` are the row indices of all positions, from 0 on."""


@dataclass(frozen=True)
class Layout:
    """Segments of a flat row: `starts`, `lengths` and `parents` (-1: a root; a parent comes before its children).

    `answer_ends`, (tokens,): how far before an answer's first token a token stands (1: the prompt's last), 0 where that
    is farther than the caller counted, -1 in an answer; None where nobody counted. `pictures`, one a segment: the image
    that belongs to its example, or None; empty where there is none at all.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    answer_ends: np.ndarray | None = field(default=None, compare=False)
    pictures: tuple[Picture | None, ...] = field(default=(), compare=False)
    _tiles: dict[tuple[int | None, Rule | None, Cut], tuple[Tensor, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        parents: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        answer_ends: np.ndarray | None = None,
        pictures: Sequence[Picture | None] = (),
    ) -> Layout:
        """Lay segments of `lengths` tokens end to end. Raises ModelError where a parent does not come first."""
        parents = [-1] * len(lengths) if parents is None else parents
        if len(parents) != len(lengths) or any(not -1 <= p < i for i, p in enumerate(parents)):
            raise ModelError(f"layout: parents {tuple(parents)} must each name an earlier segment, or -1")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, int)
        if answer_ends is not None and len(answer_ends) != sum(lengths):
            raise ModelError(f"layout: {len(answer_ends)} answer_ends for {sum(lengths)} tokens; give one a token")
        if pictures and len(pictures) != len(lengths):
            raise ModelError(f"layout: {len(pictures)} pictures for {len(lengths)} segments; give one a segment")
        places, sizes, above = (tuple(map(int, each)) for each in (starts, lengths, parents))
        seen = tuple(pictures) if any(picture is not None for picture in pictures) else ()
        return cls(places, sizes, above, torch.device(device), answer_ends, seen)

    @classmethod
    def single(cls, length: int, device: torch.device | str = "cpu") -> Layout:
        """One plain causal sequence."""
        return cls.of([length], device=device)

    def behind(self, chains: Sequence[Sequence[int]], choice: Sequence[int]) -> Layout:
        """The same segments behind new ones: root segment i follows chain `choice[i]` of segments of these lengths.

        The new segments stand at the beginning of the row, chain after chain; a chain's second follows its first.
        `choice` has an entry for each segment; those of segments that have a parent are not looked at.
        """
        lengths: list[int] = []
        parents: list[int] = []
        last: list[int] = []  # of each chain
        for chain in chains:
            end = -1
            for length in chain:
                parents.append(end)
                end = len(lengths)
                lengths.append(length)
            last.append(end)
        shift = len(lengths)
        parents += [last[c] if p < 0 else p + shift for p, c in zip(self.parents, choice, strict=True)]
        ends = self.answer_ends
        if ends is not None:
            ends = np.concatenate([np.zeros(sum(lengths), ends.dtype), ends])
        return Layout.of([*lengths, *self.lengths], parents, self.device, ends)

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The position of each segment's first token: the summed lengths of its ancestors."""
        result: list[int] = []
        for parent in self.parents:
            result.append(0 if parent < 0 else result[parent] + self.lengths[parent])
        return tuple(result)

    @cached_property
    def position_array(self) -> np.ndarray:
        """Every token's position, (tokens,), int64."""
        if not self.lengths:
            return np.zeros(0, np.int64)
        return np.concatenate([np.arange(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True)])

    @cached_property
    def positions(self) -> Tensor:
        """Every token's position, (tokens,), on the layout's device."""
        return torch.from_numpy(self.position_array).to(self.device)

    @cached_property
    def to_answer(self) -> Tensor | None:
        """`answer_ends` on the layout's device."""
        return None if self.answer_ends is None else torch.from_numpy(self.answer_ends).to(self.device)

    def ancestors(self, segment: int) -> list[int]:
        """The segment's ancestors, root first."""
        chain: list[int] = []
        while (segment := self.parents[segment]) >= 0:
            chain.append(segment)
        return chain[::-1]

    def rows_of(self, segment: int) -> np.ndarray:
        """Row indices of everything the segment's last token sees: its ancestors, then itself."""
        return np.concatenate(
            [np.arange(self.starts[s], self.starts[s] + self.lengths[s]) for s in (*self.ancestors(segment), segment)]
        )

    @cached_property
    def visibility(self) -> Tensor:
        """(tokens, 3): position, and the interval of segment numbers (own, end of own descendants) in depth-first
        order.

        Token k is seen by token q iff position[k] <= position[q] and own[k] <= own[q] < end[k].
        """
        children: list[list[int]] = [[] for _ in self.lengths]
        order: list[int] = []
        stack = [i for i, parent in enumerate(self.parents) if parent < 0][::-1]
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent].append(i)
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(children[node][::-1])
        own = np.zeros(len(order), np.int64)
        own[order] = np.arange(len(order))
        end = own + 1
        for i in reversed(range(len(order))):  # a parent comes before its children, so the ends below are final
            if self.parents[i] >= 0:
                end[self.parents[i]] = max(end[self.parents[i]], end[i])
        per_token = [np.repeat(a, self.lengths) for a in (own, end)]
        return torch.from_numpy(np.stack([self.position_array, *per_token], axis=1)).to(self.device)

    def mask(self, window: int | None = None) -> Tensor:
        """The dense (tokens, tokens) truth: may token q (row) see token k (column)? For tests and small rows."""
        position, own, end = self.visibility.unbind(1)
        seen = (position[None] <= position[:, None]) & (own[None] <= own[:, None]) & (own[:, None] < end[None])
        return seen if window is None else seen & (position[:, None] - position[None] < window)

    def tiles(self, window: int | None = None, rule: Rule | None = None, cut: Cut = BATCHED) -> tuple[Tensor, ...]:
        """Attention's work as a flat tuple (queries, keys, visible) of batches of tiles, made once a layout.

        `queries` (batch, n) and `keys` (batch, m) are row indices, keys in the order of their positions; query i of
        tile b sees its tile's keys from visible[b, i, 0] up to visible[b, i, 1], (batch, n, 2). A padded query is -1
        and sees one key (its result is dropped); padded keys are 0 and seen by none. With a `rule`, only its pairs.
        """
        if (window, rule, cut) not in self._tiles:
            groups = _batched(list(self._cut(window, rule, cut)), cut)
            batches = [batch for group in groups for batch in _padded(group)]
            self._tiles[window, rule, cut] = tuple(t.to(self.device) for t in batches)
        return self._tiles[window, rule, cut]

    def _cut(self, window: int | None, rule: Rule | None, cut: Cut) -> Iterator[Tile]:
        """Cut every segment's queries into blocks, each with only the keys that some of its queries may see."""
        for segment, length in enumerate(self.lengths):
            seen = self.rows_of(segment)
            before = len(seen) - length
            yield from _causal(seen, before, window, cut) if rule is None else rule.tiles(seen, before, window)


def _causal(rows: np.ndarray, before: int, window: int | None, cut: Cut) -> Iterator[Tile]:
    """All earlier keys, or the last `window`."""
    for first in range(before, len(rows), cut.queries):
        last = min(first + cut.queries, len(rows))
        lowest = 0 if window is None else max(0, first - window + 1)
        ends = np.arange(first, last) + 1 - lowest
        begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        yield Tile(rows[first:last], rows[lowest:last], np.stack([begins, ends], axis=1))


def _padded(group: list[Tile]) -> Iterator[Tensor]:
    """Pad the tiles of one batch to a common shape."""
    n, m = max(len(t.query) for t in group), max(len(t.keys) for t in group)
    queries = np.full((len(group), n), -1)
    keys = np.zeros((len(group), m), np.int64)
    visible = np.zeros((len(group), n, 2), np.int64)
    visible[:, :, 1] = 1
    for i, tile in enumerate(group):
        size = len(tile.query)
        queries[i, :size], keys[i, : len(tile.keys)], visible[i, :size] = tile.query, tile.keys, tile.visible
    yield from (torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(visible))


def _batched(tiles: list[Tile], cut: Cut) -> Iterator[list[Tile]]:
    """Group tiles of similar size, so that little of a batched product is padding."""
    group: list[Tile] = []
    n = m = true = 0
    for tile in sorted(tiles, key=lambda t: (len(t.keys), len(t.query)), reverse=True):
        n, m = max(n, len(tile.query)), max(m, len(tile.keys))
        true += len(tile.query) * len(tile.keys)
        padded = (len(group) + 1) * n * m
        if group and (padded > cut.scores or padded > cut.padding * true + 4096):
            yield group
            group, n, m = [], len(tile.query), len(tile.keys)
            true = n * m
        group.append(tile)
    if group:
        yield group
