"""Products with quantized weights: every way of reading gives the same matrix, and gradients are its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from tunesmith.model import native
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.product import FEW, dense, product
from tunesmith.model.seam import Context
from tunesmith.quant.storage import Spec, quantize_weight

needs_compiler = pytest.mark.skipif(native.built()[0] is None, reason=f"NOT TESTED: {native.built()[1]}")
SPECS = [
    Spec("nf4"),
    Spec("fp4", 32, False),
    Spec("nf3"),
    Spec("nf2", 16),
    Spec("int4", 128),
    Spec("int8"),
    Spec("llm-int8"),
]
WEIGHT = torch.randn(40, 192, generator=torch.Generator().manual_seed(0))
WEIGHT[3, :64] = 0


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    yield
    native.select("auto")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_native_kernel_reads_the_same_bits(spec: Spec, dtype: torch.dtype) -> None:
    packed, storage = quantize_weight(WEIGHT, spec)
    found = dense(packed, storage, dtype)
    native.select("torch")
    assert torch.equal(found, storage.dense(packed, dtype))


@pytest.mark.parametrize("shape", [(5, 13), (500, 20), (7, 36), (3, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_length_are_read_and_nothing_behind_them(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for spec in (Spec("int8"), *([Spec("nf4", 16)] if weight.numel() % 16 == 0 else [])):
        packed, storage = quantize_weight(weight, spec)
        assert torch.equal(dense(packed, storage, dtype), storage.dense(packed, dtype))
        x = torch.ones(1, shape[1], dtype=dtype)
        expected = x.double() @ storage.dense(packed, dtype).double().T
        assert torch.allclose(product(x, packed, storage).double(), expected, rtol=1e-2, atol=1e-1)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS[:-1], ids=lambda spec: spec.kind)
def test_a_product_is_that_of_the_dense_matrix(spec: Spec, dtype: torch.dtype, rows: int) -> None:
    packed, storage = quantize_weight(WEIGHT, spec)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ storage.dense(packed, dtype).double().T
    limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert (product(x, packed, storage) - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("spec", SPECS[:-1], ids=lambda spec: spec.kind)
def test_the_gradient_is_that_of_the_dense_matrix(spec: Spec) -> None:
    packed, storage = quantize_weight(WEIGHT, spec)
    x = torch.randn(11, 192, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(11, 40, dtype=torch.float64)
    twin = functional.linear(x, storage.dense(packed, torch.float64))
    found = product(x, packed, storage)
    assert torch.equal(found, twin)
    assert torch.equal(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(twin, x, grad)[0])


def test_no_dense_weight_outlives_a_product() -> None:
    packed, storage = quantize_weight(WEIGHT, Spec("nf4"))
    kept = []
    x = torch.randn(11, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(x, packed, storage)
    assert [t.data_ptr() for t in kept] == [packed.data_ptr()]


def test_a_linear_holds_its_weight_and_keeps_its_seams() -> None:
    linear = Linear(192, 40, bias=True).requires_grad_(False)
    torch.nn.init.normal_(linear.bias)
    linear.weight.copy_(WEIGHT)
    packed, storage = quantize_weight(WEIGHT, Spec("nf4"))
    linear.hold(packed, storage)
    assert isinstance(linear.weight, torch.nn.Parameter) and not linear.weight.requires_grad
    assert linear.weight.dtype == torch.uint8 and linear.weight.shape == (40 * 192 // 2, 1)
    ctx = Context(Layout.single(3), torch.ones(3, 1), torch.zeros(3, 1))
    x = torch.randn(3, 192)
    w = storage.dense(packed, torch.float32)
    assert torch.allclose(linear(x, ctx), functional.linear(x, w, linear.bias), atol=1e-5)
    double = torch.nn.Module()
    double.forward = lambda value, host, ctx, given: 2 * value
    linear.edit["a"] = double
    assert torch.allclose(linear(x, ctx), 2 * functional.linear(x, w) + linear.bias, atol=1e-5)
    assert torch.equal(linear.dense_weight(), w)
