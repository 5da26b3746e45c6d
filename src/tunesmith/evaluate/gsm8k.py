"""GSM8K: grade-school mathematics, answered freely (arXiv:2110.14168).

    strict     the number after the first "#### " is the reference's
    flexible   the last number of the answer is

Numbers are compared as text, without commas, $ and a full stop at the end, as lm-evaluation-harness does for its
strict-match and flexible-extract. A published row is {"question", "answer"}, whose answer ends with "#### NUMBER".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass as settings_class

from tunesmith.config import STRICT
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.diversity import distinct
from tunesmith.evaluate.figures import Figure, share
from tunesmith.evaluate.generations import answers_to
from tunesmith.evaluate.published import plain_prompt, text_of
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.tasks import Result, Task, read_items
from tunesmith.inference.sample import GenerationSettings

STRICT_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
STOP = ("Question:", "</s>", "<|im_end|>")  # of plain text, where a model goes on with a question of its own


@settings_class(frozen=True, kw_only=True, config=STRICT)
class GSM8KSettings:
    """How questions are put and answered."""

    shots: int = Field(default=0, ge=0, description="Solved examples before every question: the first of their file.")
    shots_from: str | None = Field(default=None, description="The file that the examples are in.")
    template: bool = Field(
        default=False, description="Ask in the adapter's or the model's template, not as plain text."
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer in tokens.")


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer; `number` is what stands after #### there."""

    source: str
    question: str
    answer: str
    number: str


def read(path: Path, settings: GSM8KSettings) -> list[Problem]:
    """The problems of a published file. Raises DataError with file and line."""
    return read_items(path, _problem)


def strict(text: str) -> str | None:
    """The number after the first "#### "; None where there is none."""
    found = STRICT_NUMBER.search(text)
    return None if found is None else plain(found[1])


def flexible(text: str) -> str | None:
    """The last number of the text; None where there is none."""
    found = ANY_NUMBER.findall(text)
    return plain(found[-1].strip()) if found else None


def plain(number: str) -> str:
    """A number without commas, $ and a full stop at its end."""
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))


def measure(subject: Subject, problems: Sequence[Problem], settings: GSM8KSettings) -> Result:
    """`strict`, `flexible`, `unparsed` (no number at all), `unfinished`, `distinct_2` of all answers together.

    Raises ConfigError, DataError.
    """
    prompts = encode(subject, problems, settings)
    stop = subject.template.stop if settings.template else STOP
    answers = answers_to(subject, prompts, GenerationSettings(max_new_tokens=settings.max_new_tokens, stop=stop))
    found = {"strict": [strict(a.text) for a in answers], "flexible": [flexible(a.text) for a in answers]}
    right = {
        name: [number == problem.number for number, problem in zip(numbers, problems, strict=True)]
        for name, numbers in found.items()
    }
    figures = {name: share(hits) for name, hits in right.items()}
    figures["unparsed"] = share([number is None for number in found["flexible"]], higher_is_better=False)
    figures["unfinished"] = share([a.finish_reason == "length" for a in answers], higher_is_better=False)
    figures["distinct_2"] = Figure(distinct([a.text for a in answers], 2), len(answers))
    stated = {name: getattr(settings, name) for name in ("shots", "template", "max_new_tokens")}
    samples = [
        {"source": p.source, "number": p.number, "strict": s, "flexible": f, "text": a.text}
        for p, s, f, a in zip(problems, found["strict"], found["flexible"], answers, strict=True)
    ]
    return Result(figures, stated, {name: [float(hit) for hit in hits] for name, hits in right.items()}, samples)


def encode(subject: Subject, problems: Sequence[Problem], settings: GSM8KSettings) -> list[list[int]]:
    """The token ids of every question behind its examples. Raises ConfigError, DataError."""
    examples = _examples(problems, settings)
    if not settings.template:
        begin = "".join(f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in examples)
        return [plain_prompt(subject.tokenizer, f"{begin}Question: {p.question}\nAnswer:") for p in problems]
    turns = [
        {"role": role, "content": text}
        for one in examples
        for role, text in (("user", one.question), ("assistant", one.answer))
    ]
    rows = [chat_row([*turns, {"role": "user", "content": p.question}], p.source) for p in problems]
    return [encode_prompt(row, subject.template, subject.tokenizer) for row in rows]


def _examples(problems: Iterable[Problem], settings: GSM8KSettings) -> list[Problem]:
    """The first examples of their file that are not measured themselves."""
    if not settings.shots:
        return []
    if settings.shots_from is None:
        raise ConfigError(f"shots={settings.shots}: say where the examples are with shots_from=FILE")
    measured = {problem.question for problem in problems}
    pool = [one for one in read(Path(settings.shots_from), settings) if one.question not in measured]
    if len(pool) < settings.shots:
        raise ConfigError(
            f"shots={settings.shots}: {settings.shots_from} has {len(pool)} examples that are not measured "
            "themselves; lower it, or name another file"
        )
    return pool[: settings.shots]


def _problem(raw: Any, where: str) -> Problem:
    question, answer = (text_of(raw, key, where) for key in ("question", "answer"))
    number = strict(answer)
    if number is None:
        raise DataError(f"{where}: the answer should end with '#### NUMBER'; correct or remove the row")
    return Problem(where, question, answer, number)


TASK = Task("gsm8k", "grade-school mathematics, answered freely", GSM8KSettings, read, measure)
