"""GPTQ: less error than rounding to nearest on correlated inputs, exact in the cases that have a closed form."""

from __future__ import annotations

import pytest
import torch
from tests.laws.small import build, logits_of, sample_row
from torch import nn

from tunesmith.errors import ConfigError, ModelError
from tunesmith.export.gptq import Gptq, Gram, quantize_columns, quantize_gptq
from tunesmith.model.quantize import block_linears

ROWS, COLUMNS = 48, 256


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs whose columns are correlated and of unequal size, as a model's are."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    mix = torch.randn(COLUMNS, 40, generator=draw) * torch.rand(COLUMNS, 1, generator=draw) ** 2
    x = torch.randn(600, 40, generator=draw) @ mix.T + 0.1 * torch.randn(600, COLUMNS, generator=draw)
    return weight, x


def error(weight: torch.Tensor, x: torch.Tensor, settings: Gptq, gram: torch.Tensor) -> float:
    """||W X - Q X|| / ||W X||."""
    packed, storage = quantize_columns(weight, gram, settings)
    return float((x @ (storage.dense(packed, torch.float32) - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 3])
def test_it_is_better_than_rounding_to_nearest(layer, bits: int, act_order: bool, group: int | None) -> None:
    weight, x = layer
    settings = Gptq(bits, group, act_order)
    nearest = error(weight, x, Gptq(bits, group), torch.eye(COLUMNS))
    assert error(weight, x, settings, x.T @ x) < 0.75 * nearest


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_uncorrelated_inputs_leave_rounding_to_nearest(layer, bits: int) -> None:
    """H = I moves no error: every weight is the multiple of its group's scale that is nearest to it."""
    weight, _ = layer
    packed, storage = quantize_columns(weight, torch.eye(COLUMNS), Gptq(bits, 64))
    grouped = weight.view(ROWS, -1, 64)
    low, high = grouped.amin(2, keepdim=True).clamp(max=0), grouped.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round()
    expected = scale * ((grouped / scale).round() + zero).clamp(0, 2**bits - 1) - scale * zero
    assert torch.allclose(storage.dense(packed, torch.float32), expected.view(ROWS, COLUMNS), atol=1e-5)
    assert storage.bits(packed) == pytest.approx(bits + 24 / 64)


def test_it_is_the_papers_recursion(layer) -> None:
    """Without blocks and without Cholesky: quantize a column, move its error on, strike it from the inverse."""
    weight, x = layer
    bits, size = 4, 64
    gram = (x.T @ x).double()
    packed, storage = quantize_columns(weight, gram, Gptq(bits, size))
    W = weight.double().clone()
    H = gram + 0.01 * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    inverse = torch.linalg.inv(H)
    Q = torch.empty_like(W)
    for i in range(COLUMNS):
        if i % size == 0:
            low, high = W[:, i : i + size].amin(1).clamp(max=0), W[:, i : i + size].amax(1).clamp(min=0)
            scale = ((high - low) / 15).half().double()
            zero = (-low / scale).round()
        Q[:, i] = scale * (((W[:, i] / scale).round() + zero).clamp(0, 15) - zero)
        moved = (W[:, i] - Q[:, i]) / inverse[i, i]
        W[:, i:] -= moved[:, None] * inverse[i, i:]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    same = (storage.dense(packed, torch.float64) - Q).abs() < 1e-4
    assert same.double().mean() > 0.999  # a number on the edge between two may fall to either side


def test_a_column_that_is_never_used_costs_nothing(layer) -> None:
    weight, x = layer
    x = x.clone()
    x[:, 7] = 0
    packed, storage = quantize_columns(weight, x.T @ x, Gptq(4, 64))
    assert bool(torch.isfinite(storage.dense(packed, torch.float32)).all())


def test_a_whole_model_computes_nearly_the_same_and_better_than_rounded() -> None:
    model, tokens = build(dtype=torch.float32), sample_row()
    windows = [torch.randint(0, 61, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    expected = logits_of(model, *tokens)
    off = []
    for bits in (4, 3):
        quantized = quantize_gptq(build(dtype=torch.float32), windows, Gptq(bits, 8))
        assert all(linear.quant is not None and not len(linear.input) for _, linear in block_linears(quantized))
        off.append(float((logits_of(quantized, *tokens) - expected).norm() / expected.norm()))
    assert off[0] < off[1] < 0.5


def gram_of(x: torch.Tensor, equal: bool) -> torch.Tensor:
    recorder = Gram(x.shape[1], x.device, equal)
    assert recorder(x, nn.Identity(), None, None) is x
    return recorder.sum


def test_each_token_counts_the_same_however_loud_it_is(layer) -> None:
    """The first token's inputs to some down_proj are hundreds of times the others': it must not rule."""
    weight, x = layer
    loud = torch.cat([3e4 * x[:1], x[1:]])
    whole = (x.double()[:, :, None] * x.double()[:, None, :] / x.double().square().sum(1)[:, None, None]).sum(0)
    assert torch.allclose(gram_of(loud, equal=True), whole, atol=1e-4)
    assert torch.allclose(gram_of(x, equal=False), (x.T @ x).double())
    quiet, settings = x[1:], Gptq(3, 64)
    nearest = error(weight, quiet, settings, torch.eye(COLUMNS))
    assert error(weight, quiet, settings, gram_of(loud, equal=True)) < 0.75 * nearest
    assert error(weight, quiet, settings, gram_of(loud, equal=False)) > nearest


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"groups of 100 do not divide its 256 columns"):
        quantize_columns(torch.randn(4, 256), torch.eye(256), Gptq(4, 100))
    with pytest.raises(ConfigError, match=r"--bits: 5 should be one of 2, 3, 4"):
        Gptq(5)
    with pytest.raises(ConfigError, match="too short for one window"):
        quantize_gptq(build(), [], Gptq())
