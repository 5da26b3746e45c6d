"""Storages: how many bits they hold, what they refuse, and that types survive a cast of the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tunesmith.errors import ModelError
from tunesmith.quant.storage import Spec, quantize_weight

WEIGHT = torch.randn(192, 576, generator=torch.Generator().manual_seed(0)) * 0.05
# 4 + 8/64 + 32/(64 256) bits with double quantization; the offset and the last nested block add less than 0.001.
BITS = {
    ("nf4", True): 4.12695,
    ("nf4", False): 4.5,
    ("nf3", True): 3.12695,
    ("nf2", True): 2.12695,
    ("int8", True): 8.055,
}


@pytest.mark.parametrize(("kind", "double"), BITS)
def test_resident_bits(kind: str, double: bool) -> None:
    packed, storage = quantize_weight(WEIGHT, Spec(kind, 64, double))
    assert storage.bits(packed) == pytest.approx(BITS[kind, double], abs=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "nf3", "int4", "int8"])
def test_dense_is_near_the_weight(kind: str) -> None:
    packed, storage = quantize_weight(WEIGHT, Spec(kind))
    off = (storage.dense(packed, torch.float32) - WEIGHT).norm() / WEIGHT.norm()
    assert off < {"nf4": 0.11, "nf3": 0.22, "int4": 0.13, "int8": 0.01}[kind]


def test_casting_a_model_leaves_scales_exact() -> None:
    packed, storage = quantize_weight(WEIGHT, Spec("nf4"))
    before = storage.dense(packed, torch.float32)
    storage.to(torch.bfloat16)
    assert {b.dtype for b in storage.buffers()} == {torch.uint8, torch.float32}
    assert torch.equal(storage.dense(packed, torch.float32), before)


def test_a_block_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ModelError, match=r"q_proj\.weight: blocks of 64 do not divide its 12 x 24 weights; .*=32"):
        quantize_weight(torch.randn(12, 24), Spec("nf4"), "q_proj.weight")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="there is no storage 'nf5'"):
        quantize_weight(WEIGHT, Spec("nf5"))


def test_llm_int8_is_its_formula() -> None:
    """Rows of x in 8 bits, columns with a magnitude of 6 or more apart: against float64 on the same whole numbers."""
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(1))
    x[2, 7], x[4, 100] = 9.0, -6.0
    packed, storage = quantize_weight(WEIGHT, Spec("llm-int8"))
    found = storage.product(x, packed)
    out = torch.zeros(576, dtype=torch.bool)
    out[[7, 100]] = True
    q, scale = packed.double(), storage.absmax.double() / 127
    rest = x.double().masked_fill(x.abs() >= 6, 0)
    largest = rest.abs().amax(1, keepdim=True)
    whole = torch.round((rest * 127 / largest).float()).double().masked_fill(out, 0)
    expected = whole @ q.T * largest / 127 * scale + x.double()[:, out] @ (q * scale[:, None])[:, out].T
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    naive = functional.linear(x, storage.dense(packed, torch.float32))
    assert (found - naive).norm() < 0.02 * naive.norm()


def test_llm_int8_is_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(1))
    x[2, 7] = 9.0
    packed, storage = quantize_weight(WEIGHT, Spec("llm-int8"))
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights = packed, storage.absmax, False
    state.is_training = False  # in training bitsandbytes multiplies dense matrices on a CPU
    theirs = bnb.matmul(x.half(), packed, threshold=6.0, state=state)
    assert (storage.product(x.half(), packed) - theirs).abs().max() <= 2e-3 * theirs.abs().max()
