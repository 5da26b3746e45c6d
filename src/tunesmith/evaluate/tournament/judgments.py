"""Judgments in one form, whoever made them: GPT-4 as published with Vicuna and QLoRA, a judge of ours, or people.

A row of votes:  {"question_id", "model_1", "model_2", "verdict": 1|2|3 or 1|2|"tie"[, "turn", "judge"]}
                 {"question_id", "model_1", "model_2", "score_1", "score_2"}
                 {"question_id", "model_a", "model_b", "winner": "model_a"|"model_b"|"tie"|"tie (bothbad)"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import DataError, did_you_mean
from tunesmith.evaluate.tournament.answers import Reply, aliases, known_ids
from tunesmith.evaluate.tournament.files import PAIRS, Found, numbers_of, text_of
from tunesmith.evaluate.tournament.published import Oriented, orient

Kind = Literal["verdict", "scores"]

# What a verdict says of the one seen first: won, lost, neither.
VERDICTS: dict[str, float] = {
    **dict.fromkeys(("1", "model_1", "model_a", "first"), 1.0),
    **dict.fromkeys(("2", "model_2", "model_b", "second"), 0.0),
    **dict.fromkeys(("3", "tie", "tie (bothbad)", "tie (inconsistent)", "bothbad"), 0.5),
}
PUBLISHED = "published"  # the judge of ratings, whose files do not name it
UNPARSED = {"", "-1", "unparsed", "none", "null"}


@dataclass(frozen=True)
class Judgment:
    """One comparison; `first` and `second` are systems in the order in which the judge saw their answers.

    `outcome` is the share of the point that went to `first` (1, 1/2, 0), `scores` the points given to both; whichever
    of them `kind` names is None where the verdict could not be read.
    """

    question: str
    turn: int
    first: str
    second: str
    kind: Kind
    judge: str = ""
    outcome: float | None = None
    scores: tuple[float, float] | None = None

    @property
    def parsed(self) -> bool:
        """Could the verdict be read?"""
        return (self.outcome if self.kind == "verdict" else self.scores) is not None


def read_judgments(
    ratings: Sequence[Found], votes: Sequence[Found], replies: Mapping[str, Mapping[str, Reply]]
) -> tuple[list[Judgment], list[str]]:
    """All judgments, in an order that does not depend on names or order of the files; and notes on what was left out.

    `replies`: the systems' answers, as far as they are there: their ids tell who is who. Raises DataError.
    """
    oriented, left_out = orient(ratings, known_ids(replies), aliases(replies))
    found = [_published(one) for one in oriented]
    notes = [f"left out {where}: its ids do not tell which systems gave its answers" for where in left_out]
    found += [_vote(row, f"{file.where}:{line}") for file in votes for line, row in file.rows]
    if not found:
        raise DataError("no judgment to count; give files of judgments or votes, or a --judge")
    return sorted(found, key=_place), notes


def _place(one: Judgment) -> tuple[Any, ...]:
    number = int(one.question) if one.question.isdecimal() else -1
    scores = one.scores or (-1.0, -1.0)
    return number, one.question, one.turn, one.first, one.second, one.kind, one.judge, one.outcome or 0.0, scores


def _published(one: Oriented) -> Judgment:
    """`score` is 1, 2, 3 or -1 (unparsed), or two scores that are -1 where they could not be read."""
    named = (one.question, 1, one.first, one.second)
    if isinstance(one.score, list):
        first, second = numbers_of(one.score, f"{one.where}: field 'score'")
        return Judgment(*named, "scores", PUBLISHED, None, (first, second) if min(first, second) >= 0 else None)
    return Judgment(*named, "verdict", PUBLISHED, _outcome(one.score, {}, one.where))


def _vote(row: Mapping[str, Any], where: str) -> Judgment:
    names = next((pair for pair in PAIRS if all(key in row for key in pair)), PAIRS[0])
    first, second = (text_of(dict(row), key, where) for key in names)
    if first == second:
        raise DataError(f"{where}: {first!r} is compared with itself; correct or remove the line")
    question = next((row[key] for key in ("question_id", "prompt_id", "question") if key in row), None)
    turn = _turn(row.get("turn", 1), where)
    judge = str(row.get("judge") or "")
    named = (text_of({"question_id": question}, "question_id", where), turn, first, second)
    said = next((key for key in ("verdict", "winner") if key in row), None)
    scores = _scores(row, where)
    if said is None and scores is None and "score_1" not in row:
        raise DataError(f"{where}: has neither 'verdict' (or 'winner') nor 'score_1' and 'score_2'")
    if said is None or (scores is not None and row[said] in (None, "")):
        return Judgment(*named, "scores", judge, None, scores)
    return Judgment(*named, "verdict", judge, _outcome(row[said], {first: 1.0, second: 0.0}, where), scores)


def _scores(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    given = [row.get("score_1"), row.get("score_2")]
    if any(value is None or str(value).strip().lower() in UNPARSED for value in given):
        return None
    scores = numbers_of(given, where)
    return scores if min(scores) >= 0 else None


def _turn(value: object, where: str) -> int:
    turn = int(str(value)) if str(value).isdecimal() else 0
    if turn < 1:
        raise DataError(f"{where}: field 'turn' should be 1 or 2, not {str(value)[:40]!r}")
    return turn


def _outcome(said: object, names: Mapping[str, float], where: str) -> float | None:
    """What a verdict says of the first: a number, a word, or the winner's own name; None where it was not read."""
    word = str(int(said)) if isinstance(said, float) and said.is_integer() else str(said).strip()
    table = {**VERDICTS, **names}
    if word in table:
        return table[word]
    if word.lower() in VERDICTS:
        return VERDICTS[word.lower()]
    if said is None or word.lower() in UNPARSED:
        return None
    raise DataError(
        f"{where}: verdict {word[:40]!r}{did_you_mean(word, table)}; should be 1, 2, 3 (tie), or a name of the two"
    )
