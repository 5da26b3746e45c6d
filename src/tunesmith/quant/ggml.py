"""The blocks of 32 weights of GGUF files, kept as they are in the file.

Q4_0  d (float16), 16 bytes:     w = d (n - 8)          n: low nibbles are the first 16 weights, high the last
Q4_1  d, m (float16), 16 bytes:  w = d n + m
Q8_0  d (float16), 32 bytes:     w = d q                q: int8
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.quant.storage import Storage

# name -> (ggml's number of the type, bytes of a block, of which scales)
KINDS = {"Q4_0": (2, 18, 2), "Q4_1": (3, 20, 4), "Q8_0": (8, 34, 2)}
BLOCK = 32


class Ggml(Storage):
    """Weights in one of KINDS; packed is (rows, bytes of a row)."""

    def __init__(self, kind: str, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.kind = kind
        self.number, self.width, self.head = KINDS[kind]

    def scales(self, packed: Tensor) -> Tensor:
        """d and, for Q4_1, m of every block, float32: (blocks, 1 or 2)."""
        return packed.view(-1, self.width)[:, : self.head].contiguous().view(torch.float16).float()

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Storage`."""
        scales, body = self.scales(packed), packed.view(-1, self.width)[:, self.head :]
        if self.kind == "Q8_0":
            return (scales * body.view(torch.int8)).to(dtype).view(self.shape)
        nibbles = torch.cat([body & 15, body >> 4], 1)
        if self.kind == "Q4_0":
            return (scales * (nibbles.int() - 8)).to(dtype).view(self.shape)
        return (scales[:, :1] * nibbles + scales[:, 1:]).to(dtype).view(self.shape)
