"""The gated MLP with frozen weights as one step of autograd, where products are made of float32 copies (matmul.py):

    y = D h,   h = silu(gate) * up,   gate = G x,   up = U x

    forward    kept: gate and up, rounded
    backward   dh = D^T dy      dgate, dup of dh, gate and up      dx = G^T dgate + U^T dup

Apart, x is copied for each of two products, and h, dh, dgate and dup are rounded only to be copied again; here they
stay in float32 from one product to the next, and y and dx are rounded once. The twin is the other way of `MLP.forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.model.matmul import back, plain, widened
from tunesmith.model.native import Kernels, kernels_for
from tunesmith.model.product import dense, frozen_product
from tunesmith.quant.storage import Storage

Frozen = tuple[Tensor, Storage | None]  # a weight, (out, in), or what a storage reads in it


def gated_mlp(x: Tensor, gate: Frozen, up: Frozen, down: Frozen) -> Tensor | None:
    """y for x, both (tokens, hidden_size), with a gradient for x alone; None where the general way is needed."""
    if not torch.is_grad_enabled() or not x.requires_grad or kernels_for(x) is None:
        return None
    for weight, storage in (gate, up, down):
        if weight.requires_grad or not widened(x, weight if storage is None else x):
            return None
    out: Tensor = _GatedMLP.apply(x, (gate[1], up[1], down[1]), gate[0], up[0], down[0])
    return out


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, storages: tuple[Storage | None, ...], *weights: Tensor) -> Tensor:
        def product(x: Tensor, at: int) -> Tensor:
            storage = storages[at]
            return plain(x, weights[at]) if storage is None else frozen_product(x, weights[at], storage, dtype)

        copy, dtype = x.float(), x.dtype
        gate, up = product(copy, 0), product(copy, 1)
        kept = _kernels(x).swiglu_wide(gate, up, dtype)  # gate has become h
        ctx.save_for_backward(*kept, *weights)
        ctx.storages = storages
        return product(gate, 2).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *weights = ctx.saved_tensors

        def returned(value: Tensor, at: int) -> Tensor:
            storage = ctx.storages[at]
            return back(value, weights[at] if storage is None else dense(weights[at], storage, grad.dtype))

        of_gate = returned(grad.float(), 2)
        of_up = _kernels(gate).swiglu_backward_wide(of_gate, gate, up)  # of_gate was dh until here
        of_x = returned(of_gate, 0).add_(returned(of_up, 1))
        return of_x.to(grad.dtype), None, None, None, None


def _kernels(x: Tensor) -> Kernels:
    found = kernels_for(x)
    if found is None:
        raise RuntimeError("gated MLP: the native kernels were there in the forward and are gone")
    return found
