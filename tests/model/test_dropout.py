"""A product behind dropout: the share, the gradient of what it computed, and nothing kept but its input and a seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.model.dropout import draw_seed, dropped_product, keep_mask, kept_share

TOKENS, SIZE, RANK = 37, 51, 3  # no multiple of the four that a random number holds


def operands() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((TOKENS, SIZE), (RANK, SIZE))]
    return made[0].requires_grad_(), made[1].requires_grad_(), torch.randn(TOKENS, RANK, generator=draw).double()


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_value_and_gradient_are_those_of_the_factors_that_were_drawn(dropout: float) -> None:
    x, weight, grad = operands()
    seed = draw_seed()
    factors = keep_mask(x, dropout, seed) / kept_share(dropout)
    expected = (x * factors) @ weight.T
    found = dropped_product(x, weight, dropout, seed)
    assert torch.allclose(found, expected)
    theirs, ours = (torch.autograd.grad(value, (x, weight), grad) for value in (expected, found))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
def test_the_share_is_dropped_everywhere_and_without_a_pattern(dropout: float) -> None:
    like = torch.empty(400, 1000)
    keep = keep_mask(like, dropout, torch.tensor(7)).float()
    spread = (dropout * (1 - dropout)) ** 0.5
    assert kept_share(dropout) == pytest.approx(1 - dropout, abs=1e-5)
    assert abs(float(keep.mean()) - (1 - dropout)) < 5 * spread / like.numel() ** 0.5
    assert float((keep.mean(0) - (1 - dropout)).abs().max()) < 5 * spread / 400**0.5
    assert float((keep.mean(1) - (1 - dropout)).abs().max()) < 5 * spread / 1000**0.5
    flat = keep.flatten() - keep.mean()
    for lag in (1, 2, 3, 4, 1000):  # the numbers of one random word, of the next, and of the row below
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * spread**2 / like.numel() ** 0.5


def test_a_seed_says_what_is_dropped() -> None:
    x, weight, _ = operands()
    seeds = [draw_seed() for _ in range(2)]
    first, again, other = (dropped_product(x, weight, 0.5, seed) for seed in (seeds[0], seeds[0], seeds[1]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(5)
    drawn = draw_seed()
    torch.manual_seed(5)
    assert torch.equal(draw_seed(), drawn)


def test_nothing_is_kept_but_operands_and_a_seed() -> None:
    x, weight, _ = operands()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        dropped_product(x, weight, 0.5, draw_seed())
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {x.data_ptr(), weight.data_ptr()}
    assert sum(t.numel() == 1 for t in kept) == 1


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, grad = operands()
    dropped_product(x.detach(), weight, 0.5, draw_seed()).backward(grad)
    assert weight.grad is not None and x.grad is None


def test_on_the_meta_device_there_are_shapes() -> None:
    x = torch.empty(TOKENS, SIZE, device="meta", requires_grad=True)
    weight = torch.empty(RANK, SIZE, device="meta")
    out = dropped_product(x, weight, 0.5, draw_seed())
    out.sum().backward()
    assert out.shape == (TOKENS, RANK) and x.grad is not None and x.grad.shape == x.shape
