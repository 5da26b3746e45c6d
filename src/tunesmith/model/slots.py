"""A cache whose sequences come and go while the others go on: for a batch that requests join and leave.

    slot    0   1   2   3   4          leave(1)         0   3   2   -   -
            a   b   c   d   -       ------------->      a   d   c   -   -        the last takes the place

Only what moves is copied. A slot that is given up is cleared, so that nothing of one sequence, not even a value that is
not finite, can reach the next one there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.model.cache import Cache
from tunesmith.model.config import ModelConfig


class SlotCache(Cache):
    """`Cache` over stores with room for more sequences than it holds; `keys` and `values` are views of what is used.

    It grows by doubling, but not beyond `most_rows` sequences of `most_tokens` tokens unless it must; empty, it holds
    no memory.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(config, 0, 0, dtype, device)
        self.most_rows = self.most_tokens = 1
        self._stores = [self.keys, self.values]

    @property
    def bytes(self) -> int:
        """Memory of the stores."""
        return sum(store.numel() * store.element_size() for layers in self._stores for store in layers)

    def join(self, other: Cache, row: int, copies: int = 1) -> None:
        """Take sequence `row` of `other` in as the last one, `copies` times."""
        first, length = self.batch, other.lengths[row]
        self._fit(first + copies, max([length, *self.lengths]) + 1)
        for stores, theirs in zip(self._stores, (other.keys, other.values), strict=True):
            for store, layer in zip(stores, theirs, strict=True):
                store[first : first + copies, :, :length] = layer[row, :, :length]
        self.lengths += [length] * copies
        self.virtual += [other.virtual[row]] * copies
        self._view()

    def leave(self, row: int) -> None:
        """Give up sequence `row`; the last one takes its number."""
        last = self.batch - 1
        if not last:
            self.clear()
            return
        moved, gone = self.lengths[last], self.lengths[row]
        for store in (store for stores in self._stores for store in stores):
            if row != last:
                store[row, :, :moved] = store[last, :, :moved]
                store[row, :, moved:gone] = 0
            store[last, :, :moved] = 0
        for counts in (self.lengths, self.virtual):
            counts[row] = counts[last]
            counts.pop()
        self._view()

    def clear(self) -> None:
        """Give up all sequences and their memory."""
        self._stores = [[store.new_zeros(_sized(store, 0, 0)) for store in stores] for stores in self._stores]
        self.lengths, self.virtual = [], []
        self._view()

    def keep(self, rows: Sequence[int]) -> None:
        """See `Cache.keep`."""
        super().keep(rows)
        self._stores = [self.keys, self.values]

    def _reserve(self, tokens: int) -> None:
        self._fit(self.batch, tokens)

    def _fit(self, rows: int, tokens: int) -> None:
        """Have room for so many; a store with too little is made anew for what is needed now."""
        wanted = max(rows, min(2 * rows, self.most_rows)), max(tokens, min(2 * tokens, self.most_tokens))
        used = max(self.lengths, default=0)
        try:
            for stores in self._stores:
                for layer, store in enumerate(stores):  # one layer at a time: no second cache while copying
                    if rows > store.shape[0] or tokens > store.shape[2]:
                        stores[layer] = fresh = store.new_zeros(_sized(store, *wanted))
                        fresh[: self.batch, :, :used] = store[: self.batch, :, :used]
        finally:  # memory may run out half-way: what is held is whole all the same
            self._view()

    def _view(self) -> None:
        self.keys, self.values = ([store[: self.batch] for store in stores] for stores in self._stores)


def _sized(store: Tensor, rows: int, tokens: int) -> tuple[int, int, int, int]:
    return rows, store.shape[1], tokens, store.shape[3]
