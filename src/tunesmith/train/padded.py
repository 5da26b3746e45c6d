"""What the plain formulation of the same step would hold: padded rows, every logit, autograd on the plain formulas.

    rows padded to the longest of a micro-batch -> blocks as Hugging Face's LlamaModel writes them -> logits of every
    position, in float32 for the loss -> backward, all by autograd

It is what a trainer without packs needs, counted as `simulate.step_bytes` counts ours, on the meta device. Attention is
written out ("eager": it keeps the probabilities twice, as softmax's float32 result and in the dtype of the values), or
fused as PyTorch's flash attention is (it keeps q, k, v, its output and a log-sum-exp a query head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tunesmith.adapters import Adapter
from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.model.fused import PLAIN, rms_norm, rotate, swiglu
from tunesmith.model.llama import Attention, Block, Llama, RMSNorm
from tunesmith.model.seam import Context
from tunesmith.train.simulate import StepBytes, counting


def padded_bytes(
    model: Llama,
    adapter: Adapter,
    examples: Sequence[Example],
    micro_batch: int,
    *,
    recompute: bool = False,
    fused: bool = False,
) -> StepBytes:
    """Bytes that a plain step holds for the `micro_batch` longest rows, on a model on the meta device."""
    longest = sorted((len(e.ids) for e in examples), reverse=True)[:micro_batch] or [1]
    pack = _padded(model, longest[0], len(longest))
    ctx = model.context(pack.layout)
    block = partial(_block, 0 if fused else len(longest))
    with counting(model, adapter, pack) as count:
        h = model.embedded(pack.tokens, ctx)
        for layer in model.model.layers:
            h = checkpoint(block, layer, h, ctx, use_reentrant=False) if recompute else block(layer, h, ctx)
        count.forward()
        logits = model.lm_head(_norm(model.model.norm, h, ctx)[ctx.extra :], ctx).float()
        loss = functional.cross_entropy(logits[pack.where], pack.target)
        del h, logits
        count.loss()
        loss.backward()
    return count.found


def _padded(model: Llama, length: int, rows: int) -> Pack:
    ids, supervised = np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool)
    supervised[0] = False
    row = Example(ids, supervised, "padded")
    needs = replace(model.needs(), looks=())
    (pack,) = plan_packs([row] * rows, budget=length * rows * 2, share=False, device="meta", needs=needs)
    return pack


def _block(eager: int, block: nn.Module, h: Tensor, ctx: Context) -> Tensor:
    """`Block.forward` by the plain formulas; attention of `eager` rows written out, or fused (0)."""
    block = cast(Block, block)
    x = _norm(block.input_layernorm, h, ctx)
    h = h + block.after_attn(_attention(eager, block.self_attn, x, ctx), block, ctx, x)
    x = _norm(block.post_attention_layernorm, h, ctx)
    mlp = block.mlp
    y = mlp.down_proj(PLAIN[swiglu](mlp.gate_proj(x, ctx), mlp.up_proj(x, ctx)), ctx)
    return block.resid(h + block.after_mlp(y, block, ctx, x), block, ctx)


def _norm(norm: RMSNorm, x: Tensor, ctx: Context) -> Tensor:
    y = PLAIN[rms_norm](x, norm.weight, norm.eps)
    return norm.edit(y, norm, ctx, x) if len(norm.edit) else y


def _attention(eager: int, attention: Attention, x: Tensor, ctx: Context) -> Tensor:
    q = attention.q_proj(x, ctx).view(-1, attention.heads, attention.head_dim)
    k = attention.k_proj(x, ctx).view(-1, attention.kv_heads, attention.head_dim)
    v = attention.v_proj(x, ctx).view(-1, attention.kv_heads, attention.head_dim)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = _norm(attention.q_norm, q, ctx), _norm(attention.k_norm, k, ctx)
    q, k = PLAIN[rotate](q, ctx.cos, ctx.sin), PLAIN[rotate](k, ctx.cos, ctx.sin)
    if len(attention.past):
        k, v = attention.past((k, v), attention, ctx)
    group = attention.heads // attention.kv_heads
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = _Shapes.apply(q, k, v, eager)
    if len(attention.mix):
        out = attention.mix(out, attention, ctx, q)
    return attention.o_proj(out.flatten(1), ctx)


class _Shapes(torch.autograd.Function):
    """What attention holds, in shapes: nothing is computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, eager: int) -> Tensor:
        ctx.eager = eager
        if eager:
            shape = (eager, q.shape[1], len(q) // eager, len(q) // eager)
            q.new_empty(shape)  # the scores, which are let go
            kept = [q.new_empty(shape, dtype=torch.float32), q.new_empty(shape)]
        else:
            kept = [q.new_empty(q.shape[:2], dtype=torch.float32)]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, *kept = ctx.saved_tensors
        inner = torch.empty_like(kept[0]) if ctx.eager else None
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del inner
        return *found, None
