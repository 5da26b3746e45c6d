"""Double quantization: the absmax of the blocks are quantized too   (QLoRA, arXiv:2305.14314, section 3).

    absmax ~ map[q_b] nested_b/256 + offset,    offset = mean(absmax),    nested = max |absmax - offset| over 256

8 bits a block and 32 a 256 blocks instead of 32 bits a block: 8/64 + 32/(64 256) = 0.127 bits a parameter, not 0.5.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NESTED_BLOCK = 256


@cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic map, ascending   (arXiv:1511.04561, as bitsandbytes fills it).

    After a sign, i leading zeros say the exponent 10^-i and the bits that are left a fraction in (0.1, 1).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return tuple(sorted(values))


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (indices, uint8, (blocks,)), (nested absmax, float32, (blocks / 256,)) and offset, a float32 scalar."""
    offset = absmax.mean()
    centred = absmax - offset
    rest = -len(centred) % NESTED_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, rest)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    table = torch.tensor(dynamic_map(), device=absmax.device)
    indices = torch.bucketize(scaled.flatten(), (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return indices[: len(absmax)], nested, offset


def unnest(indices: Tensor, nested: Tensor, offset: Tensor, table: Tensor) -> Tensor:
    """The absmax of the blocks again, float32."""
    each = nested.repeat_interleave(NESTED_BLOCK)[: len(indices)]
    return table[indices.int()] * each + offset
