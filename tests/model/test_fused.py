"""Each hand-written backward against autograd on the plain formula, and what it keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.model.fused import PLAIN, rms_norm, rotate, swiglu


def arguments(op: Callable[..., Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[object]]:
    """The operator's differentiable inputs, and the others."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(True)

    if op is rms_norm:
        return [random(5, 3, 8), random(8)], [1e-5]
    if op is rotate:
        angle = torch.randn(5, 4, generator=draw, dtype=torch.float64)
        return [random(5, 3, 8)], [angle.cos().to(dtype), angle.sin().to(dtype)]
    return [random(5, 8), random(5, 8)], []


def values(op: Callable[..., Tensor], inputs: list[Tensor], rest: list[object], grad: Tensor) -> list[Tensor]:
    out = op(*inputs, *rest)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.__name__)
def test_twin_in_float64(op: Callable[..., Tensor]) -> None:
    inputs, rest = arguments(op, torch.float64)
    grad = torch.randn_like(inputs[0])
    for a, b in zip(values(op, inputs, rest, grad), values(PLAIN[op], inputs, rest, grad), strict=True):
        assert (a - b).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda *x: op(*x, *rest), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.__name__)
def test_no_farther_from_float64_than_the_twin(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs, rest = arguments(op, dtype)
    grad = torch.randn_like(inputs[0])
    wide = [t.detach().double().requires_grad_(True) for t in inputs]
    wide_rest = [t.double() if isinstance(t, Tensor) else t for t in rest]
    exact = values(PLAIN[op], wide, wide_rest, grad.double())
    ours, theirs = values(op, inputs, rest, grad), values(PLAIN[op], inputs, rest, grad)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        slack = 2 if dtype == torch.float32 else 1.1  # float32: another order of the same few roundings
        assert (a - e).norm() <= slack * (b - e).norm() + 1e-12


@pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.__name__)
def test_keeps_nothing_wide(op: Callable[..., Tensor]) -> None:
    """In bfloat16 no float32 copy of an activation outlives the forward (a row's one scale may)."""
    inputs, rest = arguments(op, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(*inputs, *rest)
    assert all(t.dtype == torch.bfloat16 or t.shape[-1] == 1 for t in kept)


def test_frozen_inputs_get_no_gradient() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None
    frozen, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    rms_norm(frozen, weight, 1e-5).sum().backward()
    assert frozen.grad is None and weight.grad is not None
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    swiglu(gate, up).sum().backward()
    assert up.grad is None


def test_rotation_keeps_lengths_and_turns_back() -> None:
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    angle = torch.randn(5, 3, dtype=torch.float64)
    turned = rotate(x, angle.cos(), angle.sin())
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(rotate(turned, angle.cos(), -angle.sin()), x)
