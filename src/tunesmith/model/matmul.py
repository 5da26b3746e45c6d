"""Products with dense weights, each by the faster of two libraries: torch's default one, or oneDNN asked directly.

In float32 on a CPU oneDNN has (docs/decisions.md, "Speed")

    few tokens, and a vocabulary's rows   without gradients
    every product                         where the default library leaves the processor's wide vectors unused

and the default library all the rest, where both are alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.hardware import narrow_products

SHORT, TALL = 64, 8192  # tokens up to which, and rows of W from which, oneDNN reads W faster


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for x (tokens, columns) -> (tokens, rows)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        wide = _possible(x, weight) and narrow_products()
        return _Linear.apply(x, weight, bias) if wide else functional.linear(x, weight, bias)
    if (len(x) <= SHORT or len(weight) >= TALL) and _possible(x, weight):
        return _onednn(x, weight, bias)
    return plain(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, by the library that is taken where gradients are asked for; it has none itself."""
    if _possible(x, weight) and narrow_products():
        return _onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def back(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, (tokens, columns), for that of W x, (tokens, rows); it has none itself."""
    if _possible(grad, weight) and narrow_products():
        return _onednn(grad, weight.t())
    return grad @ weight


def back_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of W, (rows, columns), for that of W x and x, (tokens, columns); it has none itself."""
    if _possible(grad, x) and narrow_products():
        return _onednn(grad.t(), x.t())
    return grad.t() @ x


class _Linear(torch.autograd.Function):
    """What autograd does with functional.linear, by oneDNN, whose operator has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (_, _, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            None if weight is None else back(grad, weight),
            None if x is None else back_weight(grad, x),
            grad.sum(0) if needs_bias else None,
        )


def _possible(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler has ways of its own
        return False
    ours = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return ours and x.ndim == 2 and len(x) > 0 and weight.is_contiguous() and _available()


@cache
def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
