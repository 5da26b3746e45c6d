"""Intervals and tests against closed forms, hand computations and numbers that are in print."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tunesmith.compare import statistics
from tunesmith.compare.statistics import (
    across_seeds,
    compare,
    holm,
    mcnemar,
    over_both,
    over_change,
    over_rows,
    over_seeds,
    paired_bootstrap,
    t_quantile,
    two_sided,
)
from tunesmith.compare.table import front, letters
from tunesmith.evaluate.forgetting import paired_interval
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
    assert paired_bootstrap(of(a), of(b)) == pytest.approx(mcnemar(a, b), abs=0.02)


def test_the_bootstrap_is_calibrated():
    """With no difference at all, a p-value below .05 comes about once in twenty."""
    draw, below = np.random.default_rng(0), 0
    statistics_draws = statistics.DRAWS
    statistics.DRAWS = 1000
    try:
        for _ in range(200):
            a, b = draw.normal(size=80), draw.normal(size=80)
            below += paired_bootstrap(of(a), of(b)) < 0.05
    finally:
        statistics.DRAWS = statistics_draws
    assert 2 <= below <= 22


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30, 31, 500])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_the_tails_of_students_t(t, df):
    assert two_sided(t, df) == two_sided(-t, df) == pytest.approx(2 * (1 - t_area(t, df)), abs=1e-7)


def lines(draw, seeds: int, rows: int, spread: float) -> list[Outcomes]:
    """Right and wrong rows of a method whose seeds differ by `spread`."""
    return [of(draw.random(rows) < 0.7 + spread * draw.normal()) for _ in range(seeds)]


@pytest.mark.parametrize(("seeds", "spread"), [((3, 3), 0.05), ((3, 3), 0.0), ((5, 2), 0.05), ((3, 1), 0.05)])
def test_the_test_over_seeds_is_calibrated(seeds, spread, monkeypatch):
    """Two methods alike in all but the seed: below .05 about once in twenty; by the rows alone far more often."""
    monkeypatch.setattr(statistics, "DRAWS", 300)
    draw, below, rows_alone = np.random.default_rng(0), 0, 0
    for _ in range(150):
        first, second = (lines(draw, n, 300, spread) for n in seeds)
        below += compare(first, second) == (pytest.approx(0, abs=0.05), "seeds")
        a, b = (np.mean([one.values for one in side], axis=0) for side in (first, second))
        rows_alone += paired_bootstrap(of(a), of(b)) < 0.05
    assert below <= 16
    assert rows_alone >= 40 or not spread


def test_the_test_over_seeds_finds_what_is_there(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 300)
    draw = np.random.default_rng(1)
    better = [of(draw.random(300) < 0.9) for _ in range(3)]
    assert compare(better, lines(draw, 3, 300, 0.02))[0] < 0.05
    assert compare(better, better) == (1.0, "seeds")
    assert compare([of([1] * 9)] * 2, [of([0] * 9)] * 2) == (1 / 300, "seeds")


def test_an_untrained_side_has_no_seed():
    draw = np.random.default_rng(2)
    first, base = lines(draw, 3, 400, 0.03), of(draw.random(400) < 0.6)
    assert across_seeds(first, [base], fixed=True) < across_seeds(first, [base])


def test_the_interval_of_a_change():
    before, after = of([1] * 50 + [0] * 50), of([1] * 60 + [0] * 40)
    one = over_change([after], before)
    low, high = paired_interval(before.values, after.values)
    assert one.mean == pytest.approx(0.1) and one.half == pytest.approx((high - low) / 2) and one.over == "100 rows"
    two = over_change([after, of([1] * 80 + [0] * 20)], before)
    assert (
        two.mean == pytest.approx(0.2) and two.half > over_seeds([0.1, 0.3]).half and two.over == "2 seeds and 100 rows"
    )
    draw = np.random.default_rng(0)
    a, b = draw.normal(1, 1, 500), draw.normal(2, 1, 500)
    loss = over_change([of(b)], of(a))
    assert loss.half == pytest.approx(1.96 * (b - a).std() / 500**0.5, rel=0.05)


def test_a_ratio_of_sums_is_resampled_as_one():
    """A row of 100 tokens counts 100 times: means of means would say something else."""
    first, second = of([100.0, 1.0], [100.0, 1.0]), of([150.0, 0.5], [100.0, 1.0])
    assert first.ratio == pytest.approx(1.0) and second.ratio == pytest.approx(150.5 / 101)
    assert compare([first], [second])[1] == "bootstrap"


def test_the_test_that_fits():
    assert compare([of([1, 0])], [of([1, 1])])[1] == "McNemar"
    assert compare([of([1, 0])] * 2, [of([1, 1])] * 2)[1] == "seeds"
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
