"""The codes against the paper's table, bitsandbytes, and the mean errors of a standard normal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.model.load import open_weights
from tunesmith.quant.blockwise import dequantize_blockwise, pack, quantize_blockwise, unpack
from tunesmith.quant.codes import KINDS, find_code
from tunesmith.quant.double import nest, unnest
from tunesmith.quant.dynamic import dynamic_map
from tunesmith.quant.int8 import dequantize_rows, quantize_rows

# arXiv:2305.14314, appendix E, to seven digits.
NF4 = [
    *[-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0],
    *[0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0],
]
# Mean |error| on N(0, 1) in blocks of 64, from an independent computation with bitsandbytes' formulas.
ERRORS = {"nf4": 0.0728, "fp4": 0.0965, "e2m1": 0.0802, "int4": 0.0829, "e3m0": 0.1307}
BLOCK = 64


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(1 << 14, BLOCK, generator=torch.Generator().manual_seed(0))


def again(x: torch.Tensor, kind: str, double: bool = False) -> torch.Tensor:
    """`x` after a round trip."""
    code = find_code(kind)
    packed, absmax = quantize_blockwise(x, code, BLOCK)
    if double:
        absmax = unnest(*nest(absmax), torch.tensor(dynamic_map()))
    return dequantize_blockwise(packed, absmax, code.table(), code.bits, torch.float32).view_as(x)


def test_nf4_is_the_papers_table() -> None:
    assert find_code("nf4").values == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("nf2", 2), ("nf3", 3)])
def test_narrower_normal_floats_are_made_alike(kind: str, bits: int) -> None:
    values = torch.tensor(find_code(kind).values, dtype=torch.float64)
    assert len(values) == 2**bits and values[0] == -1 and values[-1] == 1 and (values == 0).sum() == 1
    assert (values > 0).sum() == 2 ** (bits - 1) and bool((values.diff() > 0).all())
    # Under the normal distribution that they came from, neighbours on a side are equally far apart.
    largest = torch.special.ndtri(torch.tensor(0.5 * (2 - 0.5 / (2**bits - 1) - 0.5 / 2**bits), dtype=torch.float64))
    for side in (values[values >= 0], values[values <= 0]):
        steps = torch.special.ndtr(side * largest).diff()
        assert steps.allclose(steps[:1], atol=1e-5)


@pytest.mark.parametrize("kind", ERRORS)
def test_mean_error_on_a_normal(kind: str, normal: torch.Tensor) -> None:
    assert (again(normal, kind) - normal).abs().mean().item() == pytest.approx(ERRORS[kind], abs=5e-4)


def test_nf3_lies_between_nf2_and_nf4_and_double_quantization_costs_little(normal: torch.Tensor) -> None:
    nf4, nf3, nf2 = ((again(normal, kind) - normal).abs().mean().item() for kind in ("nf4", "nf3", "nf2"))
    assert nf4 < nf3 < nf2
    assert (again(normal, "nf4", double=True) - normal).abs().mean().item() == pytest.approx(0.0729, abs=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_found_is_the_nearest(kind: str) -> None:
    code, x = find_code(kind), torch.rand(5000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    best = (x[:, None] - code.table()).abs().amin(1)
    assert torch.equal((x - code.table()[code.nearest(x).int()]).abs(), best)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_is_one_string_of_bits_first_index_highest(bits: int) -> None:
    indices = torch.randint(0, 2**bits, (240,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    packed = pack(indices, bits)
    text = "".join(f"{i:0{bits}b}" for i in indices.tolist())
    assert packed.flatten().tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    assert torch.equal(unpack(packed, bits), indices)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_codes_are_bitsandbytes(kind: str, scale: float, normal: torch.Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x, code = normal * scale, find_code(kind)
    x[0, :] = 0
    theirs, state = functional.quantize_4bit(x, quant_type=kind, blocksize=BLOCK)
    packed, absmax = quantize_blockwise(x, code, BLOCK)
    assert torch.equal(code.table(), state.code)
    assert int((packed != theirs).sum()) == 0 and torch.equal(absmax, state.absmax)
    ours = dequantize_blockwise(packed, absmax, code.table(), code.bits, torch.float32).view_as(x)
    assert torch.equal(ours, functional.dequantize_4bit(theirs, state))


@pytest.mark.smollm2
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_of_real_weights_are_bitsandbytes(kind: str, smollm2_gguf: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = open_weights(smollm2_gguf)
    try:
        for name, shape in weights.shapes.items():
            if name.startswith(("model.layers.0.", "model.layers.29.")) and len(shape) == 2:
                weight = weights.read(name, torch.float32)
                packed, absmax = quantize_blockwise(weight, find_code(kind), BLOCK)
                theirs, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=BLOCK)
                assert int((packed != theirs).sum()) == 0 and torch.equal(absmax, state.absmax), name
    finally:
        weights.close()


def test_nested_absmax_are_bitsandbytes(normal: torch.Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = quantize_blockwise(normal, find_code("nf4"), BLOCK)[1]
    indices, nested, offset = nest(absmax)
    table = torch.tensor(dynamic_map())
    assert torch.equal(table, functional.create_dynamic_map())
    _, state = functional.quantize_4bit(normal, quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    assert torch.equal(state.state2.absmax, nested) and state.offset == offset
    # bitsandbytes' CPU kernel looks the code up roughly: ours is the nearest, theirs never farther than a neighbour.
    assert (indices.int() - state.absmax.int()).abs().max() <= 1 and (indices != state.absmax).float().mean() < 0.01
    scaled = (absmax - offset) / nested.repeat_interleave(256)
    best = (scaled[:, None] - table).abs().amin(1)
    assert ((scaled - table[indices.int()]).abs() - best).max() < 1e-7
    theirs = functional.dequantize_blockwise(indices, state.state2) + offset
    assert torch.equal(unnest(indices, nested, offset, table), theirs)


def test_int8_rows_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3)).half()
    packed, absmax = quantize_rows(weight)
    theirs, stats, _ = functional.int8_vectorwise_quant(weight.clone())
    assert torch.equal(packed, theirs) and torch.equal(absmax, stats)
    dense = dequantize_rows(packed, absmax, torch.float32)
    assert torch.equal(dense, functional.int8_vectorwise_dequant(theirs, stats))
    assert (dense - weight.float()).abs().max() <= absmax.max() / 254 * 1.001
