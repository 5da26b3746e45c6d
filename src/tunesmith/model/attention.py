"""Attention over a layout: one function, `attend`, with interchangeable backends that obey the same law.

    softmax(q k^T / sqrt(head_dim)) v   over the keys that the layout lets each query see

Queries of the heads that share a key/value head are stacked, so that keys are never repeated. The backward is written
out and computes probabilities again: nothing of size queries x keys outlives the forward. On a CPU a native kernel does
it all (native_attention.py, attention.cpp), elsewhere one batched product per tile batch. How it compares with
scaled_dot_product_attention, example by example, stands in docs/decisions.md.

A sparse pattern's keys may come in several disjoint parts, each with tiles of its own. Their outputs o and the
log-sum-exps s of their scores are merged, and the backward needs the sums over all parts only:

    s = log sum_part exp(s_part)        o = sum_part exp(s_part - s) o_part
    p = exp(score - s)                  d score = p (d p - d o . o)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.errors import ModelError
from tunesmith.model.dropout import draw_seed
from tunesmith.model.layout import BATCHED, NATIVE, Layout
from tunesmith.model.native import kernels_for
from tunesmith.model.native_attention import NativeAttention, batches
from tunesmith.model.sparse import Pattern


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    window: int | None = None,
    pattern: Pattern | None = None,
    *,
    backend: str = "tiled",
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every token over what `layout` lets it see.

    q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), heads a multiple of kv_heads, query head h using
    key/value head h // (heads / kv_heads). `window`: also hide keys `window` or more positions back (Mistral).
    `pattern`: also hide what this sparse pattern hides. `dropout`: the share of probabilities that are set to 0 at
    random, the others growing by 1 / (1 - dropout). Returns (tokens, heads, head_dim).
    """
    return BACKENDS[backend](q, k, v, layout, window, pattern, dropout)


def _attend_tiled(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, pattern: Pattern | None, dropout: float
) -> Tensor:
    if pattern is None:
        native = dropout == 0 and kernels_for(q, k, v) is not None
        return _over_parts(q, k, v, [layout.tiles(window, cut=NATIVE if native else BATCHED)], dropout)
    group = q.shape[1] // k.shape[1]
    found = []
    for low, high, field in pattern.split(k.shape[1]):
        heads = slice(low * group, high * group), slice(low, high), slice(low, high)
        some = [t[:, own].contiguous() for t, own in zip((q, k, v), heads, strict=True)]
        parts = [layout.tiles(window, rule) for rule in field.rules]
        found.append(_over_parts(some[0], some[1], some[2], [tiles for tiles in parts if tiles] or parts[:1], dropout))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _over_parts(q: Tensor, k: Tensor, v: Tensor, parts: list[tuple[Tensor, ...]], dropout: float) -> Tensor:
    """Attention over the union of disjoint parts, each a tuple of tiles."""
    tiles = [tensor for part in parts for tensor in part]
    if dropout == 0 and kernels_for(q, k, v):
        return NativeAttention.apply(q, k, v, [len(part) for part in parts], *tiles)
    seed = draw_seed() if dropout else None
    return _Attend.apply(q, k, v, len(parts) > 1, dropout, seed, *tiles)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, pattern: Pattern | None, dropout: float
) -> Tensor:
    """The formula itself, with autograd: the twin that the other backends are held against."""
    heads, kv_heads = q.shape[1], k.shape[1]
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    mask = layout.mask(window)
    if pattern is not None:
        head = torch.arange(heads, device=q.device)[:, None, None] // (heads // kv_heads)
        position = layout.positions
        mask = mask & pattern.sees(head, kv_heads, position[:, None], position[None])
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", functional.dropout(scores.softmax(-1), dropout), v)


def _attend_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, pattern: Pattern | None, dropout: float
) -> Tensor:
    """FlexAttention, for GPUs: blocks that the layout hides are skipped by the kernel."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if dropout:
        raise ModelError("attention: FlexAttention has no dropout; use the tiled backend")
    position, own, end = layout.visibility.unbind(1)
    heads, kv_heads = q.shape[1], k.shape[1]

    def visible(_batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i_at, j_at = position[i], position[j]
        seen = (j_at <= i_at) & (own[j] <= own[i]) & (own[i] < end[j])
        if window is not None:
            seen = seen & (i_at - j_at < window)
        if pattern is not None:
            seen = seen & pattern.sees(head // (heads // kv_heads), kv_heads, i_at, j_at)
        return seen

    each = None if pattern is None or len(pattern.fields) == 1 else heads
    mask = create_block_mask(visible, None, each, len(position), len(position), device=q.device)
    kernel = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = kernel(queries, keys, values, block_mask=mask, enable_gqa=heads != kv_heads)
    return out[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, int | None, Pattern | None, float], Tensor]] = {
    "tiled": _attend_tiled,
    "dense": _attend_dense,
    "flex": _attend_flex,
}


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
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: list[Tensor],
    merged: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention tile batch by tile batch. Returns the output and the log-sum-exp of every row, (tokens, heads).

    `merged`: the tiles are of several parts, so a row may occur in several batches. `seed` fixes what dropout drops.
    """
    kv_heads, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape, dtype=wide) if merged else torch.empty_like(q)
    sums = q.new_full(q.shape[:2], float("-inf"), dtype=wide)
    drop = _Dropout(dropout, seed, q.device)
    for queries, keys, visible in batches(tiles):
        scores = _scores(_stack_queries(q, queries, kv_heads), _stack_keys(k, keys), visible, kv_heads)
        lse = scores.logsumexp(-1, keepdim=True)
        probabilities = (scores - lse).exp_()
        if (factors := drop.factors(probabilities)) is not None:
            probabilities *= factors
        result = torch.bmm(probabilities.to(v.dtype), _stack_keys(v, keys))
        real, rows = _real(queries)
        part, lse = (_unstack(t, queries, kv_heads)[real] for t in (result, lse))
        if merged:
            before = sums[rows][..., None]
            total = torch.logaddexp(before, lse)
            part = out[rows] * (before - total).exp() + part * (lse - total).exp()
            lse = total
        out[rows] = part
        sums[rows] = lse.squeeze(-1)
    return out.to(q.dtype), sums


class _Dropout:
    """Factors 0 and 1 / (1 - dropout) for each batch of probabilities: the same for the same seed, batch by batch."""

    def __init__(self, dropout: float, seed: Tensor | None, device: torch.device) -> None:
        self.kept = 1 - dropout
        self.draw = None if seed is None else torch.Generator(device).manual_seed(int(seed))

    def factors(self, like: Tensor) -> Tensor | None:
        """The next batch's factors; None without dropout."""
        if self.draw is None:
            return None
        return torch.empty_like(like).bernoulli_(self.kept, generator=self.draw).div_(self.kept)


def _real(queries: Tensor) -> tuple[Tensor | slice, Tensor]:
    """Which of the padded rows are real, and where they stand in the row."""
    flat = queries.flatten()
    real = flat >= 0
    return (slice(None), flat) if bool(real.all()) else (real, flat[real])


@tiled_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("tunesmith::attend_backward", mutates_args=())
def tiled_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    tiles: list[Tensor],
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v; shared keys, and queries of several parts, collect theirs in float32."""
    kv_heads, scale = k.shape[1], 1 / math.sqrt(q.shape[-1])
    wide = sums.dtype
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    inner = (grad.to(wide) * out).sum(-1, keepdim=True)  # (tokens, heads, 1): sum_k p dp of every row
    drop = _Dropout(dropout, seed, q.device)
    for queries, keys, visible in batches(tiles):
        qs, gs = (_stack_queries(t, queries, kv_heads) for t in (q, grad))
        ks, vs = _stack_keys(k, keys), _stack_keys(v, keys)
        scores = _scores(qs, ks, visible, kv_heads)
        probabilities = (scores - _stack_queries(sums[..., None], queries, kv_heads)).exp_()
        dp = torch.bmm(gs, vs.transpose(1, 2)).to(wide)
        left = probabilities
        if (factors := drop.factors(probabilities)) is not None:
            left, dp = probabilities * factors, dp * factors
        dv.index_add_(0, keys.flatten(), _flat(torch.bmm(left.to(gs.dtype).transpose(1, 2), gs), keys, wide))
        ds = (probabilities * (dp - _stack_queries(inner, queries, kv_heads))).to(q.dtype)
        dk.index_add_(0, keys.flatten(), _flat(torch.bmm(ds.transpose(1, 2), qs), keys, wide))
        real, rows = _real(queries)
        dq[rows] += _unstack(torch.bmm(ds, ks), queries, kv_heads)[real]
    return dq.mul_(scale).to(q.dtype), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


def _flat(x: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch * kv_heads, m, d) -> (batch * m, kv_heads, d)."""
    batch, m = keys.shape
    return x.view(batch, -1, m, x.shape[-1]).transpose(1, 2).reshape(batch * m, -1, x.shape[-1]).to(dtype)


@tiled_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attend(torch.autograd.Function):
    """The two operators as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        merged: bool,
        dropout: float,
        seed: Tensor | None,
        *tiles: Tensor,
    ) -> Tensor:
        out, sums = tiled_attention(q, k, v, list(tiles), merged, dropout, seed)
        ctx.save_for_backward(q, k, v, out, sums, *([] if seed is None else [seed]), *tiles)
        ctx.dropout = dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, *rest = ctx.saved_tensors
        seed, tiles = (rest[0], rest[1:]) if ctx.dropout else (None, rest)
        grads = tiled_attention_backward(grad.contiguous(), q, k, v, out, sums, tiles, ctx.dropout, seed)
        return *grads, *[None] * (3 + len(tiles))


def attend_cached(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """One new token a sequence against its cache: q (batch, heads, d), k and v (batch, kv_heads, slots, d).

    `hidden`, (batch, slots) or (batch, kv_heads, slots), is True where a slot is empty or not to be seen. Returns
    (batch, heads, d).
    """
    batch, kv_heads, slots, width = k.shape
    qs = q.view(batch, kv_heads, -1, width)
    if hidden is not None and hidden.ndim == 2:
        hidden = hidden[:, None]
    mask = None if hidden is None else ~hidden[:, :, None].expand(batch, kv_heads, qs.shape[2], slots)
    return functional.scaled_dot_product_attention(qs, k, v, attn_mask=mask).reshape(batch, -1, width)
