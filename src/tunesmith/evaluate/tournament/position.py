"""Position bias: does the judge favour whoever it saw first?

Counted over pairs of answers that were judged in both orders, so that good answers do not look like a bias:

    consistent         the same verdict either way round
    follows first      whoever stood first got more;  follows second: the other way round
    advantage          mean points of the first place, in points (verdicts: 0 is none, 1/2 the most)
                       scores: mean of (score when seen first - score when seen second), in the scores' own unit
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.evaluate.tournament.judgments import Judgment, Kind


@dataclass(frozen=True)
class PositionBias:
    """Of one judge and one kind: counts over all judgments, and over the pairs that were judged in both orders."""

    judge: str
    kind: Kind
    first: int
    second: int
    tie: int
    unparsed: int
    pairs: int
    consistent: int
    follows_first: int
    follows_second: int
    advantage: float
    error: float


def position_bias(judgments: Sequence[Judgment]) -> list[PositionBias]:
    """The bias of each judge, verdicts and scores apart."""
    groups: dict[tuple[str, Kind], list[Judgment]] = defaultdict(list)
    for one in judgments:
        groups[one.judge, one.kind].append(one)
    return [_bias(judge, kind, found) for (judge, kind), found in sorted(groups.items())]


def _bias(judge: str, kind: Kind, judgments: Sequence[Judgment]) -> PositionBias:
    leads = [lead for one in judgments if (lead := _lead(one)) is not None]
    sums = np.array(_both_orders(judgments))  # 0 where the verdict was the same either way round
    advantages = sums / 2
    error = 1.959964 * float(advantages.std(ddof=1)) / math.sqrt(len(sums)) if len(sums) > 1 else math.nan
    even = np.abs(sums) < 1e-9
    return PositionBias(
        judge,
        kind,
        first=sum(lead > 0 for lead in leads),
        second=sum(lead < 0 for lead in leads),
        tie=sum(lead == 0 for lead in leads),
        unparsed=len(judgments) - len(leads),
        pairs=len(sums),
        consistent=int(even.sum()),
        follows_first=int((sums > 0)[~even].sum()),
        follows_second=int((sums < 0)[~even].sum()),
        advantage=float(advantages.mean()) if len(sums) else math.nan,
        error=error,
    )


def _lead(one: Judgment) -> float | None:
    """By how much the first place led: its share of the point beyond a half, or the difference of the scores."""
    if one.kind == "scores":
        return None if one.scores is None else one.scores[0] - one.scores[1]
    return None if one.outcome is None else one.outcome - 0.5


def _both_orders(judgments: Sequence[Judgment]) -> list[float]:
    """For each pair judged in both orders: lead of the first place one way round plus that the other way round.

    Several judgments of one order, such as people's votes, are averaged.
    """
    leads: dict[tuple[str, int, str, str], list[float]] = defaultdict(list)
    for one in judgments:
        if (lead := _lead(one)) is not None:
            leads[one.question, one.turn, one.first, one.second].append(lead)
    return [
        sum(found) / len(found) + sum(back) / len(back)
        for (question, turn, a, b), found in leads.items()
        if a < b and (back := leads.get((question, turn, b, a)))
    ]
