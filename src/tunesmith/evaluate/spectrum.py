"""The spectrum of a change D of a weight W, and where its directions lie.

    rank90          smallest k with  sum_{i<=k} s_i^2 >= 0.9 sum_i s_i^2                        (arXiv:2405.09673)
    effective rank  exp(-sum_i p_i log p_i),  p_i = s_i / sum_j s_j                           (Roy & Vetterli 2007)
    phi(i, j)       ||V1_i^T V2_j||_F^2 / min(i, j), V_i the first i right singular directions  (LoRA, section 7.2)
    amplification   ||D||_F / ||U^T W V||_F, U and V the first r singular directions of D       (LoRA, section 7.3)

Everything in float64. A change that is known as a product B A is never multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SHARE = 0.9
ROUNDING = 1e-9  # what float64 leaves of W + D - W, for a D down to a millionth of W
Svd = tuple[Tensor, Tensor, Tensor]  # U (out, k), S (k,) falling, V (in, k)


class Change(Protocol):
    """D, (out, in), the change of one weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def values(self) -> Tensor:
        """The singular values, falling, float64; all that can differ from 0."""

    def svd(self) -> Svd:
        """U, S, V with D = U diag(S) V^T, as many columns as `values` has."""

    def basis(self) -> Tensor:
        """The right singular directions that `similarity` compares, (in, k)."""


@dataclass(frozen=True)
class Product:
    """D = B A of a low rank, B (out, r) and A (r, in); `basis` is that of A, as in the LoRA paper."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.B.shape[0], self.A.shape[1]

    def values(self) -> Tensor:
        """See `Change`: those of R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A."""
        return torch.linalg.svdvals(self._core()[1])

    def svd(self) -> Svd:
        """See `Change`."""
        left, core, right = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return left @ U, S, right @ Vh.T

    def basis(self) -> Tensor:
        """See `Change`."""
        return torch.linalg.svd(self.A.double(), full_matrices=False)[2].T

    def _core(self) -> Svd:
        left, b = torch.linalg.qr(self.B.double())
        right, a = torch.linalg.qr(self.A.double().T)
        return left, b @ a.T, right


@dataclass(frozen=True)
class Dense:
    """D as it is, (out, in)."""

    D: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.D.shape[0], self.D.shape[1]

    def values(self) -> Tensor:
        """See `Change`."""
        return torch.linalg.svdvals(self.D.double())

    def svd(self) -> Svd:
        """See `Change`."""
        U, S, Vh = torch.linalg.svd(self.D.double(), full_matrices=False)
        return U, S, Vh.T

    def basis(self) -> Tensor:
        """See `Change`: that of D."""
        return self.svd()[2]


def rank90(values: Tensor) -> int:
    """The fewest directions that hold 0.9 of the squares of the singular `values`; 0 where all are 0."""
    energy = values.double().square().cumsum(0)
    if not len(energy) or float(energy[-1]) == 0:
        return 0
    return int((energy < SHARE * energy[-1] * (1 - 1e-12)).sum()) + 1


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular `values`, in [1, their number]; 0 where all are 0."""
    total = float(values.double().sum())
    if total == 0:
        return 0.0
    p = values.double() / total
    return float(torch.special.entr(p).sum().exp())


def numerical_rank(values: Tensor) -> int:
    """How many singular `values`, falling, are above ROUNDING of the largest."""
    return int((values > ROUNDING * values[:1]).sum())


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) at [i-1, j-1], for all i and j, of orthonormal directions (in, k1) and (in, k2).

    1 where the smaller subspace lies in the larger one, 0 where they are orthogonal, max(i, j) / in at random.
    """
    overlap = (first.double().T @ second.double()).square().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, overlap.shape[1] + 1, dtype=torch.float64)
    return overlap / torch.minimum(i, j)


@dataclass(frozen=True)
class Amplification:
    """How much of W lies in the first `directions` of D, as norms; `factor` is ||D|| / `of_change`.

    `of_weight`: of W in its own first directions, the most there can be; `at_random`: of W in random ones, on average.
    """

    directions: int
    factor: float
    change: float
    of_change: float
    of_weight: float
    at_random: float


def amplification(change: Change, weight: Tensor, directions: int, values: Tensor | None = None) -> Amplification:
    """Hold the change of W, (out, in), against W in the change's own `directions` (at least 1).

    `values`: the singular values of W, where they are known.
    """
    U, S, V = change.svd()
    W = weight.double()
    own = torch.linalg.svdvals(W) if values is None else values
    r = min(directions, len(S))
    projected = float(torch.linalg.matrix_norm(U[:, :r].T @ W @ V[:, :r]))
    size = float(torch.linalg.vector_norm(S))
    return Amplification(
        directions=r,
        factor=size / projected if projected else float("inf"),
        change=size,
        of_change=projected,
        of_weight=float(torch.linalg.vector_norm(own[:r])),
        at_random=r * float(torch.linalg.matrix_norm(W)) / (W.shape[0] * W.shape[1]) ** 0.5,
    )


def shift(before: Tensor, after: Tensor) -> float:
    """mean_i |s_i(W + D) - s_i(W)| of singular values: how far the spectrum itself moved."""
    return float((after - before).abs().mean())
