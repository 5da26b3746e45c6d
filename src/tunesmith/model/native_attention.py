"""Attention over tiles by the kernels of attention.cpp (see attention.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.errors import ModelError
from tunesmith.model.native import Kernels, Tiles, kernels_for


def batches(tiles: Sequence[Tensor]) -> Iterator[Tiles]:
    """A layout's tiles, batch by batch: queries, keys, visible."""
    yield from zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True)


class NativeAttention(torch.autograd.Function):
    """Attention over disjoint parts of the keys; `sizes` says how many of the tensors `tiles` are each part's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], *tiles: Tensor) -> Tensor:
        """(tokens, heads, head_dim)."""
        kernels, merged = _kernels(q), len(sizes) > 1
        found = []
        for part in _split(tiles, sizes):
            out = torch.zeros_like(q) if merged else torch.empty_like(q)
            sums = q.new_full((*q.shape[:2], 1), -math.inf, dtype=torch.float32)
            for batch in batches(part):
                kernels.attention(q, k, v, batch, out, sums)
            found.append((out, sums))
        out, sums = _merged(found)
        ctx.save_for_backward(q, k, v, sums, *([out] if merged else []), *tiles)
        ctx.sizes = tuple(sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, sums, *rest = ctx.saved_tensors
        kernels, sizes = _kernels(q), ctx.sizes
        merged = len(sizes) > 1
        out, tiles = (rest[0], rest[1:]) if merged else (None, rest)
        grad, dq = grad.contiguous(), torch.zeros_like(q) if merged else torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
        inner = None if out is None else (grad.float() * out).sum(-1, keepdim=True)
        for part in _split(tiles, sizes):
            some = torch.zeros_like(q) if merged else dq
            for batch in batches(part):
                kernels.attention_backward(q, k, v, grad, batch, sums, inner, (some, dk, dv))
            if merged:
                dq += some
        return dq, dk.to(k.dtype), dv.to(v.dtype), *[None] * (1 + len(tiles))


def _split(tiles: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    start = 0
    for size in sizes:
        yield tiles[start : start + size]
        start += size


def _merged(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The parts' outputs as one, and the log-sum-exp of all scores, (tokens, heads, 1), float32."""
    if len(found) == 1:
        return found[0]
    sums = torch.stack([s for _, s in found])
    total = sum(out * weight for (out, _), weight in zip(found, sums.softmax(0), strict=True))
    return torch.as_tensor(total).to(found[0][0].dtype), sums.logsumexp(0)


def _kernels(x: Tensor) -> Kernels:
    kernels = kernels_for(x)
    if kernels is None:
        raise ModelError("attention: the native kernels were there in the forward and are not in the backward")
    return kernels
