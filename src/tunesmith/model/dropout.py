"""A product behind dropout that keeps a number for the backward.

    y = (m * x) W^T / kept      m is drawn from a seed in the forward, and again in the backward

torch keeps the factors and the dropped input, each as large as x: with all linears adapted that is more than all else
that a step holds. It draws its numbers one by one, which takes longer than the product; here four come of one random
word, so that what is dropped is the nearest multiple of 1 / 65,536.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.model.matmul import back, back_weight, plain

LEVELS = 1 << 16  # of a 16-bit number
WORD = 4  # such numbers in a random number of 64 bits


def draw_seed() -> Tensor:
    """A seed from torch's generator on the CPU, so that recomputation and a resumed run draw the same."""
    return torch.randint(2**62, ())


def dropped_product(x: Tensor, weight: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """x (tokens, in), a share of it set to 0 and the rest scaled up, times weight (out, in) -> (tokens, out).

    The same `seed` drops the same numbers.
    """
    out: Tensor = _DroppedProduct.apply(x, weight, dropout, seed)
    return out


def kept_share(dropout: float) -> float:
    """The share that is really kept."""
    return 1 - round(dropout * LEVELS) / LEVELS


def keep_mask(like: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Which numbers are kept: booleans of the shape of `like`, on its device."""
    words = torch.empty(-(-like.numel() // WORD), dtype=torch.int64, device=like.device)
    draw = None if like.is_meta else torch.Generator(like.device).manual_seed(int(seed))
    words.random_(-(1 << 63), None, generator=draw)
    numbers = words.view(torch.int16)[: like.numel()].view(like.shape)
    return numbers >= round(dropout * LEVELS) - LEVELS // 2


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropout: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, seed)
        ctx.dropout = dropout
        return plain(x * keep_mask(x, dropout, seed), weight).div_(kept_share(dropout))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seed = ctx.saved_tensors
        grad = grads[0] / kept_share(ctx.dropout)
        keep = keep_mask(x, ctx.dropout, seed)
        of_x = back(grad, weight).mul_(keep) if ctx.needs_input_grad[0] else None
        of_weight = back_weight(grad, x * keep) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None
