"""Whole numbers of k bits with a scale and a zero for each group of a row's columns, as GPTQ makes them.

W[r, c] ~ scale[r, g] (q[r, c] - zero[r, g]),    g = group[c]  (act-order), or c // group_size
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.quant.blockwise import pack, unpack
from tunesmith.quant.storage import Storage

BITS = (2, 3, 4)


class Grouped(Storage):
    """`scales` (rows, groups) in float16, `zeros` likewise in uint8; `group` of each column where they are mixed."""

    kind = "gptq"
    scales: Tensor
    zeros: Tensor
    group: Tensor | None

    def __init__(
        self, shape: tuple[int, int], width: int, scales: Tensor, zeros: Tensor, group: Tensor | None = None
    ) -> None:
        super().__init__(shape)
        self.width = width  # bits of a number
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("group", group)

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Storage`."""
        q = unpack(packed, self.width).view(self.shape)
        scales, zeros = self.scales.float(), self.zeros.int()
        if self.group is not None:
            return (scales[:, self.group] * (q.int() - zeros[:, self.group])).to(dtype)
        grouped = q.int().view(self.shape[0], scales.shape[1], -1) - zeros[:, :, None]
        return (scales[:, :, None] * grouped).to(dtype).view(self.shape)


def hold(q: Tensor, bits: int, scales: Tensor, zeros: Tensor, group: Tensor | None) -> tuple[Tensor, Grouped]:
    """Whole numbers (rows, columns) and what belongs to them, as packed numbers and storage.

    They are packed as the whole numbers that they are: nothing is divided and rounded again on the way.
    """
    rows, columns = q.shape
    packed = pack(q.to(torch.uint8).flatten(), bits)
    return packed, Grouped((rows, columns), bits, scales.half(), zeros.to(torch.uint8), group)
