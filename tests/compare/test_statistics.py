"""Intervals and tests against closed forms, hand computations and numbers that are in print."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tunesmith.compare import statistics
from tunesmith.compare.statistics import (
    compare,
    holm,
    mcnemar,
    over_both,
    over_rows,
    over_seeds,
    paired_bootstrap,
    t_quantile,
)
from tunesmith.compare.table import front, letters
from tunesmith.evaluate.outcomes import Outcomes


def of(values, weights=None) -> Outcomes:
    return Outcomes(tuple(map(float, values)), tuple(weights or [1.0] * len(values)))


def t_area(edge: float, df: int, steps: int = 20_000) -> float:
    """P(T < edge), by Simpson's rule on the density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = np.linspace(0, edge, steps + 1)
    y = scale * (1 + x * x / df) ** (-(df + 1) / 2)
    return 0.5 + float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3)


@pytest.mark.parametrize("df", [*range(1, 31), 31, 40, 60, 120, 1000])
def test_t_quantiles(df):
    assert t_area(t_quantile(df), df) == pytest.approx(0.975, abs=4e-5)  # printed in three digits


def test_over_seeds_by_hand():
    found = over_seeds([0.80, 0.84, 0.88])  # s = 0.04, t(.975, 2) = 4.303
    assert found.mean == pytest.approx(0.84)
    assert found.half == pytest.approx(4.303 * 0.04 / math.sqrt(3))
    assert found.over == "3 seeds"


def test_over_rows_is_wilsons():
    found = over_rows(of([1] * 90 + [0] * 10))  # Wilson's interval of 90/100: 0.8256 to 0.9448
    assert (found.mean, found.half) == (pytest.approx(0.9), pytest.approx((0.9448 - 0.8256) / 2, abs=1e-4))


def test_over_rows_of_a_loss_is_the_normal_interval_of_many_rows():
    draw = np.random.default_rng(1).normal(2.0, 0.5, 2000)
    found = over_rows(of(draw))
    assert found.half == pytest.approx(1.96 * draw.std(ddof=1) / math.sqrt(2000), rel=0.05)


def test_seeds_that_agree_do_not_make_a_figure_certain():
    rows = of([1] * 90 + [0] * 10)
    found = over_both([0.9, 0.9], [rows, rows])
    assert found.half == pytest.approx(over_rows(rows).half, rel=0.05)  # drawn, not Wilson's, once averaged
    apart = over_both([0.8, 0.9], [of([1] * 80 + [0] * 20), rows])
    assert apart.half > over_seeds([0.8, 0.9]).half


def test_mcnemar_by_hand():
    a = [1] * 10 + [0] * 2 + [1] * 50
    b = [0] * 10 + [1] * 2 + [1] * 50
    # b = 10, c = 2: 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 2 * 79 / 4096
    assert mcnemar(a, b) == pytest.approx(158 / 4096)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0
    assert mcnemar([1] * 3000 + [0] * 2900, [0] * 3000 + [1] * 2900) == pytest.approx(0.1975, abs=2e-3)  # z = 1.29


def test_the_bootstrap_agrees_with_mcnemar_on_many_rows():
    draw = random.Random(0)
    a = [float(draw.random() < 0.8) for _ in range(2000)]
    b = [x if draw.random() < 0.85 else float(draw.random() < 0.65) for x in a]
    assert paired_bootstrap([of(a)], [of(b)]) == pytest.approx(mcnemar(a, b), abs=0.02)


def test_the_bootstrap_is_calibrated():
    """With no difference at all, a p-value below .05 comes about once in twenty."""
    draw, below = np.random.default_rng(0), 0
    statistics_draws = statistics.DRAWS
    statistics.DRAWS = 1000
    try:
        for _ in range(200):
            a, b = draw.normal(size=80), draw.normal(size=80)
            below += paired_bootstrap([of(a)], [of(b)]) < 0.05
    finally:
        statistics.DRAWS = statistics_draws
    assert 2 <= below <= 22


def test_a_ratio_of_sums_is_resampled_as_one():
    """A row of 100 tokens counts 100 times: means of means would say something else."""
    first, second = of([100.0, 1.0], [100.0, 1.0]), of([150.0, 0.5], [100.0, 1.0])
    assert first.ratio == pytest.approx(1.0) and second.ratio == pytest.approx(150.5 / 101)
    assert compare([first], [second])[1] == "bootstrap"


def test_the_test_that_fits():
    assert compare([of([1, 0])], [of([1, 1])])[1] == "McNemar"
    assert compare([of([1, 0])] * 2, [of([1, 1])] * 2)[1] == "bootstrap"
    assert compare([of([1, 0.5])], [of([1, 1])])[1] == "bootstrap"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_front_is_what_nobody_beats():
    points = [(1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7), (4, 0.9), (1, 0.5)]
    assert front(points) == {0, 1, 4, 5}


def test_letters():
    assert [letters(n) for n in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
