"""Elo, Bradley-Terry, shares of a reference and position bias against closed forms and other computations."""

from __future__ import annotations

import json
import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.tournament.bradley_terry import bradley_terry
from tunesmith.evaluate.tournament.elo import elo, games_of
from tunesmith.evaluate.tournament.judgments import Judgment
from tunesmith.evaluate.tournament.position import position_bias
from tunesmith.evaluate.tournament.report import Rules, markdown, tournament_report
from tunesmith.evaluate.tournament.score import shares


def games(*played: tuple[str, str, float | None]) -> list[Judgment]:
    return [Judgment(str(i), 1, a, b, "verdict", "j", outcome) for i, (a, b, outcome) in enumerate(played)]


def scored(*played: tuple[str, str, str, float, float]) -> list[Judgment]:
    return [Judgment(q, 1, a, b, "scores", "j", None, (x, y) if x >= 0 else None) for q, a, b, x, y in played]


def by_hand(played: list[tuple[str, str, float]], k: float = 32, start: float = 1000) -> dict[str, float]:
    """Elo of one ordering, game by game, as Elo (1978) writes it."""
    ratings: dict[str, float] = {}
    for a, b, outcome in played:
        ra, rb = ratings.get(a, start), ratings.get(b, start)
        expected = 1 / (1 + 10 ** ((rb - ra) / 400))
        ratings[a], ratings[b] = ra + k * (outcome - expected), rb + k * ((1 - outcome) - (1 - expected))
    return ratings


def test_one_game_moves_half_of_k() -> None:
    for outcome, moved in ((1.0, 16), (0.0, -16), (0.5, 0)):
        rated = elo(games_of(games(("a", "b", outcome))), orderings=3)
        assert rated.mean.tolist() == [1000 + moved, 1000 - moved]
        assert rated.deviation.tolist() == [0, 0]
    assert elo(games_of(games(("a", "b", 1.0))), orderings=2, k=10, start=0).mean.tolist() == [5, -5]


def test_an_ordering_is_played_game_by_game() -> None:
    same = [("a", "b", 1.0)] * 40  # in any order the same
    rated = elo(games_of(games(*same)), orderings=2)
    assert rated.mean == pytest.approx(list(by_hand(same).values()))


def test_the_mean_is_that_over_all_orderings() -> None:
    """Four games have 24 orderings (and 12 of the first two): their exact mean against that of random ones."""
    played = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 0.5), ("b", "a", 1.0)]
    for drawn in (4, 2):
        orders = [by_hand(list(order)) for order in permutations(played, drawn)]
        exact = {name: sum(r.get(name, 1000.0) for r in orders) / len(orders) for name in "abc"}
        rated = elo(games_of(games(*played)), orderings=6_000, drawn=drawn, seed=3)
        assert rated.mean == pytest.approx([exact[name] for name in "abc"], abs=0.5)
        sd = np.std([[r.get(name, 1000.0) for name in "abc"] for r in orders], axis=0)
        assert rated.deviation == pytest.approx(sd, rel=0.1, abs=1e-9)
        assert rated.error == pytest.approx(1.959964 * rated.deviation / math.sqrt(6_000))


def test_the_seed_decides_and_points_are_kept() -> None:
    found = games_of(games(*[("a", "b", 1.0), ("b", "c", 0.0), ("c", "a", 1.0)] * 9))
    first, again, other = (elo(found, orderings=2_500, drawn=5, seed=seed).mean for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.sum() == pytest.approx(3000)


def test_unparsed_verdicts_are_no_games() -> None:
    found = games_of(games(("a", "b", None), ("a", "b", 1.0), ("c", "b", None)))
    assert found.names == ("a", "b") and len(found) == 1
    with pytest.raises(DataError, match="no verdict could be read"):
        games_of(games(("a", "b", None)))
    for wrong in ({"orderings": 0}, {"drawn": 0}, {"k": 0}):
        with pytest.raises(ConfigError, match="must be above 0"):
            elo(found, **wrong)


def test_scores_alone_are_games_of_the_higher() -> None:
    found = games_of(
        scored(("1", "a", "b", 9, 8), ("1", "b", "a", 7, 7), ("2", "a", "b", 3, 4), ("3", "a", "b", -1, -1))
    )
    assert found.outcome.tolist() == [1, 0.5, 0]


def test_two_systems_have_a_closed_form() -> None:
    """R_a - R_b = 400 log10(points of a / points of b)."""
    found = games_of(games(*[("a", "b", 1.0)] * 6, *[("b", "a", 1.0)] * 2, ("a", "b", 0.5)))
    rating = bradley_terry(found, resamples=10).rating
    assert rating[0] - rating[1] == pytest.approx(400 * math.log10(6.5 / 2.5), abs=1e-6)
    assert rating.mean() == pytest.approx(1000)


def test_strengths_are_recovered_from_expected_points() -> None:
    """Where every pair's points are those that strengths 4, 2 and 1 expect, those are the maximum."""
    p = {"a": 4, "b": 2, "c": 1}
    played = []
    for x, y in (("a", "b"), ("b", "c"), ("a", "c")):
        total = (p[x] + p[y]) * 4
        played += [(x, y, 1.0)] * (p[x] * 4) + [(x, y, 0.0)] * (total - p[x] * 4)
    rating = bradley_terry(games_of(games(*played)), resamples=5, start=0).rating
    logs = 400 * np.log10([4, 2, 1])
    assert rating == pytest.approx(logs - logs.mean(), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=5, max_size=40)
)
def test_at_the_maximum_points_are_as_expected(played) -> None:
    """The gradient of the log-likelihood is 0: each system's points equal the sum of what its strength expects."""
    real = [(f"s{a}", f"s{b}", o) for a, b, o in played if a != b]
    if not real:
        return
    found = games_of(games(*real))
    strengths = bradley_terry(found, resamples=1)
    if strengths.reason:
        assert np.isnan(strengths.rating).all()
        return
    points = found.points()
    difference = strengths.rating[:, None] - strengths.rating[None, :]
    expected = ((points + points.T) / (1 + 10 ** (-difference / 400))).sum(axis=1)
    assert expected == pytest.approx(points.sum(axis=1), abs=1e-4)


def binomial_quantile(q: float, n: int, p: float) -> int:
    """The least w with P(W <= w) >= q."""
    total = 0.0
    for w in range(n + 1):
        total += math.comb(n, w) * p**w * (1 - p) ** (n - w)
        if total >= q:
            return w
    return n


def test_the_interval_is_that_of_the_bootstrap() -> None:
    """Two systems, 100 games: wins in a sample are binomial, so are the ends of the interval."""
    found = games_of(games(*[("a", "b", 1.0)] * 70, *[("a", "b", 0.0)] * 30))
    strengths = bradley_terry(found, resamples=4_000, seed=5)
    low, high = (
        200 * math.log10(w / (100 - w)) + 1000 for w in (binomial_quantile(q, 100, 0.7) for q in (0.025, 0.975))
    )
    assert strengths.low[0] == pytest.approx(low, abs=6) and strengths.high[0] == pytest.approx(high, abs=6)
    again = bradley_terry(found, resamples=4_000, seed=5)
    assert again.low.tolist() == strengths.low.tolist()


@pytest.mark.parametrize(
    ("played", "said"),
    [
        ([("a", "b", 1.0), ("b", "c", 1.0), ("c", "b", 1.0)], "a never lost a point"),
        ([("a", "b", 1.0), ("b", "a", 1.0), ("a", "c", 1.0)], "c never won a point"),
        ([("a", "b", 0.5), ("c", "d", 0.5), ("a", "c", 1.0)], "never lost a point to the others"),
    ],
)
def test_strengths_without_bound_are_not_given(played, said) -> None:
    strengths = bradley_terry(games_of(games(*played)), resamples=10)
    assert said in strengths.reason and np.isnan(strengths.rating).all()
    report = tournament_report(games(*played), Rules(orderings=10, resamples=10))
    assert any(said in note for note in report["notes"]) and report["ratings"][0]["strength"] is None
    assert said in markdown(report)


def test_samples_without_a_maximum_are_counted() -> None:
    found = games_of(games(("a", "b", 1.0), ("a", "b", 1.0), ("b", "a", 1.0)))
    strengths = bradley_terry(found, resamples=2_000)  # all of one kind: (2/3)^3 + (1/3)^3 = 1/3
    assert strengths.left_out / 2_000 == pytest.approx(1 / 3, abs=0.04)
    with pytest.raises(ConfigError, match="--resamples 0"):
        bradley_terry(found, resamples=0)


def test_shares_by_order_and_pooled() -> None:
    """(10 + 10) / (8 + 8) one way, 6 / 10 the other; pooled 26 / 26, which no mean of the two is."""
    found = shares(
        scored(
            ("1", "ref", "x", 8, 10), ("2", "ref", "x", 8, 10), ("1", "x", "ref", 6, 10), ("2", "x", "ref", -1, -1),
            ("1", "y", "ref", 1, 4), ("1", "y", "x", 9, 9),
        ),
        "ref",
    )  # fmt: skip
    x, y = found
    assert (x.system, x.reference_first, x.reference_second, x.mean) == ("x", 125.0, 60.0, 100.0)
    assert (x.count, x.unparsed) == (4, 1)
    assert y.mean == 25 and math.isnan(y.reference_first) and math.isnan(y.error)
    assert 0 < x.error < 30  # questions 16/18 and 10/8: pooled between 88.9 and 125
    with pytest.raises(ConfigError, match=r"--reference rev: nothing was scored.*did you mean 'ref'"):
        shares(scored(("1", "ref", "x", 8, 10)), "rev")


def test_position_bias_is_counted_over_both_orders() -> None:
    played = [
        Judgment("1", 1, "a", "b", "verdict", "j", 1.0), Judgment("1", 1, "b", "a", "verdict", "j", 0.0),  # consistent
        Judgment("2", 1, "a", "b", "verdict", "j", 1.0), Judgment("2", 1, "b", "a", "verdict", "j", 1.0),  # first
        Judgment("3", 1, "a", "b", "verdict", "j", 0.0), Judgment("3", 1, "b", "a", "verdict", "j", 0.5),  # second
        Judgment("4", 1, "a", "b", "verdict", "j", 1.0),  # one order
        Judgment("5", 1, "a", "b", "verdict", "j", None), Judgment("5", 1, "b", "a", "verdict", "j", 1.0),
        Judgment("1", 2, "b", "a", "verdict", "j", 1.0),  # another turn
    ]  # fmt: skip
    (bias,) = position_bias(played)
    assert (bias.first, bias.tie, bias.second, bias.unparsed) == (6, 1, 2, 1)
    assert (bias.pairs, bias.consistent, bias.follows_first, bias.follows_second) == (3, 1, 1, 1)
    assert bias.advantage == pytest.approx((0 + 0.5 - 0.25) / 3)


def test_position_bias_of_scores_is_in_their_unit() -> None:
    """a gets 8 seen first and 7 seen second, b 6 and 6: half a point for the first place."""
    (bias,) = position_bias(scored(("1", "a", "b", 8, 6), ("1", "b", "a", 6, 7)))
    assert bias.advantage == pytest.approx(((8 - 7) + (6 - 6)) / 2) and math.isnan(bias.error)
    two = position_bias([*scored(("1", "a", "b", 8, 6)), *games(("a", "b", 1.0))])
    assert [bias.kind for bias in two] == ["scores", "verdict"]


def test_the_tables_are_markdown_and_json() -> None:
    report = tournament_report(
        [*games(("a|x", "b", 1.0), ("b", "a|x", 1.0)), *scored(("1", "a|x", "b", 8, 4))], Rules(orderings=10), "b"
    )
    text = markdown(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table[:4]}) == 1 and "a\\|x" in text
    assert "2 games, fewer than the 500 of an ordering" in text and "b first" in text
    assert json.loads(json.dumps(report, allow_nan=False)) == report
