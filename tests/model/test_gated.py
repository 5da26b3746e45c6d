"""The gated MLP in one step: values and gradients are those of its parts, nearer to the exact ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.laws.small import TINY
from torch import Tensor
from torch.nn import functional

from tunesmith.adapters.lora import LoRADelta
from tunesmith.model import gated, llama, matmul, native
from tunesmith.model.gated import gated_mlp
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.llama import MLP
from tunesmith.model.recompute import Kept
from tunesmith.model.seam import Context
from tunesmith.quant.storage import Spec, quantize_weight

TOKENS = 21
CONFIG = replace(TINY, hidden_size=64, intermediate_size=96)
STORAGES = [None, Spec("nf4"), Spec("int8"), Spec("llm-int8")]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is slower in bfloat16, with a compiler."""
    if native.built()[0] is None:
        pytest.skip("NOT TESTED: no C++ compiler here")
    monkeypatch.setattr(matmul, "slow_bfloat16", lambda: True)


def context(**options: Any) -> Context:
    return Context(Layout.single(TOKENS), torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1), **options)


def made(spec: Spec | None = None, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> MLP:
    """A frozen MLP."""
    torch.manual_seed(0)
    mlp = MLP(replace(CONFIG, mlp_bias=bias)).to(dtype).requires_grad_(False)
    for linear in mlp.children():
        assert isinstance(linear, Linear)
        weight = torch.randn(linear.out_features, linear.in_features) * linear.in_features**-0.5
        if bias:
            linear.bias.copy_(torch.randn(linear.out_features))
        if spec is None:
            linear.weight.copy_(weight)
        else:
            linear.hold(*quantize_weight(weight, spec), dtype)
    return mlp


def given(dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(mlp: MLP, x: Tensor) -> list[Tensor]:
    """The output, and the gradient of x."""
    x = x.clone().requires_grad_()
    y = mlp(x, context())
    torch.manual_seed(2)
    return [y.detach(), *torch.autograd.grad(y, [x], torch.randn(x.shape).to(y.dtype))]


@pytest.mark.parametrize("tokens", [1, 4, TOKENS])
@pytest.mark.parametrize("spec", STORAGES, ids=lambda spec: spec.kind if spec else "dense")
def test_it_is_nearer_to_the_exact_step(spec: Spec | None, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = made(spec), given(tokens=tokens)
    ours = step(mlp, x)
    monkeypatch.setattr(llama, "gated_mlp", lambda *_: None)
    theirs = step(mlp, x)
    gate, up, down = (linear.dense_weight(torch.bfloat16).double() for linear in mlp.children())
    wide = x.double().requires_grad_()
    exact = (functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T
    torch.manual_seed(2)
    (of_x,) = torch.autograd.grad(exact, [wide], torch.randn(x.shape).bfloat16().double())
    rounding = 0.03 if spec is not None and spec.kind == "llm-int8" else 0.0  # which rounds x and h as well
    for one, other, truth in zip(ours, theirs, [exact.detach(), of_x], strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        error = (one.double() - truth).norm() / truth.norm()
        assert error <= (1.1 if tokens > 1 else 1.4) * (other.double() - truth).norm() / truth.norm()
        assert error < 0.006 + rounding


def filled(mlp: MLP) -> MLP:
    torch.manual_seed(3)
    sizes = CONFIG.intermediate_size, CONFIG.hidden_size
    mlp.up_proj.edit["a"] = LoRADelta(torch.randn(2, sizes[1]), torch.randn(sizes[0], 2), 0.1, 0.0, None)
    return mlp


def trained(mlp: MLP) -> MLP:
    mlp.down_proj.weight.requires_grad_()
    return mlp


TAKEN = {
    "frozen and bare": (made, {}, True),
    "an adapter acts": (lambda: filled(made()), {}, False),
    "a weight trains": (lambda: trained(made()), {}, False),
    "it has biases": (lambda: made(bias=True), {}, False),
    "products are kept": (made, {"kept": Kept()}, False),
    "float32": (lambda: made(dtype=torch.float32), {}, False),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_general_way_is_taken_where_it_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, wanted = TAKEN[name]
    taken = []
    monkeypatch.setattr(
        gated._GatedMLP, "apply", lambda *args, true=gated._GatedMLP.apply: taken.append(args) or true(*args)
    )
    mlp = make()
    x = given(mlp.down_proj.weight.dtype)
    found = mlp(x.clone().requires_grad_(), context(**options))
    assert bool(taken) == wanted
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), mlp(x, context()), rtol=0.02, atol=0.02)
    assert len(taken) == wanted  # not without gradients


def test_x_without_a_gradient_and_a_fast_processor_take_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [(linear.weight, linear.quant) for linear in made().children()]
    assert gated_mlp(given().requires_grad_(), *weights) is not None
    assert gated_mlp(given(), *weights) is None
    monkeypatch.setattr(matmul, "slow_bfloat16", lambda: False)
    assert gated_mlp(given().requires_grad_(), *weights) is None


def test_not_finite_numbers_pass_through() -> None:
    """The guards of training rely on it."""
    x = given()
    x[3, 5] = float("nan")
    y, of_x = step(made(), x)
    assert y[3].isnan().all() and y[:3].isfinite().all() and of_x[3].isnan().any() and of_x[4:].isfinite().all()
