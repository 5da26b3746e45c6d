"""Attention over a layout: one function, `attend`, with interchangeable backends that obey the same law.

    softmax(q k^T / sqrt(head_dim)) v   over the keys that the layout lets each query see

Queries of the heads that share a key/value head are stacked, so grouped attention is one batched product per tile
batch and keys are never repeated. The backward is written out: probabilities of long tiles are computed again there, so
that nothing of size queries x keys outlives the forward. How it compares with scaled_dot_product_attention, example by
example, stands in docs/decisions.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.errors import ModelError
from tunesmith.model.layout import Layout
from tunesmith.model.native import Kernels, kernels_for


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None = None, backend: str = "tiled"
) -> Tensor:
    """Attention of every token over what `layout` lets it see.

    q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), heads a multiple of kv_heads, query head h using
    key/value head h // (heads / kv_heads). `window`: also hide keys `window` or more positions back (Mistral).
    Returns (tokens, heads, head_dim).
    """
    return BACKENDS[backend](q, k, v, layout, window)


def _attend_tiled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    tiles = layout.tiles(window)
    return (_Native if kernels_for(q, k, v) else _Attend).apply(q, k, v, *tiles)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """The formula itself, with autograd: the twin that the other backends are held against."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~layout.mask(window), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """FlexAttention, for GPUs: blocks that the layout hides are skipped by the kernel."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    position, own, end = layout.visibility.unbind(1)

    def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (position[j] <= position[i]) & (own[j] <= own[i]) & (own[i] < end[j])
        return seen if window is None else seen & (position[i] - position[j] < window)

    mask = create_block_mask(visible, None, None, len(position), len(position), device=q.device)
    kernel = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    heads, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = kernel(heads, keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, int | None], Tensor]] = {
    "tiled": _attend_tiled,
    "dense": _attend_dense,
    "flex": _attend_flex,
}


def _batches(tiles: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True)


def _stack_queries(x: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """(tokens, heads, d) at rows (batch, n) -> (batch * kv_heads, group * n, d); padded rows (-1) are zero."""
    batch, n = rows.shape
    taken = x.index_select(0, rows.clamp(min=0).flatten())
    if bool((rows < 0).any()):
        taken = taken.masked_fill((rows.flatten() < 0)[:, None, None], 0)
    shaped = taken.view(batch, n, kv_heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
    return shaped.reshape(batch * kv_heads, -1, x.shape[-1])


def _stack_keys(x: Tensor, rows: Tensor) -> Tensor:
    """(tokens, kv_heads, d) at rows (batch, m) -> (batch * kv_heads, m, d)."""
    batch, m = rows.shape
    taken = x.index_select(0, rows.flatten()).view(batch, m, x.shape[1], x.shape[2])
    return taken.transpose(1, 2).reshape(batch * x.shape[1], m, x.shape[2])


def _unstack(x: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """(batch * kv_heads, group * n, d) -> (batch * n, heads, d)."""
    batch, n = rows.shape
    shaped = x.view(batch, kv_heads, -1, n, x.shape[-1]).permute(0, 3, 1, 2, 4)
    return shaped.reshape(batch * n, -1, x.shape[-1])


def _scores(qs: Tensor, ks: Tensor, visible: Tensor, kv_heads: int) -> Tensor:
    """Masked, scaled scores, (batch * kv_heads, group * n, m), in float32 (float64 stays).

    Rounded to bfloat16 they would cost a few percent of accuracy against transformers, whose kernel keeps them wide
    too.
    """
    wide = torch.promote_types(qs.dtype, torch.float32)
    scores = torch.bmm(qs.to(wide) / math.sqrt(qs.shape[-1]), ks.to(wide).transpose(1, 2))
    (batch, n, _), m = visible.shape, ks.shape[1]
    slot = torch.arange(m, device=visible.device)
    hidden = (slot < visible[..., :1]) | (slot >= visible[..., 1:])
    scores.view(batch, kv_heads, -1, n, m).masked_fill_(hidden[:, None, None], float("-inf"))
    return scores


@torch.library.custom_op("tunesmith::attend", mutates_args=())
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention tile batch by tile batch. Returns the output and the log-sum-exp of every row, (tokens, heads)."""
    kv_heads = k.shape[1]
    out = torch.empty_like(q)
    sums = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys, visible in _batches(tiles):
        scores = _scores(_stack_queries(q, queries, kv_heads), _stack_keys(k, keys), visible, kv_heads)
        lse = scores.logsumexp(-1, keepdim=True)
        result = torch.bmm((scores - lse).exp_().to(v.dtype), _stack_keys(v, keys))
        real, rows = _real(queries)
        out[rows] = _unstack(result, queries, kv_heads)[real]
        sums[rows] = _unstack(lse, queries, kv_heads)[real].squeeze(-1)
    return out, sums


def _real(queries: Tensor) -> tuple[Tensor | slice, Tensor]:
    """Which of the padded rows are real, and where they stand in the row."""
    flat = queries.flatten()
    real = flat >= 0
    return (slice(None), flat) if bool(real.all()) else (real, flat[real])


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("tunesmith::attend_backward", mutates_args=())
def tiled_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, tiles: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v; shared keys collect theirs in float32."""
    kv_heads, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
    wide = sums.dtype
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    inner = (grad.to(wide) * out).sum(-1, keepdim=True)  # (tokens, heads, 1): sum_k p dp of every row
    for queries, keys, visible in _batches(tiles):
        qs, gs = (_stack_queries(t, queries, kv_heads) for t in (q, grad))
        ks, vs = _stack_keys(k, keys), _stack_keys(v, keys)
        scores = _scores(qs, ks, visible, kv_heads)
        probabilities = (scores - _stack_queries(sums[..., None], queries, kv_heads)).exp_()
        dv.index_add_(0, keys.flatten(), _flat(torch.bmm(probabilities.to(gs.dtype).transpose(1, 2), gs), keys, wide))
        dp = torch.bmm(gs, vs.transpose(1, 2)).to(wide) - _stack_queries(inner, queries, kv_heads)
        ds = (probabilities * dp).to(q.dtype)
        dk.index_add_(0, keys.flatten(), _flat(torch.bmm(ds.transpose(1, 2), qs), keys, wide))
        real, rows = _real(queries)
        dq[rows] = _unstack(torch.bmm(ds, ks) * scale, queries, kv_heads)[real]
    return dq, dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


def _flat(x: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch * kv_heads, m, d) -> (batch * m, kv_heads, d)."""
    batch, m = keys.shape
    return x.view(batch, -1, m, x.shape[-1]).transpose(1, 2).reshape(batch * m, -1, x.shape[-1]).to(dtype)


@tiled_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, tiles: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attend(torch.autograd.Function):
    """The two operators as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *tiles: Tensor) -> Tensor:
        out, sums = tiled_attention(q, k, v, list(tiles))
        ctx.save_for_backward(q, k, v, out, sums, *tiles)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, *tiles = ctx.saved_tensors
        grads = tiled_attention_backward(grad.contiguous(), q, k, v, out, sums, tiles)
        return *grads, *[None] * len(tiles)


KEPT_KEYS = (
    512  # tiles of at most so many keys keep their probabilities for the backward; longer ones compute them again
)


class _Native(torch.autograd.Function):
    """Products by torch, all between them by native kernels; probabilities of short tiles are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *tiles: Tensor) -> Tensor:
        kernels = _kernels(q)
        out, kv_heads = torch.empty_like(q), k.shape[1]
        kept = []
        for queries, keys, visible in _batches(list(tiles)):
            p = _probabilities(kernels, q, k, queries, keys, visible)
            kernels.unstack(torch.bmm(p, kernels.stack(v, keys, kv_heads)), queries, out, kv_heads)
            kept.append(p if keys.shape[1] <= KEPT_KEYS and any(ctx.needs_input_grad) else q.new_empty(0))
        ctx.save_for_backward(q, k, v, *tiles, *kept)
        ctx.tiles = len(tiles)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        tiles, kept = rest[: ctx.tiles], rest[ctx.tiles :]
        kernels, kv_heads, scale = _kernels(q), k.shape[1], 1 / math.sqrt(q.shape[-1])
        grad, dq = grad.contiguous(), torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
        for (queries, keys, visible), saved in zip(_batches(tiles), kept, strict=True):
            p = saved if len(saved) else _probabilities(kernels, q, k, queries, keys, visible)
            gs = kernels.stack(grad, queries, kv_heads)
            kernels.gather_add(torch.bmm(p.transpose(1, 2), gs), keys, dv)
            dp = torch.bmm(gs, kernels.stack(v, keys, kv_heads).transpose(1, 2))
            ds = kernels.softmax_backward(p, dp, visible)
            kernels.unstack(torch.bmm(ds, kernels.stack(k, keys, kv_heads)), queries, dq, kv_heads, scale=scale)
            kernels.gather_add(
                torch.bmm(ds.transpose(1, 2), kernels.stack(q, queries, kv_heads)), keys, dk, scale=scale
            )
        return dq, dk.to(k.dtype), dv.to(v.dtype), *[None] * ctx.tiles


def _kernels(x: Tensor) -> Kernels:
    kernels = kernels_for(x)
    if kernels is None:
        raise ModelError("attention: the native kernels were there in the forward and are not in the backward")
    return kernels


def _probabilities(kernels: Kernels, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
    """Softmax of one batch of tiles, (batch * kv_heads, group * n, m), from scores that stay in float32."""
    kv_heads, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
    qs = kernels.stack(q, queries, kv_heads, scale=scale, wide=True)
    scores = torch.bmm(qs, kernels.stack(k, keys, kv_heads, wide=True).transpose(1, 2))
    return kernels.softmax(scores, visible, q.dtype)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """One new token a sequence against its cache: q (batch, heads, d), k and v (batch, kv_heads, slots, d).

    `hidden` (batch, slots) is True where a slot is empty or out of the window. Returns (batch, heads, d).
    """
    batch, kv_heads, slots, width = k.shape
    qs = q.view(batch, kv_heads, -1, width)
    mask = None if hidden is None else ~hidden[:, None, None, :].expand(batch, kv_heads, qs.shape[2], slots)
    return functional.scaled_dot_product_attention(qs, k, v, attn_mask=mask).reshape(batch, -1, width)
