"""The dynamic 8-bit maps and codes against their definition and bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from tunesmith.quant.dynamic import BLOCK, decode, dynamic_map, encode, nearest

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def moments(size: int, signed: bool, seed: int = 0) -> torch.Tensor:
    """Values over many orders of magnitude, as an optimizer's moments are."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=draw) * 10 ** (8 * torch.rand(size, generator=draw) - 8)
    return x if signed else x.square()


@SIGNS
def test_the_maps_are_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(dynamic_map(signed)), functional.create_dynamic_map(signed=signed))


@SIGNS
def test_a_code_is_the_nearest_value_and_the_lower_one_halfway(signed: bool) -> None:
    table = torch.tensor(dynamic_map(signed))
    middles = (table[:-1] + table[1:]) / 2
    above, below = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (2.0, -2.0))
    signs = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])
    x = torch.cat(
        [table, middles, above, below, signs, moments(50_000, signed).clamp(-1, 1), torch.rand(50_000) * 2 - 1]
    )
    assert torch.equal(nearest(x, signed).long(), torch.bucketize(x, middles))
    assert nearest(middles, signed).tolist() == list(range(255)) and nearest(above, signed).tolist() == list(
        range(1, 256)
    )


@SIGNS
@pytest.mark.parametrize("size", [1, 255, 256, 5 * BLOCK + 77])
def test_blocks_against_the_definition(signed: bool, size: int) -> None:
    x, table = moments(size, signed), torch.tensor(dynamic_map(signed))
    x[: min(size, BLOCK)] *= 1e-20
    codes, absmax = encode(x, signed)
    again = decode(codes, absmax, signed)
    assert codes.dtype == torch.uint8 and len(absmax) == -(-size // BLOCK)
    for b, (block, back) in enumerate(zip(x.split(BLOCK), again.split(BLOCK), strict=True)):
        assert absmax[b] == block.abs().max()
        best = (block[:, None] / absmax[b] - table).abs().amin(1) * absmax[b]
        assert ((back - block).abs() <= best * (1 + 1e-5) + 1e-6 * absmax[b]).all()
    if not signed:  # the signed map has no -1, so a block's largest may shrink by 0.7%
        assert torch.equal(decode(*encode(again, signed), signed), again)


def test_zeros_stay_zero_and_fresh_states_are_zero() -> None:
    for signed in (True, False):
        assert not decode(*encode(torch.zeros(300), signed), signed).any()
        assert not decode(torch.zeros(300, dtype=torch.uint8), torch.zeros(2), signed).any()


@SIGNS
def test_codes_are_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    table = torch.tensor(dynamic_map(signed))
    x = moments(64 * BLOCK + 40, signed)
    codes, absmax = encode(x, signed)
    # Of float64 values bitsandbytes finds the nearest; its float32 kernel for CPUs looks codes up in 0.01 wide bins.
    theirs, scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), table, BLOCK)
    assert torch.equal(absmax, scales) and torch.equal(codes, theirs)
    rough, state = functional.quantize_blockwise(x, code=table, blocksize=BLOCK)
    assert torch.equal(absmax, state.absmax) and ((table[rough.int()] - table[codes.int()]).abs() < 0.02).all()
    assert torch.equal(decode(theirs, absmax, signed), functional.dequantize_blockwise(theirs, state))
