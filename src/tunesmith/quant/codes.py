"""The codes of few bits: which value in [-1, 1] each index stands for, times the largest of its block.

nf4 nf3 nf2   NormalFloat                                     (arXiv:2305.14314)
fp4           bitsandbytes' float of 1 sign, 2 exponent and 1 mantissa bit; its subnormal is 1/16, not 1
e2m1 e3m0     the floats that their names say (e2m1: the OCP microscaling format's)
int4          whole numbers from -8 to 7, over 8
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tunesmith.quant.normalfloat import normal_float

_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_E3M0 = (0, 0.25, 0.5, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Code:
    """`values[i]` is what index i stands for; there are 2^bits of them."""

    kind: str
    bits: int
    values: tuple[float, ...]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The values by index, (2^bits,), float32."""
        return torch.tensor(self.values, device=device)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The index of the value nearest to each of `scaled`, uint8; halfway, the lower value's."""
        table = self.table(scaled.device)
        order = torch.argsort(table, stable=True)  # stable: of two zeros the first, as bitsandbytes has it
        ascending = table[order]
        found = torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
        return order.to(torch.uint8)[found]


def _signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """A sign bit before the magnitudes, over the largest, in float32."""
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes)])
    return tuple((values / values.max()).tolist())


@cache
def find_code(kind: str) -> Code:
    """The code called `kind`, one of KINDS."""
    bits, values = _TABLE[kind]
    return Code(kind, bits, values)


_TABLE: dict[str, tuple[int, tuple[float, ...]]] = {
    "nf4": (4, normal_float(4)),
    "nf3": (3, normal_float(3)),
    "nf2": (2, normal_float(2)),
    "fp4": (4, _signed(_FP4)),
    "e2m1": (4, _signed(_E2M1)),
    "e3m0": (4, _signed(_E3M0)),
    "int4": (4, tuple(i / 8 for i in range(-8, 8))),
}
KINDS = tuple(_TABLE)
