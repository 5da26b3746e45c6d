"""Bradley-Terry strengths: one rating a system that makes all games likeliest at once, whatever their order.

    P(i beats j) = p_i / (p_i + p_j),    R_i = 400 log10 p_i, shifted to a mean of `start`
    p_i <- W_i / sum_j N_ij / (p_i + p_j)     until it rests   (Hunter 2004, Ann. Statist. 32, eq. 3)

W: points (a tie is 1/2 to each), N: games. A maximum exists where no set of systems never lost a point to the others.
Intervals are percentiles over games drawn again with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.errors import ConfigError
from tunesmith.evaluate.tournament.elo import Games

TOLERANCE = 1e-9  # of log p, at rest
MOST = 20_000  # iterations


@dataclass(frozen=True)
class Strengths:
    """Ratings with the ends of their 95% intervals, each (systems,); `left_out`: drawn sets of games without a maximum.

    `reason` is empty, or says why there are no ratings (they are then nan).
    """

    rating: np.ndarray
    low: np.ndarray
    high: np.ndarray
    left_out: int = 0
    reason: str = ""


def bradley_terry(games: Games, *, resamples: int = 1_000, start: float = 1000.0, seed: int = 0) -> Strengths:
    """Strengths of all systems, and intervals from `resamples` bootstrap samples. Raises ConfigError."""
    if resamples < 1:
        raise ConfigError(f"--resamples {resamples}: must be above 0")
    points = games.points()
    if not _has_maximum(points[None])[0]:
        nothing = np.full(len(games.names), np.nan)
        return Strengths(nothing, nothing, nothing, 0, _why(games.names, points))
    rating = _ratings(points[None], start)[0]
    drawn = _resampled(games, resamples, np.random.default_rng(seed))
    fine = _has_maximum(drawn)
    if not fine.any():
        nothing = np.full(len(rating), np.nan)
        return Strengths(rating, nothing, nothing, resamples)
    low, high = np.percentile(_ratings(drawn[fine], start), [2.5, 97.5], axis=0)
    return Strengths(rating, low, high, int((~fine).sum()))


def _ratings(points: np.ndarray, start: float) -> np.ndarray:
    """(sets, systems) ratings of (sets, systems, systems) points."""
    games = points + points.transpose(0, 2, 1)
    won = points.sum(axis=2)
    p = np.ones_like(won)
    for _ in range(MOST):
        new = won / (games / (p[:, :, None] + p[:, None, :])).sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        moved = np.abs(np.log(new / p)).max()
        p = new
        if moved < TOLERANCE:
            break
    return start + 400 * np.log10(p)


def _has_maximum(points: np.ndarray) -> np.ndarray:
    """(sets,) bool: can every system be reached from every other along points that were taken?"""
    systems = points.shape[1]
    reach = (points > 0) | np.eye(systems, dtype=bool)
    for _ in range(max(systems - 1, 1).bit_length()):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return np.asarray(reach.all(axis=(1, 2)))


def _why(names: tuple[str, ...], points: np.ndarray) -> str:
    """Name a system that stands apart, if one does."""
    for name, gained, lost in zip(names, points.sum(axis=1), points.sum(axis=0), strict=True):
        if not gained or not lost:
            return f"{name} {'never lost' if gained else 'never won'} a point, so its strength has no bound"
    return "some systems never lost a point to the others, so strengths have no bound"


def _resampled(games: Games, resamples: int, draw: np.random.Generator) -> np.ndarray:
    """(resamples, systems, systems) points of games drawn with replacement."""
    systems = len(games.names)
    cells = games.first * systems + games.second
    other = games.second * systems + games.first
    points = np.empty((resamples, systems * systems))
    for row in points:
        which = draw.integers(len(games), size=len(games))
        row[:] = np.bincount(cells[which], games.outcome[which], systems * systems)
        row += np.bincount(other[which], 1 - games.outcome[which], systems * systems)
    return points.reshape(resamples, systems, systems)
