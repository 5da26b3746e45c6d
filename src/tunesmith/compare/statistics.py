"""How sure a difference is: intervals over seeds, paired tests over the rows that both were measured on.

interval            m +- sqrt(a^2 + b^2)       a: half the t interval over n seeds, t(.975, n-1) s / sqrt(n)
                                               b: half the interval over the rows, Wilson's or the bootstrap's
McNemar, exact      p = min(1, 2 sum_{k<=min(b,c)} C(b+c, k) / 2^(b+c))         b, c: rows that only one has right
paired bootstrap    rows are drawn with replacement, the same for both; p = 2 min(P(d* <= 0), P(d* >= 0))
over seeds          t = d / se,  se^2 = s1^2 / n1 + s2^2 / n2 + r^2,  s: spread of the seeds, r: bootstrap error over
                    the rows, seeds averaged; degrees of freedom by Welch and Satterthwaite, rounded down
Holm                the i-th smallest of m p-values times m - i + 1, never less than the one before (Holm 1979)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.evaluate.figures import half_interval
from tunesmith.evaluate.forgetting import paired_interval
from tunesmith.evaluate.outcomes import Outcomes

DRAWS = 10_000
SEED = 0  # of the bootstrap: a report made again is the same
_CHUNK = 1_000_000  # numbers drawn at a time

# t(.975, df) for 1 to 30 degrees of freedom, as printed in the tables of textbooks.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean, half the width of its 95% interval (None: unknown), and what the width comes from."""

    mean: float
    half: float | None
    over: str


def t_quantile(df: int) -> float:
    """The .975 quantile of Student's t; over 30 degrees by Fisher's expansion, right to four digits."""
    if df <= len(_T):
        return _T[df - 1]
    z3, z5 = _Z**3, _Z**5
    return _Z + (z3 + _Z) / (4 * df) + (5 * z5 + 16 * z3 + 3 * _Z) / (96 * df * df)


def over_seeds(values: Sequence[float]) -> Interval:
    """The t interval of a mean over at least two seeds: how much it would differ with others, on the same rows."""
    count, mean = len(values), math.fsum(values) / len(values)
    return Interval(mean, t_quantile(count - 1) * math.sqrt(_variance(values) / count), f"{count} seeds")


def over_both(values: Sequence[float], seeds: Sequence[Outcomes]) -> Interval:
    """The interval of a mean over seeds on other rows with other seeds; `seeds` are their rows, the same in each."""
    trained = over_seeds(values)
    sums, weights = _averaged(seeds)
    rows = over_rows(Outcomes(tuple(sums.tolist()), tuple(weights.tolist())))
    if trained.half is None or rows.half is None:
        return trained
    return Interval(trained.mean, math.hypot(trained.half, rows.half), f"{trained.over} and {rows.over}")


def over_rows(outcomes: Outcomes) -> Interval:
    """The interval of one seed's figure over its rows: Wilson's for right and wrong, else by the bootstrap."""
    count, value = len(outcomes.values), outcomes.ratio
    if outcomes.binary:
        return Interval(value, half_interval(value, count), f"{count} rows")
    drawn = _ratios(np.asarray([outcomes.values]), np.asarray([outcomes.weights]))[:, 0]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(high - low) / 2, f"{count} rows")


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided exact p-value of two lists of right (1) and wrong (0) on the same rows."""
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    different = only_first + only_second
    tail = term = 1  # C(n, k), whole numbers throughout
    for k in range(min(only_first, only_second)):
        term = term * (different - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**different)


def paired_bootstrap(first: Outcomes, second: Outcomes) -> float:
    """The two-sided p-value that two figures differ, from the same rows."""
    both = (first, second)
    drawn = _ratios(np.asarray([one.values for one in both]), np.asarray([one.weights for one in both]))
    difference = drawn[:, 0] - drawn[:, 1]
    low, high = float((difference <= 0).mean()), float((difference >= 0).mean())
    return min(1.0, max(2 * min(low, high), 1 / DRAWS))  # no p-value is smaller than what the draws can tell


def across_seeds(first: Sequence[Outcomes], second: Sequence[Outcomes], fixed: bool = False) -> float:
    """The two-sided p-value that two methods differ on other rows with other seeds, from the same rows.

    A single seed's spread is taken to be the other side's. `fixed`: the second is untrained and has no seed.
    """
    values = [[one.ratio for one in side] for side in (first, second)]
    many = [side for side in values if len(side) > 1]
    share = [1 / len(side) for side in (values[:1] if fixed else values)]
    whole = len(many) == len(share)
    parts = [(_variance(side) * (1 / len(side) if whole else sum(share)), len(side) - 1) for side in many]
    (a, wa), (b, wb) = _averaged(first), _averaged(second)
    drawn = _ratios(np.stack([a, b]), np.stack([wa, wb]))
    parts.append((float((drawn[:, 0] - drawn[:, 1]).var()), len(a) - 1))
    total = math.fsum(variance for variance, _ in parts)
    means = [math.fsum(side) / len(side) for side in values]
    if total == 0:
        return 1.0 if means[0] == means[1] else 1 / DRAWS
    df = total**2 / math.fsum(variance**2 / max(own, 1) for variance, own in parts)
    return two_sided((means[0] - means[1]) / math.sqrt(total), max(1, int(df)))


def two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) for Student's T, by its finite series (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    odd, cosine = df % 2, math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1, (df - odd) // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k - 1 + odd) / (2 * k + odd)
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def compare(first: Sequence[Outcomes], second: Sequence[Outcomes], fixed: bool = False) -> tuple[float, str]:
    """The p-value of the test that fits, and the test's name; `fixed`: see `across_seeds`."""
    if len(first) > 1 or len(second) > 1:
        return across_seeds(first, second, fixed), "seeds"
    if first[0].binary and second[0].binary:
        return mcnemar(first[0].values, second[0].values), "McNemar"
    return paired_bootstrap(first[0], second[0]), "bootstrap"


def over_change(after: Sequence[Outcomes], before: Outcomes) -> Interval:
    """The interval of after - before on the same rows: over the rows, and over the seeds of `after` if several."""
    changes = [one.ratio - before.ratio for one in after]
    if len(after) == 1 and after[0].binary and before.binary:
        ends = paired_interval(before.values, after[0].values)
        return Interval(changes[0], None if ends is None else (ends[1] - ends[0]) / 2, f"{len(before.values)} rows")
    (a, wa), count = _averaged(after), len(before.values)
    drawn = _ratios(np.stack([a, before.values]), np.stack([wa, before.weights]))
    low, high = np.quantile(drawn[:, 0] - drawn[:, 1], (0.025, 0.975))
    rows = Interval(changes[0], float(high - low) / 2, f"{count} rows")
    if len(after) == 1:
        return rows
    trained = over_seeds(changes)
    return Interval(trained.mean, math.hypot(trained.half or 0.0, rows.half or 0.0), f"{trained.over} and {rows.over}")


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted together, in their order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, last = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        last = max(last, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = last
    return adjusted


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _averaged(seeds: Sequence[Outcomes]) -> tuple[np.ndarray, np.ndarray]:
    values = np.mean([one.values for one in seeds], axis=0)
    weights = np.mean([one.weights for one in seeds], axis=0)
    return values, weights


def _ratios(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum values / sum weights of DRAWS resamplings of the rows, (DRAWS, k), for k figures of the same rows (k, n)."""
    count = values.shape[1]
    random = np.random.default_rng(SEED)
    found, left = [], DRAWS
    while left:
        size = min(left, max(1, _CHUNK // count))
        rows = random.integers(0, count, size=(size, count))
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.stack([v[rows].sum(1) / w[rows].sum(1) for v, w in zip(values, weights, strict=True)], 1))
        left -= size
    drawn = np.concatenate(found)
    return drawn[np.isfinite(drawn).all(axis=1)]  # a draw of rows without a supervised token says nothing
