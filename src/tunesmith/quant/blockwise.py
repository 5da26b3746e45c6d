"""Quantization in blocks: each block of a flat weight keeps its largest magnitude, and an index of a code a value.

    absmax_b = max |w| over block b;    index = nearest code to w / absmax_b;    w ~ code[index] absmax_b

Indices are packed as one string of bits, first index highest: two 4-bit ones a byte (bitsandbytes' layout), eight
3-bit ones in three bytes, four 2-bit ones a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.quant.codes import Code

_TINY = 1e-38  # an all-zero block must not divide by zero
_SLICE = 1 << 24  # weights that are read at once
# bits -> how many indices fill how many whole bytes
_GROUP = {2: (4, 1), 3: (8, 3), 4: (2, 1)}


def quantize_blockwise(weight: Tensor, code: Code, block: int) -> tuple[Tensor, Tensor]:
    """Return (packed indices, uint8, (bytes, 1)) and (absmax, float32, (blocks,)) of a weight of any shape.

    Raises ValueError where `block` does not divide the number of values.
    """
    if weight.numel() % block:
        raise ValueError(f"blocks of {block} do not divide {weight.numel()} values")
    blocks = weight.detach().reshape(-1, block).float()
    absmax = blocks.abs().amax(1)
    # By the reciprocal, as bitsandbytes does: a division would round some values to the other code.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1)
    return pack(code.nearest(scaled.flatten()), code.bits), absmax


def dequantize_blockwise(packed: Tensor, absmax: Tensor, table: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the values, flat, in `dtype`: products are taken in float32 and rounded once.

    A slice at a time, so that no intermediate is as large as the weight.
    """
    count, width = _GROUP[bits]
    block = packed.numel() // width * count // max(len(absmax), 1)
    values = torch.empty(len(absmax), block, dtype=dtype, device=packed.device)
    rows, held = max(1, _SLICE // max(block, 1)), block // count * width
    for start in range(0, len(absmax), rows):
        part = slice(start, start + rows)
        indices = unpack(packed.view(-1)[start * held : (start + rows) * held], bits)
        values[part] = table[indices.int()].view(-1, block) * absmax[part, None]
    return values.flatten()


def pack(indices: Tensor, bits: int) -> Tensor:
    """Pack flat indices (uint8) into (bytes, 1); their number must fill whole bytes."""
    count, width = _GROUP[bits]
    word = torch.zeros(len(indices) // count, dtype=torch.int32, device=indices.device)
    for column in indices.view(-1, count).unbind(1):
        word = (word << bits) | column.int()
    parts = [(word >> (8 * (width - 1 - i))) & 0xFF for i in range(width)]
    return torch.stack(parts, 1).to(torch.uint8).view(-1, 1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`: flat indices, uint8."""
    count, width = _GROUP[bits]
    word = torch.zeros(packed.numel() // width, dtype=torch.int32, device=packed.device)
    for column in packed.view(-1, width).unbind(1):
        word = (word << 8) | column.int()
    parts = [(word >> (bits * (count - 1 - i))) & (2**bits - 1) for i in range(count)]
    return torch.stack(parts, 1).to(torch.uint8).flatten()
