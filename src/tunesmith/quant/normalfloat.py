"""NormalFloat: a code whose values are equally likely under N(0, 1), with an exact zero   (QLoRA, arXiv:2305.14314).

    positive half: Phi^-1(p) for 2^(k-1) of p in linspace(delta, 1/2, 2^(k-1) + 1)[:-1]
    negative half: -Phi^-1(p) for 2^(k-1) - 1 of p in linspace(delta, 1/2, 2^(k-1))[:-1]
    all of them and 0, over the largest;    delta = (1/2) ((1 - 1/(2 (2^k - 1))) + (1 - 1/(2 2^k)))

k = 4 gives NF4; the paper's equation 4 does not, the code that it was published with does. There delta is written with
seven digits and both linspaces are float32, which is kept: codes and files are then equal bit for bit.
"""

from __future__ import annotations

import torch


def offset(bits: int) -> float:
    """delta: the probability of the outermost positive value."""
    levels = 2**bits
    return round(0.5 * ((1 - 1 / (2 * (levels - 1))) + (1 - 1 / (2 * levels))), 7)


def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits values of the code, ascending from -1 to 1."""
    half = 2 ** (bits - 1)
    positive = torch.special.ndtri(torch.linspace(offset(bits), 0.5, half + 1).double())[:-1]
    negative = -torch.special.ndtri(torch.linspace(offset(bits), 0.5, half).double())[:-1]
    values = torch.cat([negative, positive.new_zeros(1), positive]).sort().values.float()
    return tuple((values / values.max()).tolist())
