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

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError

QUERY_BLOCK = 256  # queries of a tile: long segments skip the half of the pairs that causality forbids
TILE_ELEMENTS = 1 << 20  # scores of one batched product (per head): keeps the work set inside the processor's cache


@dataclass(frozen=True)
class Tile:
    """Queries `query` of one segment against the keys `keys` that at least one of them may see (row indices)."""

    query: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Segments of a flat row: `starts`, `lengths` and `parents` (-1: a root; a parent comes before its children)."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    _tiles: dict[int | None, tuple[Tensor, ...]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        parents: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Layout:
        """Lay segments of `lengths` tokens end to end. Raises ModelError where a parent does not come first."""
        parents = [-1] * len(lengths) if parents is None else parents
        if len(parents) != len(lengths) or any(not -1 <= p < i for i, p in enumerate(parents)):
            raise ModelError(f"layout: parents {tuple(parents)} must each name an earlier segment, or -1")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, int)
        return cls(
            tuple(int(s) for s in starts), tuple(map(int, lengths)), tuple(map(int, parents)), torch.device(device)
        )

    @classmethod
    def single(cls, length: int, device: torch.device | str = "cpu") -> Layout:
        """One plain causal sequence."""
        return cls.of([length], device=device)

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

    def tiles(self, window: int | None = None) -> tuple[Tensor, ...]:
        """Attention's work as a flat tuple (queries, keys, visible) of batches of tiles, made once a layout.

        `queries` (batch, n) and `keys` (batch, m) are row indices, keys in the order of their positions; query i of
        tile b sees its tile's keys from visible[b, i, 0] up to visible[b, i, 1], (batch, n, 2). A padded query is -1
        and sees one key (its result is dropped); padded keys are 0 and seen by none.
        """
        if window not in self._tiles:
            batches = [b for group in _batched(list(self._cut(window))) for b in self._padded(group, window)]
            self._tiles[window] = tuple(t.to(self.device) for t in batches)
        return self._tiles[window]

    def _cut(self, window: int | None) -> Iterator[Tile]:
        """Cut every segment's queries into blocks, each with only the keys that some of its queries may see."""
        for segment, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            seen = self.rows_of(segment)
            before = len(seen) - length
            for first in range(0, length, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, length)
                lowest = 0 if window is None else max(0, before + first - window + 1)
                yield Tile(np.arange(start + first, start + last), seen[lowest : before + last])

    def _padded(self, group: list[Tile], window: int | None) -> Iterator[Tensor]:
        """Pad the tiles of one batch to a common shape."""
        n, m = max(len(t.query) for t in group), max(len(t.keys) for t in group)
        queries = np.full((len(group), n), -1)
        keys = np.zeros((len(group), m), np.int64)
        visible = np.zeros((len(group), n, 2), np.int64)
        visible[:, :, 1] = 1
        for i, tile in enumerate(group):
            size, first = len(tile.query), self.position_array[tile.keys[0]]
            queries[i, :size], keys[i, : len(tile.keys)] = tile.query, tile.keys
            ends = self.position_array[tile.query] + 1 - first
            visible[i, :size, 1] = ends
            if window is not None:
                visible[i, :size, 0] = np.maximum(ends - window, 0)
        yield from (torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(visible))


def _batched(tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Group tiles of similar size, so that little of a batched product is padding."""
    group: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: (len(t.keys), len(t.query)), reverse=True):
        if group:
            n = max(len(tile.query), *(len(t.query) for t in group))
            m = len(group[0].keys)
            padded = (len(group) + 1) * n * m
            true = sum(len(t.query) * len(t.keys) for t in (*group, tile))
            if padded > TILE_ELEMENTS or padded > 1.5 * true + 4096:
                yield group
                group = []
        group.append(tile)
    if group:
        yield group
