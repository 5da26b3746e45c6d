"""Ratings as they were published: which system is answer 1, told by the ids of the answers and never by a file's name.

Some of the released files are called A-vs-B and hold B's answers first. So a judgment is oriented by evidence:

    e(id, S) = 1 where S gave the answer `id` to this question (from the files of answers), else 0
    where no file of answers knows the id: S is the name that goes best with it over all files,
        argmax_S |files that name S and hold id| / |files that name S or hold id|

A file's two systems are those that its ids speak for most; in each of its lines the order with more evidence is taken,
in a line that speaks for neither (two equal answers) the order of most other lines. What stays open is left out.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import DataError
from tunesmith.evaluate.tournament.files import Found, text_of

_BASE57 = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_REVIEWER = re.compile(r"-gpt-?4-reviewer(-\w+)?$")  # at the end of a rating file's name
_GENERATIONS = re.compile(r"-vicuna-generations-.*$")  # of what a file of generated answers is called

Systems = frozenset[str]
Known = Mapping[tuple[str, str], Systems]


@dataclass(frozen=True)
class Oriented:
    """A published rating whose systems are known."""

    question: str
    first: str
    second: str
    score: Any
    where: str


def answer_id(text: str) -> str:
    """The id of an answer without one, as QLoRA's files have it: its UUID 5 in base 57 (the shortuuid library's)."""
    space = uuid.NAMESPACE_URL if text.lower().startswith(("http://", "https://")) else uuid.NAMESPACE_DNS
    number, digits = uuid.uuid5(space, text).int, ""
    while number:
        number, digit = divmod(number, 57)
        digits = _BASE57[digit] + digits
    return digits.rjust(22, _BASE57[0])


def short_name(stem: str) -> str:
    """What a file of answers calls its system: `answer_bard` is bard, `7b-x-vicuna-generations-...` 7b-x."""
    return re.sub(r"^answer[_-]", "", _GENERATIONS.sub("", stem))


def names_in(stem: str) -> tuple[str, ...]:
    """The two names in a rating file's name, in no order that means anything; () where there are not two."""
    parts = _REVIEWER.sub("", stem).split("-vs-")
    return tuple(short_name(part) for part in parts) if len(parts) == 2 and parts[0] != parts[1] else ()


def orient(files: Sequence[Found], known: Known, aliases: Systems = frozenset()) -> tuple[list[Oriented], list[str]]:
    """Every rating with its systems in the order in which the judge saw them, and the files that are left out.

    `known`: the systems that gave an answer, by question and id; `aliases`: the `plain` names of systems whose answers
    are known, so that an id of another answer cannot be theirs. A file is left out where its ids do not tell who gave
    its answers. Raises DataError where that is so of all files.
    """
    _no_review_twice(files)
    guess = _by_names(files, known, aliases)
    oriented: list[Oriented] = []
    left_out: list[str] = []
    for file in files:
        try:
            oriented += _orient_file(file, known, guess)
        except _Undecided:
            left_out.append(file.where)
    if files and not oriented:
        raise DataError(
            f"{left_out[0]}: its ids do not tell which system gave which answer, and its name is not believed; give "
            "the systems' answers too"
        )
    return oriented, left_out


class _Undecided(Exception):
    """A file's ids do not tell which system gave which answer."""


def plain(name: str) -> str:
    """A name's letters and digits alone: gpt-3.5 and answer_gpt35 are the same."""
    return re.sub(r"[^a-z0-9]", "", short_name(name).lower())


def _no_review_twice(files: Sequence[Found]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        for line, row in file.rows:
            where = f"{file.where}:{line}"
            review = row.get("review_id")
            if isinstance(review, str) and seen.setdefault(review, where) != where:
                raise DataError(f"{where}: is the same review as {seen[review]}; give each file once")


def _ids(row: dict[str, Any], where: str) -> tuple[tuple[str, str], tuple[str, str]]:
    question = text_of(row, "question_id", where)
    first, second = (text_of(row, key, where) for key in ("answer1_id", "answer2_id"))
    return (question, first), (question, second)


def _by_names(files: Sequence[Found], known: Known, aliases: Systems) -> dict[tuple[str, str], Systems]:
    """For ids that no file of answers knows: the names that go best with them, several where it is not decided."""
    holding: dict[tuple[str, str], set[int]] = defaultdict(set)
    naming: dict[str, set[int]] = defaultdict(set)
    for number, file in enumerate(files):
        for name in names_in(file.stem):
            if plain(name) not in aliases:
                naming[name].add(number)
        for line, row in file.rows:
            for key in _ids(row, f"{file.where}:{line}"):
                if not known.get(key):
                    holding[key].add(number)
    decided: dict[frozenset[int], Systems] = {}  # ids of one system are held by the same files: decided once
    for which in {frozenset(held) for held in holding.values()}:
        shares = {name: len(which & named) / len(which | named) for name, named in naming.items() if which & named}
        decided[which] = frozenset(name for name, share in shares.items() if share == max(shares.values()))
    return {key: decided[frozenset(held)] for key, held in holding.items()}


def _orient_file(file: Found, known: Known, guess: Mapping[tuple[str, str], Systems]) -> list[Oriented]:
    lines = [(f"{file.where}:{line}", row) for line, row in file.rows]
    speak = [[known.get(key) or guess.get(key, frozenset()) for key in _ids(row, where)] for where, row in lines]
    a, b = _pair(speak)
    leads = [_evidence(first, second, a, b) - _evidence(first, second, b, a) for first, second in speak]
    usual = sum((lead > 0) - (lead < 0) for lead in leads)
    oriented = []
    for (where, row), (first, second), lead in zip(lines, speak, leads, strict=True):
        if first and second and not (first | second) & {a, b}:
            raise DataError(f"{where}: holds answers of {_said(first)} and {_said(second)}, the file of {a} and {b}")
        decides = lead or usual
        if not decides:
            raise _Undecided
        order = (a, b) if decides > 0 else (b, a)
        oriented.append(Oriented(text_of(row, "question_id", where), *order, row["score"], where))
    return oriented


def _pair(speak: Sequence[Sequence[Systems]]) -> tuple[str, str]:
    """The two systems that most lines speak for, sorted by name; each must have half of the lines or more."""
    votes = Counter(name for first, second in speak for name in first | second)
    ranked = votes.most_common(3)
    if len(ranked) < 2 or 2 * ranked[1][1] < len(speak) or (len(ranked) > 2 and ranked[1][1] == ranked[2][1]):
        raise _Undecided
    a, b = sorted(name for name, _ in ranked[:2])
    return a, b


def _evidence(first: Systems, second: Systems, a: str, b: str) -> int:
    return (a in first) + (b in second)


def _said(names: Systems) -> str:
    return " or ".join(sorted(names))
