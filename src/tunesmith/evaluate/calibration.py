"""Calibration: does a model that is 80% sure have it right 80% of the time?

    ECE = sum_m  |B_m| / n  *  | share of right ones in B_m - mean confidence in B_m |     (arXiv:1706.04599 eq. 3)

B_m holds the answers whose confidence lies in ((m - 1) / M, m / M]; M = 15 as in the paper. An answer's confidence is
its share of the probability that all options have together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tunesmith.evaluate.figures import Figure

BINS = 15


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> Figure:
    """The expected calibration error of answers, of which there must be at least one. It has no interval."""
    count = [0] * bins
    off = [0.0] * bins
    for sure, hit in zip(confidence, right, strict=True):
        at = min(max(math.ceil(sure * bins) - 1, 0), bins - 1)
        count[at] += 1
        off[at] += hit - sure
    return Figure(math.fsum(map(abs, off)) / sum(count), sum(count), higher_is_better=False)


def confidence_of(scores: Sequence[Tensor]) -> list[float]:
    """The largest share of probability among options, from their log-probabilities, (options,) each."""
    return [float(score.softmax(-1).max()) for score in scores]
