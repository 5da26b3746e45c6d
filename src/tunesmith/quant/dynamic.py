"""Numbers in 8 bits by the dynamic map, block by block   (arXiv:2110.02861; the map is arXiv:1511.04561's).

    absmax_b = max |x| over block b;    code = nearest value of the map to x / absmax_b;    x ~ map[code] absmax_b

The map is dense near zero and near one: an optimizer's moments lie seven orders of magnitude apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256  # values that share a scale, as in bitsandbytes
_TINY = 1e-38  # an all-zero block must not divide by zero


@cache
def dynamic_map(signed: bool = True) -> tuple[float, ...]:
    """The 256 values of the 8-bit dynamic map, ascending, as bitsandbytes fills it.

    After a sign (if `signed`), i leading zeros say the exponent 10^-i and the bits that remain a fraction in (0.1, 1).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + ((-means).tolist() if signed else [])
    return tuple(sorted(values))


def encode(x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return (codes, uint8, (n,)) and (absmax, float32, (blocks,)) of flat float32 values (n,)."""
    blocks = functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK) if len(x) % BLOCK else x.view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    # By the reciprocal, as bitsandbytes does: a division would round some values to the other code.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1)
    return nearest(scaled.flatten(), signed)[: len(x)], absmax


def decode(codes: Tensor, absmax: Tensor, signed: bool = True) -> Tensor:
    """The values again, flat, float32."""
    values = _tables(signed, codes.device).values[codes.int()]
    whole = len(codes) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    values[whole:].mul_(absmax[-1])
    return values


def nearest(scaled: Tensor, signed: bool = True) -> Tensor:
    """The code of the value nearest to each of `scaled` (n,), float32 in [-1, 1]; halfway, the lower value's.

    The upper half of a float's bits leaves two codes at most; one comparison tells which.
    """
    tables = _tables(signed, scaled.device)
    start = tables.first[(scaled.view(torch.int32) >> 16) & 0xFFFF]
    return start + (tables.middles[start.int()] < scaled)


@dataclass(frozen=True)
class _Tables:
    """The map, the middles between its values (and no end), and the code of the least float with each upper half."""

    values: Tensor  # (256,)
    middles: Tensor  # (256,)
    first: Tensor  # (65536,), uint8


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    values = torch.tensor(dynamic_map(signed))
    middles = (values[:-1] + values[1:]) / 2
    upper = torch.arange(1 << 16)
    least = (upper << 16) | torch.where(upper < 1 << 15, 0, 0xFFFF)  # below zero, the larger magnitude is the less
    floats = torch.where(least < 1 << 31, least, least - (1 << 32)).to(torch.int32).view(torch.float32)
    first = torch.bucketize(floats, middles).to(torch.uint8)
    ends = functional.pad(middles, (0, 1), value=torch.inf)
    return _Tables(*(t.to(device) for t in (values, ends, first)))
