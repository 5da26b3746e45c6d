"""Questions, and what systems answered: in the forms of Vicuna, MT-bench and QLoRA, and a plain one.

    {"question_id", "model_id", "choices": [{"turns": [...]}]}      MT-bench
    {"question_id", "model_id", "answer_id", "text"}                Vicuna
    {"question_id", "text": QUESTION, "generation"}                 QLoRA
    {"question_id", "model_id", "turns": [...]}                     this command
    {"question_id"[, "model_id"], "answer"}                         by hand

A system is called as `model_id` says (a date after its colon aside), else as its file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.evaluate.tournament.files import Found, collect, text_of
from tunesmith.evaluate.tournament.published import Systems, answer_id, plain, short_name


@dataclass(frozen=True)
class Question:
    """What was asked, a text a turn; `reference` is a known answer to each turn, or empty."""

    id: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """One system's answers to one question, a text a turn; `ids` are the names that files of ratings give them.

    `file` is the name of the file that they were read from, without its ending.
    """

    system: str
    question: str
    turns: tuple[str, ...]
    ids: tuple[str, ...] = ()
    file: str = ""


def read_replies(files: Sequence[Found]) -> dict[str, dict[str, Reply]]:
    """Answers by system and question. Raises DataError where a system answers a question twice."""
    replies: dict[str, dict[str, Reply]] = defaultdict(dict)
    for file in files:
        for line, row in file.rows:
            where = f"{file.where}:{line}"
            reply = _reply(row, file.stem, where)
            if reply.question in replies[reply.system]:
                raise DataError(f"{where}: {reply.system!r} has answered question {reply.question} already; keep one")
            replies[reply.system][reply.question] = reply
    return dict(replies)


def known_ids(replies: Mapping[str, Mapping[str, Reply]]) -> dict[tuple[str, str], Systems]:
    """Which systems gave an answer, by question and answer id: equal answers have one id."""
    known: dict[tuple[str, str], set[str]] = defaultdict(set)
    for system, answers in replies.items():
        for reply in answers.values():
            for one in reply.ids:
                known[reply.question, one].add(system)
    return {key: frozenset(systems) for key, systems in known.items()}


def aliases(replies: Mapping[str, Mapping[str, Reply]]) -> Systems:
    """What the systems whose answers are known may be called in names of files, as `plain` has it."""
    names = {name for answers in replies.values() for reply in answers.values() for name in (reply.system, reply.file)}
    return frozenset(plain(name) for name in names)


def _reply(row: dict[str, Any], stem: str, where: str) -> Reply:
    question = text_of(row, "question_id", where)
    named = row.get("model_id")
    system = named.split(":")[0] if isinstance(named, str) and named else short_name(stem)
    turns, judged = _turns(row, where)
    given = row.get("answer_id")
    ids = (given,) if isinstance(given, str) else tuple(dict.fromkeys(answer_id(text) for text in (*judged, *turns)))
    return Reply(system, question, turns, ids, stem)


def _turns(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers, and those texts of them that a judge may have been given instead (QLoRA's cut generations)."""
    if "generation" in row:
        cut = row.get("generation_truncated")
        whole = _text(row["generation"], where)
        return (cut if isinstance(cut, str) else whole,), (whole,)
    if "choices" in row:
        choices = row["choices"]
        first = choices[0] if isinstance(choices, list) and choices else None
        return _texts(first.get("turns") if isinstance(first, dict) else None, where), ()
    if "turns" in row:
        return _texts(row["turns"], where), ()
    return (_text(row.get("answer", row.get("text")), where),), ()


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: the turns should be a list of texts; correct or remove the line")
    return tuple(_text(part, where) for part in value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: an answer should be a text, not {str(value)[:40]!r}; correct or remove the line")
    return value


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """Questions of Vicuna's form {"question_id", "text"} or MT-bench's {"question_id", "turns"}, in their order.

    `references`: a file of answers that a judge may trust, to some of them. Raises DataError.
    """
    known: Mapping[str, Reply] = {}
    if references is not None:
        by_system = read_replies([found for _, found in collect(references)])
        if len(by_system) != 1:
            raise DataError(f"{references}: should hold the answers of one author, not of {len(by_system)}")
        (known,) = by_system.values()
    questions: dict[str, Question] = {}
    for _, found in collect(path):
        for line, row in found.rows:
            where = f"{found.where}:{line}"
            name = text_of(row, "question_id", where)
            turns = _texts(row["turns"], where) if "turns" in row else (text_of(row, "text", where),)
            if name in questions:
                raise DataError(f"{where}: question {name} is there twice")
            questions[name] = Question(name, turns, known[name].turns if name in known else ())
    if not questions:
        raise DataError(f"{path}: holds no question")
    return list(questions.values())
