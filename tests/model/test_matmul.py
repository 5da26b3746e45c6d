"""Products with dense weights: both libraries give the same values and gradients, and the rule takes the faster."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.laws.small import TINY, build, disturb, examples, packs_of
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.adapters import attach
from tunesmith.model import matmul, native
from tunesmith.model.matmul import (
    SHORT,
    TALL,
    VECTORS,
    add_product,
    back,
    back_weight,
    linear,
    plain,
    unrounded,
)
from tunesmith.model.quantize import quantize
from tunesmith.quant.storage import Spec
from tunesmith.train.loss import pack_loss

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="NOT TESTED: torch has no oneDNN")


@pytest.fixture(params=[False, True], ids=["default", "onednn"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every product is oneDNN's."""
    monkeypatch.setattr(matmul, "narrow_products", lambda: request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["native", "emulated"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is slower in bfloat16, as where it emulates it; slices are small."""
    monkeypatch.setattr(matmul, "slow_bfloat16", lambda: request.param)
    monkeypatch.setattr(matmul, "SLICE", 600)
    return request.param


class Libraries(TorchDispatchMode):
    """Counts the products of each library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "mkldnn::_linear_pointwise":
            self.found["onednn"] += 1
        elif name in ("aten::mm", "aten::addmm"):
            self.found["default"] += 1
        return func(*args, **(kwargs or {}))


class Narrow(TorchDispatchMode):
    """Names of the products of matrices that are computed in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::mm", "aten::addmm", "aten::bmm") and args[-1].dtype == torch.bfloat16:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, TALL)], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 8, SHORT, SHORT + 1, 300])
@pytest.mark.parametrize("rows", [40, TALL])
def test_both_libraries_give_the_same(
    rows: int, tokens: int, dtype: torch.dtype, bias: torch.Tensor | None, narrow: bool
) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, x = torch.randn(rows, 48, generator=draw).to(dtype), torch.randn(tokens, 48, generator=draw).to(dtype)
    bias = None if bias is None else bias[:rows].to(dtype)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    close = {"rtol": 0.02 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
    for product, always in ((linear, tokens <= SHORT or rows == TALL), (plain, False)):
        with Libraries() as libraries:
            found = product(x, weight, bias)
        torch.testing.assert_close(found.double(), exact, **close)
        fast = torch.backends.mkldnn.is_available() and dtype == torch.float32 and tokens > 0 and (narrow or always)
        assert bool(libraries.found["onednn"]) == fast
    grad = torch.randn(tokens, rows, generator=draw).to(dtype)
    close["atol"] = 0.5 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(back(grad, weight).double(), grad.double() @ weight.double(), **close)
    torch.testing.assert_close(back_weight(grad, x).double(), grad.double().t() @ x.double(), **close)


@pytest.mark.parametrize("strides", ["whole", "every second column", "transposed", "expanded"])
@pytest.mark.parametrize("asked", ["x", "weight", "all"])
def test_gradients_are_those_of_autograd(asked: str, strides: str, narrow: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    made = {
        "whole": lambda: torch.randn(7, 12, generator=draw),
        "every second column": lambda: torch.randn(7, 24, generator=draw)[:, ::2],
        "transposed": lambda: torch.randn(12, 7, generator=draw).t(),
        "expanded": lambda: torch.randn(1, 12, generator=draw).expand(7, 12),
    }[strides]()
    given = (made, torch.randn(5, 12, generator=draw), torch.randn(5, generator=draw))
    found, expected = [], []
    for product, grads in ((linear, found), (functional.linear, expected)):
        tensors = [t.detach().clone() if strides == "whole" else t.detach() for t in given]
        for tensor, name in zip(tensors, ("x", "weight", "bias"), strict=True):
            tensor.requires_grad_(asked in (name, "all"))
        product(*tensors).square().sum().backward()
        grads += [t.grad for t in tensors]
        for tensor in tensors:
            tensor.grad = None
    for ours, autograd in zip(found, expected, strict=True):
        assert (ours is None) == (autograd is None)
        if ours is not None:
            torch.testing.assert_close(ours, autograd)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 40).bfloat16()], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [1, VECTORS, VECTORS + 1, 70])
def test_in_bfloat16_a_product_is_rounded_once(tokens: int, bias: torch.Tensor | None, emulated: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 48, generator=draw).bfloat16() for n in (tokens, 40))
    grad, added = torch.randn(tokens, 40, generator=draw).bfloat16(), torch.randn(tokens, 40, generator=draw).bfloat16()
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    ulp = {"rtol": 2**-8, "atol": 1e-2}
    torch.testing.assert_close(linear(x, weight, bias).double(), exact, **ulp)
    torch.testing.assert_close(back(grad, weight).double(), grad.double() @ weight.double(), **ulp)
    torch.testing.assert_close(back_weight(grad, x).double(), grad.double().t() @ x.double(), rtol=2**-8, atol=0.05)
    scaled = added.double() + 0.5 * (x.double() @ weight.double().t())
    torch.testing.assert_close(add_product(added, x, weight, 0.5).double(), scaled, rtol=2**-7, atol=0.05)
    assert {t.dtype for t in (linear(x, weight), back(grad, weight), back_weight(grad, x))} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [3, 12, 13, 40])
def test_logits_stay_in_float32_where_products_are_made_in_it(rows: int, emulated: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 48, generator=draw).bfloat16() for n in (7, rows))
    y = unrounded(x, weight)
    assert y.dtype == (torch.float32 if emulated else torch.bfloat16)
    close = {"rtol": 1e-5, "atol": 1e-4} if emulated else {"rtol": 2**-8, "atol": 1e-2}
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), **close)
    dx = back(y, weight)
    assert dx.dtype == y.dtype
    close["atol"] = 1e-3 if emulated else 0.2  # sums of up to 40 numbers
    torch.testing.assert_close(dx.double(), y.double() @ weight.double(), **close)


def test_no_product_in_bfloat16_is_left_where_it_is_emulated(emulated: bool) -> None:
    """A step with LoRA on every linear, with dropout, attention and head: its products and those of its backward."""
    if native.built()[0] is None:
        pytest.skip("NOT TESTED: no C++ compiler here")
    model = build(TINY, torch.bfloat16)
    adapter = attach(model, {"kind": "lora", "rank": 4, "dropout": 0.1, "target_modules": "all-linear"})
    disturb(adapter)
    model.train()
    (pack,) = packs_of(model, examples(), share=False)
    ctx = model.context(pack.layout)
    with Narrow() as narrow:
        pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, rows=pack.read)).backward()
    assert bool(narrow.found) != emulated


@pytest.mark.parametrize("spec", [{"kind": "lora", "rank": 4}, {"kind": "lora", "rank": 4, "dropout": 0.2}], ids=str)
def test_a_step_in_bfloat16_has_the_same_gradients(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for emulated, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float64)):
        monkeypatch.setattr(matmul, "slow_bfloat16", lambda emulated=emulated: emulated)
        model = build(TINY, torch.bfloat16).to(dtype)
        adapter = attach(model, spec)
        disturb(adapter)
        model.train()
        (pack,) = packs_of(model, examples(), share=False)
        ctx = model.context(pack.layout)
        torch.manual_seed(5)
        pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, rows=pack.read)).backward()
        found.append(torch.cat([p.grad.flatten().double() for p in adapter.trainable.values()]))
    ours, torchs, exact = found
    assert (ours - exact).norm() <= 1.2 * (torchs - exact).norm() + 1e-6


@needs_onednn
@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("spec", [{"kind": "lora", "rank": 4}, {"kind": "full"}], ids=lambda spec: spec["kind"])
def test_a_step_by_onednn_is_the_step(
    spec: dict[str, Any], quant: str | None, recompute: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quant and spec["kind"] == "full":
        pytest.skip("a quantized base is frozen")
    steps, counts = [], []
    for narrow in (False, True):
        monkeypatch.setattr(matmul, "narrow_products", lambda narrow=narrow: narrow)
        model = build(TINY, torch.float32)
        if quant:
            quantize(model, Spec(quant, block_size=8))
        adapter = attach(model, spec)
        disturb(adapter)
        (pack,) = packs_of(model, examples())
        ctx = model.context(pack.layout)
        with Libraries() as libraries:
            loss = pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, recompute, pack.read))
            loss.backward()
        steps.append([loss.detach(), *(p.grad for p in adapter.trainable.values())])
        counts.append(libraries.found)
    for ours, default in zip(*reversed(steps), strict=True):
        torch.testing.assert_close(ours, default, rtol=1e-4, atol=1e-5)
    # what adapters add is small, and stays with the default library
    blocks = TINY.num_hidden_layers
    assert counts[1]["onednn"] >= 12 * blocks > counts[0]["onednn"]  # 7 and 7 a block, the first block's first fewer
    assert counts[1]["default"] < counts[0]["default"]
