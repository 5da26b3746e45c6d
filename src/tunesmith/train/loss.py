"""The loss of a pack: cross-entropy at the targets only, in chunks, gradients of the hidden states formed in the same
pass.

    sum_i weight_i * -log softmax(lm_head(hidden[read[place_i]]))[target_i]

Logits of a whole row never exist. Where the head, its edits or a tied embedding train, their gradients come from the
same chunks. The caller divides by the number of supervised tokens of the *global* batch, so that neither the size of
packs nor the number of processes changes the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.data.pack import Pack
from tunesmith.model.llama import HEAD_ROWS, Llama
from tunesmith.model.matmul import back, unrounded
from tunesmith.model.native import kernels_for
from tunesmith.model.seam import Context


def pack_loss(model: Llama, pack: Pack, ctx: Context, hidden: Tensor) -> Tensor:
    """Summed weighted cross-entropy of `pack`, a scalar, float32 (float64 stays), for the states at `pack.read`."""
    trained = [p for p in model.lm_head.parameters() if p.requires_grad]
    rows = hidden.index_select(0, pack.place)
    return _ChunkedLoss.apply(rows, model, ctx, pack.target, pack.weight, *trained)


def plain_loss(model: Llama, pack: Pack, ctx: Context, hidden: Tensor) -> Tensor:
    """The same by autograd, all logits at once: the twin that `pack_loss` is held against."""
    logits = model.logits(hidden.index_select(0, pack.place), ctx)
    losses = functional.cross_entropy(logits, pack.target, reduction="none")
    return (losses * pack.weight.to(losses.dtype)).sum()


class _ChunkedLoss(torch.autograd.Function):
    """The backward only scales gradients that the forward has already formed."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, model: Llama, context: Context, target: Tensor, weight: Tensor, *trained: Tensor
    ) -> Tensor:
        needs_rows, head = ctx.needs_input_grad[0], model.lm_head
        plain = not (trained or len(head.input) or len(head.edit) or head.bias is not None)
        kernels = kernels_for(rows, head.weight) if plain else None
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_trained = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for start in range(0, len(rows), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            if kernels is not None and grad_rows is not None:
                logits = unrounded(rows[part], head.weight)
                total += kernels.cross_entropy(logits, target[part], weight[part]).sum()
                grad_rows[part] = back(logits, head.weight)  # the logits have become their gradient
                continue
            with torch.enable_grad():
                chunk = rows[part].detach().requires_grad_(needs_rows)
                losses = functional.cross_entropy(model.logits(chunk, context), target[part], reduction="none")
                loss = (losses * weight[part].to(losses.dtype)).sum()
                wanted = ([chunk] if needs_rows else []) + list(trained)
                grads = list(torch.autograd.grad(loss, wanted, allow_unused=True)) if wanted else []
            total += loss.detach()
            if grad_rows is not None:
                grad_rows[part] = grads.pop(0)
            for kept, new in zip(grad_trained, grads, strict=True):
                if new is not None:  # None: of an adapter that does not act on this batch
                    kept += new
        ctx.save_for_backward(*([] if grad_rows is None else [grad_rows]), *grad_trained)
        ctx.has_rows, ctx.dtypes = needs_rows, [p.dtype for p in trained]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_rows = saved.pop(0) * grad if ctx.has_rows else None
        if grad_rows is not None:
            grad_rows = grad_rows.to(ctx.saved_tensors[0].dtype)
        trained = [(g * grad).to(dtype) for g, dtype in zip(saved, ctx.dtypes, strict=True)]
        return grad_rows, None, None, None, None, *trained
