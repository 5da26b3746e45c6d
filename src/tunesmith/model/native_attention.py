"""Attention over tiles with native kernels: products by torch, all between them by kernels.cpp (see attention.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.errors import ModelError
from tunesmith.model.matmul import widened
from tunesmith.model.native import Kernels, kernels_for

KEPT_KEYS = 512  # tiles of at most so many keys may keep their probabilities for the backward


def batches(tiles: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A layout's tiles, batch by batch: queries, keys, visible."""
    yield from zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True)


class NativeAttention(torch.autograd.Function):
    """Attention over disjoint parts of the keys; `sizes` says how many of the tensors `tiles` are each part's.

    `keep`: short tiles keep their probabilities for the backward, which makes those of the others again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], keep: bool, *tiles: Tensor) -> Tensor:
        """(tokens, heads, head_dim)."""
        kernels, kv_heads, merged, wide = _kernels(q), k.shape[1], len(sizes) > 1, widened(q, k)
        keep = keep and any(ctx.needs_input_grad)
        kept, found = [], []
        for part in _split(tiles, sizes):
            out = torch.zeros_like(q) if merged else torch.empty_like(q)
            sums = q.new_full((*q.shape[:2], 1), -math.inf, dtype=torch.float32) if merged else None
            for queries, keys, visible in batches(part):
                p = _probabilities(kernels, q, k, queries, keys, visible, sums)
                kernels.unstack(torch.bmm(p, kernels.stack(v, keys, kv_heads, wide=wide)), queries, out, kv_heads)
                kept.append(p.to(q.dtype) if keep and keys.shape[1] <= KEPT_KEYS else q.new_empty(0))
            found.append((out, sums))
        out, weights = _merged(found)
        ctx.save_for_backward(q, k, v, *([out] if merged else []), *weights, *tiles, *kept)
        ctx.sizes = tuple(sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        sizes, count = ctx.sizes, sum(ctx.sizes)
        q, k, v, *rest = ctx.saved_tensors
        merged = len(sizes) > 1
        more = 1 + len(sizes) if merged else 0
        (out, *weights), tiles, kept = rest[:more] or (None,), rest[more : more + count], iter(rest[more + count :])
        grad, dq = grad.contiguous(), torch.zeros_like(q) if merged else torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
        inner = None if out is None else (grad.float() * out).sum(-1, keepdim=True)
        for part, weight in zip(_split(tiles, sizes), weights or [None], strict=True):
            saved = [next(kept) for _ in range(len(part) // 3)]
            if inner is None:
                _backward(q, k, v, grad, part, saved, None, (dq, dk, dv))
                continue
            some = torch.zeros_like(q)
            _backward(q, k, v, (grad * weight).to(q.dtype), part, saved, inner * weight, (some, dk, dv))
            dq += some
        return dq, dk.to(k.dtype), dv.to(v.dtype), *[None] * (2 + count)


def _split(tiles: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    start = 0
    for size in sizes:
        yield tiles[start : start + size]
        start += size


def _merged(found: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, list[Tensor]]:
    """The parts' outputs as one, and each part's weight exp(s_part - s), (tokens, heads, 1), float32."""
    sums = [s for _, s in found if s is not None]
    if not sums:
        return found[0][0], []
    weights = list(torch.stack(sums).softmax(0).unbind(0))
    total = sum(out * weight for (out, _), weight in zip(found, weights, strict=True))
    return torch.as_tensor(total).to(found[0][0].dtype), weights


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    tiles: Sequence[Tensor],
    kept: Sequence[Tensor],
    inner: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write one part's gradient of q, and add those of k and v, in `found`; `inner` as in `softmax_backward`."""
    kernels, kv_heads, scale, wide = _kernels(q), k.shape[1], 1 / math.sqrt(q.shape[-1]), widened(q, k)
    dq, dk, dv = found
    for (queries, keys, visible), saved in zip(batches(tiles), kept, strict=True):
        p = saved if len(saved) else _probabilities(kernels, q, k, queries, keys, visible, None)
        p = p.float() if wide else p
        gs = kernels.stack(grad, queries, kv_heads, wide=wide)
        kernels.gather_add(torch.bmm(p.transpose(1, 2), gs), keys, dv)
        dp = torch.bmm(gs, kernels.stack(v, keys, kv_heads, wide=wide).transpose(1, 2))
        ds = kernels.softmax_backward(
            p, dp, visible, None if inner is None else kernels.stack(inner, queries, kv_heads)
        )
        kernels.unstack(torch.bmm(ds, kernels.stack(k, keys, kv_heads, wide=wide)), queries, dq, kv_heads, scale=scale)
        qs = kernels.stack(q, queries, kv_heads, wide=wide)
        kernels.gather_add(torch.bmm(ds.transpose(1, 2), qs), keys, dk, scale=scale)


def _kernels(x: Tensor) -> Kernels:
    kernels = kernels_for(x)
    if kernels is None:
        raise ModelError("attention: the native kernels were there in the forward and are not in the backward")
    return kernels


def _probabilities(
    kernels: Kernels, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, visible: Tensor, sums: Tensor | None
) -> Tensor:
    """Softmax of one batch of tiles, (batch * kv_heads, group * n, m), from scores that stay in float32.

    In q's type, or in float32 where products are made in it.

    Its rows' log-sum-exps go to `sums`, (tokens, heads, 1).
    """
    kv_heads, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
    dtype = torch.float32 if widened(q, k) else q.dtype
    qs = kernels.stack(q, queries, kv_heads, scale=scale, wide=True)
    scores = torch.bmm(qs, kernels.stack(k, keys, kv_heads, wide=True).transpose(1, 2))
    if sums is None:
        return kernels.softmax(scores, visible, dtype)
    found = torch.empty(*scores.shape[:2], 1)
    p = kernels.softmax(scores, visible, dtype, found)
    kernels.unstack(found, queries, sums, kv_heads)
    return p
