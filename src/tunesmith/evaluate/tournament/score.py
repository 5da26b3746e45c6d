"""A system's scores as a percentage of a reference's, for each order in which the judge saw the two.

    100 sum(system) / sum(reference)     over the questions of an order;  mean: over both orders' sums together

The pooled ratio, not the mean of the two percentages   (QLoRA, arXiv:2305.14314, table 6)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.evaluate.tournament.judgments import Judgment


@dataclass(frozen=True)
class Share:
    """Percentages of the reference's scores; nan for an order that was not judged.

    `error`: half the 95% interval of `mean`, by questions drawn again (nan for one question). `count`: judgments.
    """

    system: str
    reference_first: float
    reference_second: float
    mean: float
    error: float
    count: int
    unparsed: int


def shares(judgments: Sequence[Judgment], reference: str, *, resamples: int = 1_000, seed: int = 0) -> list[Share]:
    """Every system that was scored beside `reference`, best first. Raises ConfigError where none was."""
    scored = [one for one in judgments if one.kind == "scores" and reference in (one.first, one.second)]
    names = sorted({name for one in scored for name in (one.first, one.second)} - {reference})
    if not names:
        known = sorted({name for one in judgments if one.kind == "scores" for name in (one.first, one.second)})
        listed = ", ".join(known) or "no system"
        raise ConfigError(
            f"--reference {reference}: nothing was scored beside it{did_you_mean(reference, known)} (scored: {listed})"
        )
    found = [_share(name, reference, scored, resamples, seed) for name in names]
    return sorted(found, key=lambda share: (-share.mean if share.mean == share.mean else math.inf, share.system))


def _share(name: str, reference: str, scored: Sequence[Judgment], resamples: int, seed: int) -> Share:
    mine = [one for one in scored if name in (one.first, one.second)]
    parsed = [(one, *one.scores) for one in mine if one.scores is not None]
    leading = [(a, b) for one, b, a in parsed if one.first == reference]  # (system, reference)
    trailing = [(a, b) for one, a, b in parsed if one.second == reference]
    by_question: dict[str, np.ndarray] = {}
    for one, first, second in parsed:
        pair = (second, first) if one.first == reference else (first, second)
        by_question[one.question] = by_question.get(one.question, np.zeros(2)) + pair
    error = _error(list(by_question.values()), resamples, seed)
    both = _percent([*leading, *trailing])
    return Share(
        name, _percent(leading), _percent(trailing), both, error, len(mine), len(mine) - len(parsed)
    )  # fmt: skip


def _percent(pairs: Sequence[tuple[float, float]]) -> float:
    total, of_reference = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return 100 * total / of_reference if of_reference else math.nan


def _error(sums: Sequence[np.ndarray], resamples: int, seed: int) -> float:
    """Half the 95% interval of the pooled ratio over questions drawn with replacement."""
    if len(sums) < 2:
        return math.nan
    which = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    system, reference = np.stack(sums)[which].sum(axis=1).T
    fine = reference > 0
    if not fine.any():
        return math.nan
    low, high = np.percentile(100 * system[fine] / reference[fine], [2.5, 97.5])
    return float(high - low) / 2
