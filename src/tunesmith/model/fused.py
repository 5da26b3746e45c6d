"""The element-wise parts of a block, each with a backward of its own that keeps only what it needs.

Autograd on the plain formula keeps every float32 intermediate; these keep the inputs in their own dtype. `PLAIN`
holds the formulas themselves, as autograd twins: tests/laws compares each pair, values and gradients. On a CPU with a
compiler each is one native kernel (native.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.model.native import kernels_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean in float32."""
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (tokens, heads, head_dim), first half against second half, as Hugging Face lays it out."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin, 1.0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        kernels = kernels_for(grad, x, weight)
        if kernels is not None and not ctx.needs_input_grad[1]:
            return kernels.rms_norm_backward(grad, x, weight, scale), None, None
        normed = _wide(x) * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (_wide(grad) * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        inner = _wide(grad) * _wide(weight)
        inner = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale
        return inner.to(x.dtype), grad_weight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms(x) with a last dimension of 1."""
    kernels = kernels_for(x, weight)
    if kernels is not None:
        y, scale = kernels.rms_norm(x, weight, eps)
        return y, scale.view(*x.shape[:-1], 1)
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, scale


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad.contiguous(), cos, sin, -1.0), None, None  # the inverse rotation


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    kernels = kernels_for(x, cos, sin)
    if kernels is not None:
        return kernels.rotate(x, cos, sin, sign)
    return _turn(x, cos[:, None], sign * sin[:, None])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        kernels = kernels_for(grad, gate, up)
        if kernels is not None:
            return kernels.swiglu_backward(grad, gate, up)
        sigmoid = torch.sigmoid(_wide(gate))
        silu = _wide(gate) * sigmoid
        wide = _wide(grad)
        grad_gate = wide * _wide(up) * (sigmoid + silu * (1 - sigmoid))
        return grad_gate.to(gate.dtype), (wide * silu).to(up.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    kernels = kernels_for(gate, up)
    return functional.silu(gate) * up if kernels is None else kernels.swiglu(gate, up)


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, cos[:, None], sin[:, None])


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


PLAIN: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    rms_norm: _plain_rms_norm,
    rotate: _plain_rotate,
    swiglu: _plain_swiglu,
}
