"""Eight bits a weight, one scale a row, and LLM.int8's product   (arXiv:2208.07339).

    absmax_r = max |W_r|;    q = round(127 W_r / absmax_r);    W ~ q absmax_r / 127

Weight-only: y = W x with W as above. LLM.int8: the input's rows are quantized likewise, columns of the input that hold
a magnitude of at least 6 go at full precision instead, and the rest is a product of whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

THRESHOLD = 6.0
_ONE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8, (rows, columns)) and (absmax, float32, (rows,))."""
    weight = weight.detach().float()
    absmax = weight.abs().amax(1)
    return torch.round(weight * (127.0 / absmax.clamp(min=1e-38))[:, None]).to(torch.int8), absmax


def dequantize_rows(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`: products are taken in float32 and rounded once."""
    return (packed * absmax[:, None] * _ONE).to(dtype)


def product(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """LLM.int8's W x for x (tokens, in), in x's dtype. Which columns are outliers depends on all rows of x."""
    wide = x.float()
    out = wide.abs() >= THRESHOLD
    columns = out.any(0).nonzero().flatten()
    # The scale of a row is that of all that is no outlier, of the columns beside it too: as bitsandbytes has it.
    rows, scale = quantize_rows(wide.masked_fill(out, 0.0))
    rows[:, columns] = 0
    y = _whole_product(rows, packed) * (scale[:, None] * absmax[None]) / 127**2
    if len(columns):
        y = y + functional.linear(wide[:, columns], dequantize_rows(packed[:, columns], absmax, torch.float32))
    return y.to(x.dtype)


def _whole_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of int8 matrices a (n, k) and b (m, k), as float32.

    In float32 on a CPU: exact up to 1,040 columns, and beyond that within its rounding.
    """
    if a.is_cuda and len(a) > 16 and not (a.shape[1] % 8 or len(b) % 8):
        return torch._int_mm(a, b.T).float()
    return functional.linear(a.float(), b.float())
