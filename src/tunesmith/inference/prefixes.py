"""Keys and values of prompts that were read before, so that the next one that begins alike is read from there on.

    (base, adapter, version) -> prompts, each with its keys and values        bounded in bytes, the longest unused goes

What is shared is exact: the same weights and adapters on the same tokens at the same positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.cache import Cache

LEAST = 16  # tokens in common below which reading them again, in one pass with other prompts, is no slower


@dataclass(frozen=True, eq=False)
class Held:
    """One prompt: `tokens` (n,), and what the cache held of it, (2, layers, kv_heads, virtual + n, head_dim)."""

    key: Hashable
    tokens: np.ndarray
    virtual: int
    store: Tensor

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return self.store.numel() * self.store.element_size()

    def common(self, tokens: np.ndarray) -> int:
        """How many tokens `tokens` begins with alike."""
        length = min(len(self.tokens), len(tokens))
        differs = self.tokens[:length] != tokens[:length]
        return int(differs.argmax()) if differs.any() else length

    def into(self, cache: Cache, row: int, tokens: int) -> None:
        """Let the empty sequence `row` of `cache` hold the first `tokens` of this prompt."""
        length = self.virtual + tokens
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            keys[row, :, :length] = self.store[0, layer, :, :length]
            values[row, :, :length] = self.store[1, layer, :, :length]
        cache.lengths[row], cache.virtual[row] = length, self.virtual


class PrefixCache:
    """The prompts held, at most `limit` bytes of them; `hits` counts the tokens that were not computed again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.hits = 0
        self._held: OrderedDict[int, Held] = OrderedDict()  # by identity, the least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def find(self, key: Hashable, prompt: Sequence[int]) -> tuple[Held, int] | None:
        """The held prompt under `key` that has the most first tokens in common with `prompt`, and how many.

        The prompt's last token never counts: it must be read for its logits.
        """
        held, common = self._best(key, np.asarray(prompt, np.int64)[:-1])
        if held is None or common < LEAST:
            return None
        self._held.move_to_end(id(held))
        self.hits += common
        return held, common

    def put(self, key: Hashable, prompt: Sequence[int], cache: Cache, row: int) -> None:
        """Keep what sequence `row` of `cache` holds of `prompt`, unless nearly all of it is held already."""
        tokens = np.asarray(prompt, np.int64)
        length = cache.virtual[row] + len(tokens)
        one = cache.keys[0][row, :, :length]
        size = 2 * len(cache.keys) * one.numel() * one.element_size()
        _, common = self._best(key, tokens)
        if len(tokens) < LEAST or size > self.limit or common + LEAST > len(tokens):
            return
        for held in [held for held in self._held.values() if held.key == key]:
            if held.common(tokens) == len(held.tokens):  # a beginning of the new one
                self._drop(held)
        parts = [torch.stack([layer[row, :, :length] for layer in layers]) for layers in (cache.keys, cache.values)]
        held = Held(key, tokens, cache.virtual[row], torch.stack(parts))
        self._held[id(held)] = held
        self.bytes += held.bytes
        while self.bytes > self.limit:
            self._drop(next(iter(self._held.values())))

    def forget(self, key: Hashable | None = None) -> None:
        """Drop what is held under `key`, or everything."""
        for held in [held for held in self._held.values() if key is None or held.key == key]:
            self._drop(held)

    def _best(self, key: Hashable, tokens: np.ndarray) -> tuple[Held | None, int]:
        found = [(held.common(tokens), held) for held in self._held.values() if held.key == key]
        common, held = max(found, key=lambda each: each[0], default=(0, None))
        return held, common

    def _drop(self, held: Held) -> None:
        del self._held[id(held)]
        self.bytes -= held.bytes
