"""Keys and values of the sequences being generated: one allocation a layer, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.errors import GenerationError
from tunesmith.model.attention import attend, attend_cached
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.sparse import Pattern


class Cache:
    """Room for `batch` sequences of up to `capacity` tokens; grows by itself when a sequence gets longer.

    The first forward with an empty cache is the prompts': its layout's leaf segments become the sequences, in order,
    and a prefix shared by several is computed once and copied into each. Every later forward continues: segment i of
    its layout holds the new tokens of sequence i.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * batch
        self.virtual = [0] * batch  # how many of them are an adapter's virtual tokens
        self.single = False  # does this forward continue every sequence by one token?
        self.starts = torch.zeros(batch, dtype=torch.int64)  # then: their lengths before it
        self._new: list[np.ndarray] = []  # the tokens of the current forward that each sequence gains
        self._hidden: dict[tuple[int | None, Pattern | None], Tensor | None] = {}

    @property
    def batch(self) -> int:
        """Sequences held."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens a sequence has room for."""
        return self.keys[0].shape[2]

    def begin(self, layout: Layout, virtual: Sequence[int] = ()) -> np.ndarray:
        """Prepare for one forward over `layout`; returns the positions of its tokens, (tokens,).

        `virtual`: how many virtual tokens each of the caller's segments has before it, for the first forward. Raises
        GenerationError on a misfit.
        """
        if any(self.lengths):
            if len(layout.lengths) != self.batch or any(p >= 0 for p in layout.parents):
                raise GenerationError(
                    f"cache: {self.batch} sequences cannot be continued by {len(layout.lengths)} segments"
                )
            self._new = [np.arange(s, s + n) for s, n in zip(layout.starts, layout.lengths, strict=True)]
            shift = np.repeat(self.lengths, layout.lengths)
        else:
            leaves = [i for i in range(len(layout.lengths)) if i not in layout.parents]
            if len(leaves) != self.batch:
                raise GenerationError(f"cache: made for {self.batch} sequences, given {len(leaves)}")
            self._new = [layout.rows_of(leaf) for leaf in leaves]
            added = len(layout.lengths) - len(virtual)
            self.virtual = [virtual[leaf - added] for leaf in leaves] if virtual else [0] * self.batch
            shift = np.zeros(layout.tokens, np.int64)
        self.single = any(self.lengths) and all(len(new) == 1 for new in self._new)
        self.starts = torch.tensor(self.lengths)
        self._reserve(max(n + len(new) for n, new in zip(self.lengths, self._new, strict=True)))
        self._hidden = {}
        return layout.position_array + shift

    def attend(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        window: int | None,
        pattern: Pattern | None = None,
    ) -> Tensor:
        """Store the new keys and values of layer `index`, and let the new queries see all they may."""
        keys, values = self.keys[index], self.values[index]
        if all(len(new) == 1 for new in self._new):  # one token a sequence: the common, batched step
            self._store_step(keys, k)
            self._store_step(values, v)
            used = max(self.lengths) + 1
            if any(self.lengths):
                return attend_cached(q, keys[:, :, :used], values[:, :, :used], self._hidden_slots(window, pattern))
        else:
            for row, (start, new) in enumerate(zip(self.lengths, self._new, strict=True)):
                keys[row, :, start : start + len(new)] = k[new].transpose(0, 1)
                values[row, :, start : start + len(new)] = v[new].transpose(0, 1)
        if not any(self.lengths):
            return attend(q, k, v, layout, window, pattern)
        return torch.cat([self._attend_row(row, index, q, window, pattern) for row in range(self.batch)])

    def advance(self) -> None:
        """The forward is done: the new tokens now belong to the sequences."""
        self.lengths = [n + len(new) for n, new in zip(self.lengths, self._new, strict=True)]
        self._new = []

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these sequences only, in this order; one may be named several times (beams)."""
        index = torch.tensor(list(rows), device=self.keys[0].device)
        for store in (self.keys, self.values):
            for layer, held in enumerate(store):  # one layer at a time: no second cache while copying
                store[layer] = held.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.virtual = [self.virtual[row] for row in rows]

    def truncate(self, row: int, length: int) -> None:
        """Forget what sequence `row` holds beyond `length` tokens, virtual ones not counted."""
        self.lengths[row] = min(self.lengths[row], self.virtual[row] + length)

    def _store_step(self, store: Tensor, new: Tensor) -> None:
        first = self.lengths[0]
        if all(n == first for n in self.lengths):
            store[:, :, first] = new
        else:
            rows = torch.arange(self.batch, device=store.device)
            store[rows, :, torch.tensor(self.lengths, device=store.device)] = new

    def _hidden_slots(self, window: int | None, pattern: Pattern | None) -> Tensor | None:
        """(batch, slots), or by KV head, that a step's query must not see; None where there is nothing to hide."""
        if (window, pattern) not in self._hidden:
            used = max(self.lengths) + 1
            even = min(self.lengths) + 1 == used
            if even and (window is None or used <= window) and pattern is None:
                self._hidden[window, pattern] = None
            else:
                length = torch.tensor(self.lengths, device=self.keys[0].device)[:, None]
                slot = torch.arange(used, device=length.device)[None]
                self._hidden[window, pattern] = ~self._seen(length, slot, window, pattern)
        return self._hidden[window, pattern]

    def _seen(self, query: Tensor, slot: Tensor, window: int | None, pattern: Pattern | None) -> Tensor:
        """May the query at position `query` (n, 1) see `slot` (1, m)? (n, m), or with a pattern (n, KV heads, m)."""
        seen = slot <= query if window is None else (slot <= query) & (query - slot < window)
        if pattern is None:
            return seen
        heads = self.keys[0].shape[1]
        each = torch.arange(heads, device=slot.device)[:, None]
        return (seen[:, None] & pattern.sees(each, heads, query[:, None], slot[:, None])).expand(-1, heads, -1)

    def _attend_row(
        self, row: int, index: int, q: Tensor, window: int | None, pattern: Pattern | None = None
    ) -> Tensor:
        """Several new tokens of one sequence against its cache (a further chat turn)."""
        start, new = self.lengths[row], self._new[row]
        total = start + len(new)
        query, slot = torch.arange(start, total, device=q.device)[:, None], torch.arange(total, device=q.device)[None]
        seen = self._seen(query, slot, window, pattern)
        if pattern is not None:
            seen = seen.repeat_interleave(q.shape[1] // self.keys[0].shape[1], dim=1).transpose(0, 1)
        out = functional.scaled_dot_product_attention(
            q[new].transpose(0, 1)[None],
            self.keys[index][row : row + 1, :, :total],
            self.values[index][row : row + 1, :, :total],
            attn_mask=seen,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        extra = max(tokens, 2 * self.capacity) - self.capacity
        self.keys = [functional.pad(t, (0, 0, 0, extra)) for t in self.keys]
        self.values = [functional.pad(t, (0, 0, 0, extra)) for t in self.values]
