"""Elo ratings, averaged over random orderings of the games, since one ordering's ratings depend on it.

    E_a = 1 / (1 + 10^((R_b - R_a) / 400)),    R_a <- R_a + K (S_a - E_a),    R_b <- R_b - K (S_a - E_a)

S is 1 for a win, 0 for a loss, 1/2 for a tie   (as QLoRA rates: arXiv:2305.14314, section 5.3: K = 32, start 1000)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.tournament.judgments import Judgment

AT_ONCE = 2_000  # orderings that are played side by side


@dataclass(frozen=True)
class Games:
    """Judgments as numbers: `names` of the systems; `first`, `second` int (games,), `outcome` float64 (games,)."""

    names: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    outcome: np.ndarray

    def __len__(self) -> int:
        return len(self.outcome)

    def points(self) -> np.ndarray:
        """(systems, systems) float64: the points that a row's system took from a column's, a tie being 1/2 to each."""
        points = np.zeros((len(self.names), len(self.names)))
        np.add.at(points, (self.first, self.second), self.outcome)
        np.add.at(points, (self.second, self.first), 1 - self.outcome)
        return points


@dataclass(frozen=True)
class Elo:
    """`mean` rating of each system over the orderings, `deviation` among them, and `error`: half the 95% interval of
    the mean, which more orderings make smaller."""

    mean: np.ndarray
    deviation: np.ndarray
    error: np.ndarray


def games_of(judgments: Sequence[Judgment]) -> Games:
    """The games of all verdicts that could be read; where there are only scores, the higher one wins. Raises DataError.

    The order of the systems is that of their names.
    """
    kind = "verdict" if any(one.kind == "verdict" for one in judgments) else "scores"
    played = [one for one in judgments if one.kind == kind and one.parsed]
    if not played:
        raise DataError("no verdict could be read, so there is no game to rate")
    names = tuple(sorted({name for one in played for name in (one.first, one.second)}))
    index = {name: number for number, name in enumerate(names)}
    return Games(
        names,
        np.array([index[one.first] for one in played]),
        np.array([index[one.second] for one in played]),
        np.array([_outcome(one) for one in played]),
    )


def _outcome(one: Judgment) -> float:
    if one.outcome is not None or one.scores is None:
        return float(one.outcome or 0.0)
    return 0.5 + 0.5 * float(np.sign(one.scores[0] - one.scores[1]))


def elo(
    games: Games, *, orderings: int = 10_000, drawn: int = 500, k: float = 32.0, start: float = 1000.0, seed: int = 0
) -> Elo:
    """Ratings over `orderings` random sequences of `drawn` games, each game at most once in a sequence.

    `drawn` beyond the number of games is all of them. Raises ConfigError.
    """
    for name, value in (("orderings", orderings), ("games", drawn), ("k", k)):
        if value <= 0:
            raise ConfigError(f"--{name} {value}: must be above 0")
    draw = np.random.default_rng(seed)
    ratings = [
        _play(games, _sequences(draw, min(AT_ONCE, orderings - done), len(games), drawn), k, start)
        for done in range(0, orderings, AT_ONCE)
    ]
    every = np.concatenate(ratings)
    deviation = every.std(axis=0, ddof=1) if orderings > 1 else np.full(len(games.names), math.nan)
    return Elo(every.mean(axis=0), deviation, 1.959964 * deviation / math.sqrt(orderings))


def _sequences(draw: np.random.Generator, rows: int, games: int, drawn: int) -> np.ndarray:
    """(rows, drawn) indices of games, no game twice in a row."""
    count = min(games, drawn)
    return np.stack([draw.choice(games, count, replace=False) for _ in range(rows)])


def _play(games: Games, sequences: np.ndarray, k: float, start: float) -> np.ndarray:
    """(rows, systems) ratings after each row's games; all rows play their next game at once."""
    rows = np.arange(len(sequences))
    ratings = np.full((len(sequences), len(games.names)), float(start))
    for which in sequences.T:
        a, b = games.first[which], games.second[which]
        expected = 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / 400))
        change = k * (games.outcome[which] - expected)
        ratings[rows, a] += change
        ratings[rows, b] -= change
    return ratings
