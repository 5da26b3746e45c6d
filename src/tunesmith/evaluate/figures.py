"""One measured number and how sure it is.

share:  Wilson's score interval          (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
mean:   the normal interval              m +- z s / sqrt(n), s^2 with n - 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Figure:
    """`value`, measured on `count` items, with the ends of its 95% `interval` (None: it has none)."""

    value: float
    count: int
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As a report holds it: value, count, interval as a list or None."""
        return {
            "value": self.value,
            "count": self.count,
            "interval": None if self.interval is None else list(self.interval),
            "higher_is_better": self.higher_is_better,
        }


def share(right: Sequence[object], *, higher_is_better: bool = True) -> Figure:
    """The share of true ones in `right`, which must not be empty, with Wilson's interval."""
    count = len(right)
    value = sum(map(bool, right)) / count
    middle = (value + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = half_interval(value, count)
    return Figure(value, count, (max(0.0, middle - half), min(1.0, middle + half)), higher_is_better)


def mean(values: Sequence[float], *, higher_is_better: bool = True) -> Figure:
    """The mean of `values`, which must not be empty; of a single one there is no interval."""
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Figure(value, count, None, higher_is_better)
    half = Z * math.sqrt(math.fsum((v - value) ** 2 for v in values) / (count - 1) / count)
    return Figure(value, count, (value - half, value + half), higher_is_better)


def half_interval(value: float, count: int) -> float:
    """Half the width of Wilson's 95% interval of a share of `count` trials."""
    return Z / (1 + Z * Z / count) * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
