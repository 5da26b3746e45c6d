"""A frozen product and the low-rank update that is added to it, as one step of autograd:

    y = W x + s B a,  a = A x

    forward    kept: x and a
    backward   g = s B^T dy     dB = s dy a^T     dA = g x^T     dx = W^T dy + A^T g

Apart, the update is a value as large as y, and so is its gradient; here both are added in place. And where products are
made of float32 copies (matmul.py) x and dy are copied once rather than for each product, and y and dx rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.model.matmul import back, back_weight, plain, widened
from tunesmith.model.product import dense, frozen_product
from tunesmith.quant.storage import Storage

if TYPE_CHECKING:
    from tunesmith.model.recompute import Kept

LowRank = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank) and s


def adapted_product(
    x: Tensor, weight: Tensor, storage: Storage | None, update: LowRank, kept: Kept | None = None
) -> Tensor:
    """W x + s B A x for x (tokens, in) -> (tokens, out); gradients reach x, A and B.

    W is `weight`, (out, in), or what `storage` reads in it. The result may be `kept`, and is then not computed again.
    """
    out: Tensor = _Adapted.apply(x, weight, storage, *update, kept)
    return out


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        storage: Storage | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        kept: Kept | None,
    ) -> Tensor:
        wide = torch.float32 if widened(x, weight if storage is None else x) else x.dtype
        copy = x.to(wide)
        inner = plain(copy, A.to(wide))

        def value() -> Tensor:
            y = plain(copy, weight) if storage is None else frozen_product(copy, weight, storage, x.dtype)
            return y.addmm_(inner, B.to(wide).t(), alpha=scale).to(x.dtype)

        ctx.wide, ctx.storage, ctx.scale = wide, storage, scale
        ctx.save_for_backward(x, weight, A, B, inner)
        return value() if kept is None else kept.value(x, weight, len(B), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, inner = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        copy = grad.to(ctx.wide)
        of_inner = back(copy, B.to(ctx.wide)).mul_(ctx.scale)
        of_x = None
        if needs_x:
            whole = weight if ctx.storage is None else dense(weight, ctx.storage, x.dtype)
            of_x = back(copy, whole).addmm_(of_inner, A.to(ctx.wide)).to(x.dtype)
        of_A = back_weight(of_inner, x.to(ctx.wide)).to(A.dtype) if needs_A else None
        of_B = back_weight(copy, inner).mul_(ctx.scale).to(B.dtype) if needs_B else None
        return of_x, None, None, of_A, of_B, None, None
