"""Products with dense weights, each by the fastest way that gives its numbers (docs/decisions.md, "Speed").

On a CPU, in float32, oneDNN asked directly is faster than torch's default library for

    few tokens, and a vocabulary's rows   without gradients
    every product                         where the default library leaves the processor's wide vectors unused

In bfloat16, where the processor is slower in it or only emulates it, a product is made of float32 copies, of a slice of
W at a time, and rounded once, which is what the processor's own comes to as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.hardware import narrow_products, slow_bfloat16
from tunesmith.model.native import kernels_for

SHORT, TALL = 64, 8192  # tokens up to which, and rows of W from which, oneDNN reads W faster
VECTORS = 4  # tokens up to which torch multiplies vectors, which it does in bfloat16 at the speed of memory
NARROW = 64  # columns of a weight whose gradient is made turned
SLICE = 2 << 20  # weights whose float32 copy exists at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for x (tokens, columns) -> (tokens, rows)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        own = widened(x, weight) or _possible(x, weight) and narrow_products()
        return _Linear.apply(x, weight, bias) if own else functional.linear(x, weight, bias)
    if (len(x) <= SHORT or len(weight) >= TALL) and _possible(x, weight):
        return _onednn(x, weight, bias)
    return plain(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, in the way that is taken where gradients are asked for; it has none itself.

    It is of x's type, which may be float32 where that of W is bfloat16.
    """
    if len(x) > VECTORS and widened(x, weight) or _mixed(x, weight):
        y = _wide_product(x, weight)
        return (y if bias is None else y + bias).to(x.dtype)
    if _possible(x, weight) and narrow_products():
        return _onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def unrounded(x: Tensor, weight: Tensor) -> Tensor:
    """W x, (tokens, rows), in float32 where the product is made there anyhow, else in x's type; it has no gradient."""
    return _wide_product(x, weight) if widened(x, weight) else linear(x, weight)


def back(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, (tokens, columns), for that of W x, (tokens, rows); it has none itself.

    It is of the type of `grad`, which may be what `unrounded` gave.
    """
    if widened(grad, weight) or _mixed(grad, weight):
        return _wide_back(grad, weight).to(grad.dtype)
    if _possible(grad, weight) and narrow_products():
        return _onednn(grad, weight.t())
    return grad @ weight


def back_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of W, (rows, columns), for that of W x and x, (tokens, columns); it has none itself."""
    if widened(grad, x):
        return back_weight(grad.float(), x.float()).to(grad.dtype)
    if _possible(grad, x) and narrow_products():
        return _onednn(grad.t(), x.t())
    if x.shape[1] <= NARROW < grad.shape[1]:  # low-rank: the default library is some three times as fast turned
        return (x.t() @ grad).t().contiguous()
    return grad.t() @ x


def add_product(value: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """value + scale * W x for x (tokens, columns), value (tokens, rows)."""
    if widened(x, weight):
        return torch.add(value, linear(x, weight), alpha=scale)
    return torch.addmm(value, x, weight.t(), alpha=scale)


def widened(x: Tensor, other: Tensor) -> bool:
    """Are both bfloat16, on a processor (or planned for one) that is faster in float32, and so multiplies in it?"""
    if x.dtype != torch.bfloat16 or other.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    here = x.is_cpu and other.is_cpu or x.is_meta and other.is_meta and kernels_for(x.new_empty(0)) is not None
    return here and len(x) > 0 and slow_bfloat16()


class _Linear(torch.autograd.Function):
    """What autograd does with functional.linear, by the ways of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return plain(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (_, _, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            None if weight is None else back(grad, weight),
            None if x is None else back_weight(grad, x),
            grad.sum(0) if needs_bias else None,
        )


def _mixed(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and weight.dtype == torch.bfloat16


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """W x in float32; of W a slice's copy exists at once."""
    wide, size = x.float(), _slice_size(weight)
    if size >= len(weight):
        return functional.linear(wide, weight.float())
    y = wide.new_empty(len(x), len(weight))
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        torch.mm(wide, weight[rows].float().t(), out=y[:, rows])
    return y


def _wide_back(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W in float32, likewise."""
    size = _slice_size(weight)
    found = grad[:, :size].float() @ weight[:size].float()
    for start in range(size, len(weight), size):
        rows = slice(start, start + size)
        found.addmm_(grad[:, rows].float(), weight[rows].float())
    return found


def _slice_size(weight: Tensor) -> int:
    """How many of its rows have at most SLICE numbers."""
    return max(1, SLICE // weight.shape[1])


def _possible(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler has ways of its own
        return False
    ours = x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32
    return ours and x.ndim == 2 and len(x) > 0 and weight.is_contiguous() and _available()


@cache
def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
