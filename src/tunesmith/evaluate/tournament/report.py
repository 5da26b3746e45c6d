"""The tables of a tournament, as data and as Markdown: Elo and Bradley-Terry, % of a reference, position bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.evaluate.tournament.bradley_terry import Strengths, bradley_terry
from tunesmith.evaluate.tournament.elo import Elo, Games, elo, games_of
from tunesmith.evaluate.tournament.judgments import Judgment
from tunesmith.evaluate.tournament.position import position_bias
from tunesmith.evaluate.tournament.score import shares


@dataclass(frozen=True)
class Rules:
    """How games are rated: Elo's K and start, `orderings` of `games` drawn each; bootstrap `resamples`; the seed."""

    k: float = 32.0
    start: float = 1000.0
    orderings: int = 10_000
    games: int = 500
    resamples: int = 1_000
    seed: int = 0


def tournament_report(judgments: Sequence[Judgment], rules: Rules, reference: str | None = None) -> dict[str, Any]:
    """Everything that follows from the judgments: {"rules", "judgments", "ratings", "shares", "position", "notes"}.

    `ratings` is empty where no game could be read, `shares` where no `reference` is named. Raises ConfigError,
    DataError.
    """
    report: dict[str, Any] = {"rules": asdict(rules), "judgments": _counts(judgments), "notes": []}
    report["ratings"] = _ratings(judgments, rules, report["notes"])
    report["reference"] = reference
    scored = shares(judgments, reference, resamples=rules.resamples, seed=rules.seed) if reference else []
    report["shares"] = [_plain(asdict(share)) for share in scored]
    report["position"] = [_plain(asdict(bias)) for bias in position_bias(judgments)]
    if any(one.kind == "scores" for one in judgments) and reference is None:
        report["notes"].append("there are scores, but no --reference to give them as a percentage of")
    return report


def _counts(judgments: Sequence[Judgment]) -> dict[str, int]:
    verdicts = [one for one in judgments if one.kind == "verdict"]
    return {
        "verdicts": len(verdicts),
        "unparsed_verdicts": sum(not one.parsed for one in verdicts),
        "scores": len(judgments) - len(verdicts),
        "unparsed_scores": sum(not one.parsed for one in judgments if one.kind == "scores"),
        "questions": len({one.question for one in judgments}),
        "judges": len({one.judge for one in judgments}),
    }


def _ratings(judgments: Sequence[Judgment], rules: Rules, notes: list[str]) -> list[dict[str, Any]]:
    games = games_of(judgments)
    if rules.games > len(games):
        notes.append(f"there are {len(games):,} games, fewer than the {rules.games:,} of an ordering: all are played")
    rated = elo(
        games, orderings=rules.orderings, drawn=rules.games, k=rules.k, start=rules.start, seed=rules.seed
    )  # fmt: skip
    strengths = bradley_terry(games, resamples=rules.resamples, start=rules.start, seed=rules.seed)
    if strengths.reason:
        notes.append(f"no Bradley-Terry ratings: {strengths.reason}")
    if strengths.left_out:
        notes.append(
            f"{strengths.left_out:,} of {rules.resamples:,} bootstrap samples have no Bradley-Terry ratings and are "
            "left out of the intervals, which are too narrow then"
        )
    order = np.argsort(-rated.mean, kind="stable")
    return [_row(games, rated, strengths, int(number)) for number in order]


def _row(games: Games, rated: Elo, strengths: Strengths, number: int) -> dict[str, Any]:
    outcomes = np.concatenate(
        [games.outcome[games.first == number], 1 - games.outcome[games.second == number]]
    )  # fmt: skip
    values = {
        "elo": rated.mean, "elo_error": rated.error, "elo_deviation": rated.deviation,
        "strength": strengths.rating, "strength_low": strengths.low, "strength_high": strengths.high,
    }  # fmt: skip
    return {
        "system": games.names[number],
        **{key: _number(float(value[number])) for key, value in values.items()},
        "games": len(outcomes),
        "won": int((outcomes == 1).sum()),
        "tied": int((outcomes == 0.5).sum()),
        "lost": int((outcomes == 0).sum()),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in row.items()}


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables, readable as they are."""
    rules = report["rules"]
    parts = [
        f"Elo: K {rules['k']:g}, start {rules['start']:g}, mean over {rules['orderings']:,} orderings of "
        f"{rules['games']:,} games drawn, seed {rules['seed']}. Bradley-Terry: 95% interval of "
        f"{rules['resamples']:,} bootstrap samples.",
        _table(("system", "Elo", "+-", "Bradley-Terry", "95% interval", "games", "won", "tied", "lost"), [
            (r["system"], _show(r["elo"]), _show(r["elo_error"], 1), _show(r["strength"]),
             f"{_show(r['strength_low'])} to {_show(r['strength_high'])}", r["games"], r["won"], r["tied"], r["lost"])
            for r in report["ratings"]
        ]),
    ]  # fmt: skip
    if report["shares"]:
        name = report["reference"]
        head = ("system", f"{name} first", f"{name} second", "mean", "+-", "judgments", "unparsed")
        rows = [
            (s["system"], *(_show(s[key], 1) for key in ("reference_first", "reference_second", "mean", "error")),
             s["count"], s["unparsed"])
            for s in report["shares"]
        ]  # fmt: skip
        parts += [f"Scores in % of those of {name}, by who was seen first:", _table(head, rows)]
    parts += ["Position bias, over pairs judged in both orders:", _position(report["position"])]
    counts = report["judgments"]
    parts.append(
        f"{counts['verdicts']:,} verdicts, {counts['unparsed_verdicts']:,} of them unparsed and dropped; "
        f"{counts['scores']:,} pairs of scores, {counts['unparsed_scores']:,} unparsed; "
        f"{counts['questions']:,} questions."
    )
    return "\n\n".join([*parts, *(f"Note: {note}." for note in report["notes"])])


def _position(biases: Sequence[dict[str, Any]]) -> str:
    head = ("judge", "kind", "first", "tie", "second", "pairs", "consistent", "follows first", "follows second",
            "advantage of the first", "+-")  # fmt: skip
    rows = []
    for bias in biases:
        seen = max(bias["first"] + bias["tie"] + bias["second"], 1)
        pairs = max(bias["pairs"], 1)
        rows.append((
            bias["judge"] or "-", bias["kind"], *(f"{bias[key] / seen:.1%}" for key in ("first", "tie", "second")),
            bias["pairs"], *(f"{bias[key] / pairs:.1%}" for key in ("consistent", "follows_first", "follows_second")),
            _show(bias["advantage"], 3), _show(bias["error"], 3),
        ))  # fmt: skip
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with its columns aligned."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]  # fmt: skip
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
