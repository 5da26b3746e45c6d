"""Products with dense weights, each by the fastest way that gives its numbers (docs/decisions.md, "Speed").

On a CPU, in float32, oneDNN asked directly is faster than torch's default library for

    few tokens, and a vocabulary's rows   without gradients
    every product                         where the default library leaves the processor's wide vectors unused

In bfloat16, where the processor only emulates it, a product is made of float32 copies, of a slice of W at a time, and
rounded once: what an emulated one comes to as well, many times faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.hardware import emulates_bfloat16, narrow_products
from tunesmith.model.native import kernels_for

SHORT, TALL = 64, 8192  # tokens up to which, and rows of W from which, oneDNN reads W faster
VECTORS = 4  # tokens up to which torch multiplies vectors, which it does in bfloat16 at the speed of memory
SLICE = 4 << 20  # weights whose float32 copy exists at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for x (tokens, columns) -> (tokens, rows)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        own = _emulated(x, weight) or _possible(x, weight) and narrow_products()
        return _Linear.apply(x, weight, bias) if own else functional.linear(x, weight, bias)
    if (len(x) <= SHORT or len(weight) >= TALL) and _possible(x, weight):
        return _onednn(x, weight, bias)
    return plain(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, in the way that is taken where gradients are asked for; it has none itself."""
    if len(x) > VECTORS and _emulated(x, weight):
        wide = x.float()
        parts = [functional.linear(wide, part.float()) for _, part in _slices(weight)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (y if bias is None else y + bias).to(x.dtype)
    if _possible(x, weight) and narrow_products():
        return _onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def back(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, (tokens, columns), for that of W x, (tokens, rows); it has none itself."""
    if _emulated(grad, weight):
        wide = torch.zeros(len(grad), weight.shape[1], device=grad.device)
        for rows, part in _slices(weight):
            wide.addmm_(grad[:, rows].float(), part.float())
        return wide.to(grad.dtype)
    if _possible(grad, weight) and narrow_products():
        return _onednn(grad, weight.t())
    return grad @ weight


def back_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of W, (rows, columns), for that of W x and x, (tokens, columns); it has none itself."""
    if _emulated(grad, x):
        return (grad.float().t() @ x.float()).to(grad.dtype)
    if _possible(grad, x) and narrow_products():
        return _onednn(grad.t(), x.t())
    return grad.t() @ x


def add_product(value: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """value + scale * W x for x (tokens, columns), value (tokens, rows)."""
    if _emulated(x, weight):
        return torch.add(value, linear(x, weight), alpha=scale)
    return torch.addmm(value, x, weight.t(), alpha=scale)


def batched(a: Tensor, b: Tensor) -> Tensor:
    """a b, (n, rows, columns), for stacks of matrices; it has no gradient."""
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _emulated(a, b) else torch.bmm(a, b)


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


def _emulated(x: Tensor, other: Tensor) -> bool:
    """Are both bfloat16, on a processor (or planned for one) that only emulates it?"""
    if x.dtype != torch.bfloat16 or other.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    here = x.is_cpu and other.is_cpu or x.is_meta and other.is_meta and kernels_for(x.new_empty(0)) is not None
    return here and len(x) > 0 and emulates_bfloat16()


def _slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight with at most SLICE numbers, and which they are."""
    size = max(1, SLICE // weight.shape[1])
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield rows, weight[rows]


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
