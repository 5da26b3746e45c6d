"""Spectra against closed forms, numpy and the figures of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tunesmith.evaluate.spectrum import (
    Dense,
    Product,
    amplification,
    effective_rank,
    numerical_rank,
    rank90,
    shift,
    similarity,
)


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def orthonormal(size: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))[0])


def test_a_gaussian_of_1000_has_rank90_510_and_its_spectrum_hardly_moves():
    A, B = gauss(1000, 1000), gauss(1000, 1000, seed=1)
    values = Dense(A).values()
    assert abs(rank90(values) - 510) <= 3
    assert shift(values, Dense(A + 0.1 * B).values()) == pytest.approx(0.135, abs=0.01)
    # the quarter circle: sum of s / sqrt(n) is n 8/(3 pi), so the shift is about half of 1% of it
    assert float(values.mean()) / 1000**0.5 == pytest.approx(8 / (3 * math.pi), rel=0.01)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0] * 10, 9), ([3.0, 1.0], 1), ([2.0, 1.0], 2), ([5.0], 1), ([0.0, 0.0], 0), ([], 0), ([3.0, 1.0, 0.0], 1)],
)
def test_rank90_by_hand(values, expected):
    """9 of 10 is exactly 0.9; 9/10 is too; 4/5 is less."""
    assert rank90(torch.tensor(values)) == expected


def test_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([4.0, 0.0])) == pytest.approx(1)
    p = [0.5, 0.25, 0.25]
    assert effective_rank(torch.tensor(p) * 8) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(("out", "rank", "width"), [(30, 4, 50), (50, 4, 30), (6, 9, 20), (20, 9, 6), (5, 5, 5)])
def test_factors_give_what_the_product_gives(out, rank, width):
    B, A = gauss(out, rank), gauss(rank, width, seed=1)
    expected = np.linalg.svd((B @ A).numpy(), compute_uv=False)
    change = Product(B, A)
    assert change.shape == (out, width)
    values = change.values()
    assert values.numpy() == pytest.approx(expected[: len(values)], abs=1e-9)
    ranks = numerical_rank(values), numerical_rank(Dense(B @ A).values())
    assert ranks == (min(out, rank, width),) * 2
    U, S, V = change.svd()
    assert torch.allclose(U * S @ V.T, B @ A, atol=1e-9)
    assert rank90(values) == rank90(torch.from_numpy(expected)) <= rank


def test_the_product_is_never_formed():
    """12288 x 12288 in float64 would be 1.2 GB, and its values many minutes."""
    assert rank90(Product(gauss(12288, 2), gauss(2, 12288)).values()) == 2


def test_similarity_against_its_definition():
    first, second = orthonormal(40, 6), orthonormal(40, 9, seed=1)
    found = similarity(first, second)
    for i in range(1, 7):
        for j in range(1, 10):
            expected = np.linalg.norm(first.numpy()[:, :i].T @ second.numpy()[:, :j]) ** 2 / min(i, j)
            assert float(found[i - 1, j - 1]) == pytest.approx(expected)


def test_similarity_of_subspaces_in_each_other_orthogonal_and_random():
    basis = orthonormal(50, 20)
    within = similarity(basis[:, :4], basis[:, :12])
    assert torch.allclose(within[3, 3:], torch.ones(9, dtype=torch.float64))
    assert float(similarity(basis[:, :4], basis[:, 10:]).max()) < 1e-20
    drawn = [float(similarity(orthonormal(64, 4, s), orthonormal(64, 16, s + 500))[3, 15]) for s in range(200)]
    assert np.mean(drawn) == pytest.approx(16 / 64, rel=0.05)


def test_the_basis_of_a_lora_is_that_of_its_A():
    """LoRA section 7.2 compares A alone: B may turn and scale the directions of D."""
    B, A = gauss(30, 4) * torch.tensor([100.0, 10, 1, 0.1]), gauss(4, 50, seed=1)
    theirs = np.linalg.svd(A.numpy(), full_matrices=False)[2].T
    ours = Product(B, A).basis()
    assert np.abs((ours.numpy() * theirs).sum(0)) == pytest.approx(np.ones(4))
    assert abs(float((Product(B, A).svd()[2][:, 0] * ours[:, 0]).sum())) < 0.999
    assert float(similarity(Product(B, A).svd()[2], ours)[3, 3]) == pytest.approx(1)  # the same subspace in the end


def test_amplification_by_construction():
    """D lies in three directions of W that W hardly has: there W is 0.5 and D is 10."""
    left, right = orthonormal(40, 10), orthonormal(30, 10, seed=1)
    sizes = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 0.5, 0.5, 0.5], dtype=torch.float64)
    W = left * sizes @ right.T
    change = Product(left[:, 7:] * 10, right[:, 7:].T)
    found = amplification(change, W, 3)
    assert found.directions == 3 and found.change == pytest.approx(10 * 3**0.5)
    assert found.of_change == pytest.approx(0.5 * 3**0.5) and found.factor == pytest.approx(20)
    assert found.of_weight == pytest.approx((81 + 64 + 49) ** 0.5)
    drawn = [
        float(torch.linalg.matrix_norm(orthonormal(40, 3, s).T @ W @ orthonormal(30, 3, s + 900))) ** 2
        for s in range(300)
    ]
    assert found.at_random == pytest.approx(np.mean(drawn) ** 0.5, rel=0.1)
    dense = amplification(Dense(change.B @ change.A), W, 3)
    assert dense.factor == pytest.approx(found.factor)
    assert amplification(change, W, 99).directions == 3
