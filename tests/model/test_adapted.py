"""A frozen product with its low-rank update in one step: values and gradients are those of the two apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.adapters.lora import LoRADelta
from tunesmith.model import linear as linear_file
from tunesmith.model import matmul
from tunesmith.model.adapted import adapted_product
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.product import FEW
from tunesmith.model.recompute import Kept
from tunesmith.model.seam import Context
from tunesmith.quant.storage import Spec, quantize_weight

TOKENS, IN, OUT, RANK = 21, 64, 40, 3
STORAGES = [None, Spec("nf4"), Spec("int8"), Spec("llm-int8")]


@pytest.fixture(params=[False, True], ids=["native", "emulated"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is slower in bfloat16."""
    monkeypatch.setattr(matmul, "slow_bfloat16", lambda: request.param)
    return request.param


def context(**options: Any) -> Context:
    return Context(Layout.single(TOKENS), torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1), **options)


def made(dtype: torch.dtype, spec: Spec | None, *names: str, bias: bool = False) -> Linear:
    """A frozen Linear with a LoRA of each name."""
    torch.manual_seed(0)
    host = Linear(IN, OUT, bias).to(dtype).requires_grad_(False)
    weight = torch.randn(OUT, IN)
    if bias:
        host.bias.copy_(torch.randn(OUT))
    if spec is None:
        host.weight.copy_(weight)
    else:
        host.hold(*quantize_weight(weight, spec), dtype)
    for name in names:
        host.edit[name] = LoRADelta(torch.randn(RANK, IN) * 0.3, torch.randn(OUT, RANK), 1.7, 0.0, None)
    return host


def step(host: Linear, ctx: Context, x: Tensor) -> list[Tensor]:
    """The output, and gradients of x, A and B."""
    x = x.clone().requires_grad_()
    y = host(x, ctx)
    parameters = [p for p in host.edit.parameters() if p.requires_grad]
    torch.manual_seed(2)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.randn(len(x), OUT).to(y.dtype))]


def apart(host: Linear, ctx: Context, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "_update", lambda self, ctx: None)
        return step(host, ctx, x)


def given(dtype: torch.dtype, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("spec", STORAGES, ids=lambda spec: spec.kind if spec else "dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_two_apart(
    dtype: torch.dtype, spec: Spec | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = made(dtype, spec, "a", bias=bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6  # the update's own numbers are float32
    found, expected = step(host, context(), given(dtype)), apart(host, context(), given(dtype), monkeypatch)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("tokens", [1, 4, FEW, TOKENS])
@pytest.mark.parametrize("spec", STORAGES, ids=lambda spec: spec.kind if spec else "dense")
def test_in_bfloat16_it_is_nearer_to_the_exact_step(
    spec: Spec | None, tokens: int, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, x = made(torch.bfloat16, spec, "a"), given(torch.bfloat16, tokens)
    ours, theirs = step(host, context(), x), apart(host, context(), x, monkeypatch)
    weight = host.dense_weight(torch.bfloat16).double()
    A, B = (p.detach().double().requires_grad_() for p in host.edit.parameters())
    wide = x.double().requires_grad_()
    exact = wide @ weight.T + 1.7 * (wide @ A.T) @ B.T
    torch.manual_seed(2)
    grads = torch.autograd.grad(exact, [wide, A, B], torch.randn(tokens, OUT).bfloat16().double())
    rounding = 0.03 if spec is not None and spec.kind == "llm-int8" else 0.0  # which rounds x as well
    for one, other, truth in zip(ours, theirs, [exact.detach(), *grads], strict=True):
        assert one.dtype == other.dtype
        error = (one.double() - truth).norm() / truth.norm()
        assert error <= 1.2 * (other.double() - truth).norm() / truth.norm() + 1e-6
        assert error < 0.008 + rounding


def test_x_without_a_gradient_gets_none() -> None:
    host, x = made(torch.float32, None), given(torch.float32)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((RANK, IN), (OUT, RANK)))
    y = adapted_product(x, host.weight, None, (A, B, 0.5))
    torch.testing.assert_close(y, x @ host.weight.T + 0.5 * (x @ A.T) @ B.T)
    of_A, of_B = torch.autograd.grad(y.sum(), [A, B])
    torch.testing.assert_close(of_A, 0.5 * torch.outer(B.sum(0), x.sum(0)))
    torch.testing.assert_close(of_B, 0.5 * (x @ A.T).sum(0).expand(OUT, RANK))


TAKEN = {
    "one update": ({}, ("a",), True),
    "of two, one acts": ({"adapters": ("b",)}, ("a", "b"), True),
    "two act": ({}, ("a", "b"), False),
    "none acts": ({"adapters": ()}, ("a",), False),
    "on some rows": ({"routes": {"a": torch.arange(3)}}, ("a",), False),
    "products are kept": ({"kept": Kept()}, ("a",), True),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_general_way_is_taken_where_it_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, names, wanted = TAKEN[name]
    calls = []
    monkeypatch.setattr(linear_file, "adapted_product", lambda *args: calls.append(args) or adapted_product(*args))
    host = made(torch.float32, None, *names)
    found = host(given(torch.float32).requires_grad_(), context(**options))
    assert bool(calls) == wanted
    with torch.no_grad():
        torch.testing.assert_close(found, host(given(torch.float32), context(**{**options, "kept": None})))
    assert len(calls) == wanted  # not without gradients


def test_a_weight_that_trains_or_dropout_takes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_file, "adapted_product", None)
    x = given(torch.float32).requires_grad_()
    host = made(torch.float32, None, "a")
    host.weight.requires_grad_()
    host(x, context()).sum().backward()
    assert host.weight.grad is not None
    host = made(torch.float32, None)
    host.edit["a"] = LoRADelta(torch.randn(RANK, IN), torch.randn(OUT, RANK), 1.0, 0.5, None)
    host.train()
    host(x, context())
