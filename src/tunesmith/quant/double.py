"""Double quantization: the absmax of the blocks are quantized too   (QLoRA, arXiv:2305.14314, section 3).

    absmax ~ map[q_b] nested_b/256 + offset,    offset = mean(absmax),    nested = max |absmax - offset| over 256

8 bits a block and 32 a 256 blocks instead of 32 bits a block: 8/64 + 32/(64 256) = 0.127 bits a parameter, not 0.5.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.quant.dynamic import BLOCK, encode

NESTED_BLOCK = BLOCK


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (indices, uint8, (blocks,)), (nested absmax, float32, (blocks / 256,)) and offset, a float32 scalar."""
    offset = absmax.mean()
    return *encode(absmax - offset), offset


def unnest(indices: Tensor, nested: Tensor, offset: Tensor, table: Tensor) -> Tensor:
    """The absmax of the blocks again, float32."""
    each = nested.repeat_interleave(NESTED_BLOCK)[: len(indices)]
    return table[indices.int()] * each + offset
