"""Ask a judge for every comparison that a file of judgments lacks, and append each verdict as it comes.

    games = question x turn x two systems x both orders  ->  ask  ->  a line each

A line is a row of votes (see judgments.py) with "kind", the judge's "text" and "asked": a hash of the messages. A game
whose line is there is not asked again; one whose question or answers have changed since is another game. Lines of games
that are not played now stay in the file, since they may be played again, and are not counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from tunesmith.errors import ConfigError, DataError, JudgeError
from tunesmith.evaluate.tournament.answers import Question, Reply
from tunesmith.evaluate.tournament.judgments import Kind
from tunesmith.evaluate.tournament.prompts import Message, Verdict, ask, read_verdict
from tunesmith.files import append_line, atomic_write_bytes


class Judge(Protocol):
    """Whoever answers messages: an endpoint, or a model of ours."""

    @property
    def name(self) -> str:
        """What the file of judgments calls it."""

    def replies(self, conversations: Iterable[Sequence[Message]]) -> Iterator[tuple[int, str]]:
        """(number of the conversation, answer) as they come, in any order. Raises JudgeError."""


@dataclass(frozen=True)
class Game:
    """One comparison to be made; `first` and `second` in the order in which the judge sees them."""

    question: Question
    turn: int
    first: Reply
    second: Reply
    kind: Kind

    def messages(self) -> list[Message]:
        """What the judge is asked."""
        return ask(self.question, self.first, self.second, self.turn, self.kind)


@dataclass(frozen=True)
class Judged:
    """How many games there are, were there already, were judged now, and could not be read among the last.

    `marks`: the games' own, as their lines have them under "asked".
    """

    games: int
    there: int
    judged: int
    unparsed: int
    marks: frozenset[str]


def games_to_judge(
    questions: Sequence[Question],
    replies: dict[str, dict[str, Reply]],
    *,
    kind: Kind = "verdict",
    turns: int = 1,
    reference: str | None = None,
    both_orders: bool = True,
) -> list[Game]:
    """Every pair of systems on every question and turn; with a `reference`, only the pairs that hold it.

    Raises ConfigError, or DataError where a system lacks an answer.
    """
    if turns not in (1, 2):
        raise ConfigError(f"--turns {turns}: should be 1 or 2")
    if len(replies) < 2:
        raise ConfigError(f"a tournament needs the answers of two systems, there are {len(replies)}; give --answers")
    if reference is not None and reference not in replies:
        raise ConfigError(f"--reference {reference}: has no answers (there are {', '.join(sorted(replies))})")
    pairs = [pair for pair in combinations(sorted(replies), 2) if reference is None or reference in pair]
    orders = [order for a, b in pairs for order in ((a, b), (b, a))[: 1 + both_orders]]
    found = [
        Game(question, turn, _answered(replies, a, question, turn), _answered(replies, b, question, turn), kind)
        for question in questions
        for turn in range(1, min(turns, len(question.turns)) + 1)
        for a, b in orders
    ]
    if not found:
        raise DataError("there is nothing to judge: no question is left")
    return found


def _answered(replies: dict[str, dict[str, Reply]], name: str, question: Question, turn: int) -> Reply:
    reply = replies[name].get(question.id)
    if reply is None or len(reply.turns) < turn:
        what = f"turn {turn} of question {question.id}" if reply else f"question {question.id}"
        raise DataError(f"{name}: has no answer to {what}; answer it, or take it out of the questions")
    return reply


def judge_games(
    games: Sequence[Game],
    judge: Judge,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    weights: Sequence[str] = (),
) -> Judged:
    """Judge what `path` lacks; `progress(done, of)` is called after each verdict. Raises JudgeError, DiskError.

    `weights` says which weights the judge's name stands for: with others, everything is judged anew. What was judged
    before an error or an interruption stays in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            return _judge(games, judge, path, progress, weights)
    except Timeout:
        raise JudgeError(f"{path}: another process is judging into this file; wait for it, or give another") from None


def _judge(
    games: Sequence[Game], judge: Judge, path: Path, progress: Callable[[int, int], None], weights: Sequence[str]
) -> Judged:
    there = _asked_in(path)
    marks = {_mark(game, [judge.name, *weights]): game for game in games}
    todo = [(mark, game) for mark, game in marks.items() if mark not in there]
    unparsed = 0
    for done, (number, text) in enumerate(judge.replies(game.messages() for _, game in todo), 1):
        mark, game = todo[number]
        verdict = read_verdict(text, game.kind)
        unparsed += verdict == Verdict()
        append_line(path, json.dumps(_line(game, verdict, judge.name, text, mark), ensure_ascii=False))
        progress(done, len(todo))
    return Judged(len(marks), len(marks) - len(todo), len(todo), unparsed, frozenset(marks))


def _mark(game: Game, judge: Sequence[str]) -> str:
    said = json.dumps([*judge, game.kind, game.first.system, game.second.system, game.messages()])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _line(game: Game, verdict: Verdict, judge: str, text: str, mark: str) -> dict[str, Any]:
    said = {1.0: 1, 0.0: 2, 0.5: 3, None: -1}
    scores = verdict.scores or (-1, -1)
    result = (
        {"verdict": said[verdict.outcome]} if game.kind == "verdict" else {"score_1": scores[0], "score_2": scores[1]}
    )
    return {
        "question_id": game.question.id,
        "turn": game.turn,
        "model_1": game.first.system,
        "model_2": game.second.system,
        **result,
        "judge": judge,
        "text": text,
        "asked": mark,
    }


def _asked_in(path: Path) -> set[str]:
    """The marks of the games that are in the file; a last line that a crash cut short is removed from it."""
    if not path.is_file():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    marks = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            marks.add(str(json.loads(line)["asked"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{path}:{number}: is no line of a judge's; give --out another file") from None
    if len(whole) < len(data):
        atomic_write_bytes(path, whole)
    return marks
