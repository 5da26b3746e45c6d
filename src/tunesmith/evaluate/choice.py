"""Multiple choice by log-likelihood: the option that the model finds likeliest after the question.

    acc         argmax_o  sum_t log p(o_t | question, o_<t)
    acc_norm    the same divided by the option's characters       (what lm-evaluation-harness calls acc_norm)
    acc_bytes   the same divided by the option's bytes in UTF-8   (its acc_bytes)

Tokens are cut as that library cuts them: question and option are encoded as one text, white space at the question's end
goes to the option, and the option's tokens are those after as many as the question has alone. What is too long for the
model loses tokens at its beginning. All options of a question, and all questions behind the same examples, lie in packs
that hold what they share once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings_class
from torch import Tensor

from tunesmith.config import STRICT
from tunesmith.data.encode import Prompt, encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.errors import ConfigError
from tunesmith.evaluate.calibration import BINS, calibration_error, confidence_of
from tunesmith.evaluate.figures import Figure, share
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.tasks import Result
from tunesmith.inference.prefill import context_limit
from tunesmith.inference.score import score_pairs
from tunesmith.model.sight import Picture
from tunesmith.tokenizer import Tokenizer
from tunesmith.vision.open import open_image

CHUNK = 256  # questions whose tokens are held at once

Pair = tuple[list[int], list[int]]


@settings_class(frozen=True, kw_only=True, config=STRICT)
class ChoiceSettings:
    """How questions are read and put."""

    shots: int = Field(default=0, ge=0, description="Solved examples before every question: the first of their file.")
    shots_from: str | None = Field(default=None, description="Where the examples are; none: the folder's own file.")
    split: str | None = Field(default=None, description="Which file of a folder; none is the one with answers.")
    template: bool = Field(
        default=False, description="Ask in the adapter's or the model's template, not as plain text."
    )


@dataclass(frozen=True)
class Question:
    """A question with its options; `answer` is the right one's number from 0.

    `contexts` stand before the `continuations`, one each; they differ only where an option fills a blank. `choices`:
    the options themselves, whose length counts. `group`: whose examples fit, such as a subject. `strata`: what it
    counts in. Under a template `asked` is the user's turn and `replies` the answers. `image`: for models that look.
    """

    source: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int
    group: str = ""
    strata: tuple[str, ...] = ()
    asked: str = ""
    replies: tuple[str, ...] = ()
    image: Path | bytes | Picture | None = None

    @property
    def solved(self) -> str:
        """The question with its right answer, as an example for others."""
        return self.contexts[self.answer] + self.continuations[self.answer]


def question(source: str, context: str, choices: Sequence[str], answer: int, **rest: Any) -> Question:
    """A question whose options follow one context after a space."""
    count = len(choices)
    rest = {"asked": context, "replies": tuple(choices), **rest}
    return Question(source, (context,) * count, tuple(f" {c}" for c in choices), tuple(choices), answer, **rest)


def with_examples(
    questions: Iterable[Question], pool: Sequence[Question], shots: int, describe: Callable[[str], str]
) -> list[Question]:
    """Put `describe(group)` and the group's first `shots` examples of `pool` before every question.

    A question that is measured is no example for others. Raises ConfigError where there are too few.
    """
    questions = list(questions)
    measured = {(q.contexts, q.continuations) for q in questions}
    examples: dict[str, list[str]] = {}
    for candidate in pool:
        if (candidate.contexts, candidate.continuations) not in measured:
            examples.setdefault(candidate.group, []).append(candidate.solved)
    for group in {q.group: None for q in questions}:
        if len(examples.get(group, [])) < shots:
            of = f" of {group}" if group else ""
            raise ConfigError(
                f"shots={shots}: there are {len(examples.get(group, []))} examples{of} that are not measured "
                "themselves; lower it, or name others with shots_from"
            )
    begin = {
        g: describe(g) + "".join(f"{one}\n\n" for one in examples.get(g, [])[:shots])
        for g in {q.group for q in questions}
    }
    return [
        replace(q, contexts=tuple(begin[q.group] + c for c in q.contexts), asked=q.asked and begin[q.group] + q.asked)
        for q in questions
    ]


def measure(subject: Subject, questions: Sequence[Question], settings: ChoiceSettings) -> Result:
    """`acc`, `acc_norm` and `acc_bytes` where options differ in length, `ece`, and `acc.STRATUM` of each stratum."""
    scores: list[Tensor] = []
    truncated = 0
    looks = subject.model.needs(subject.adapters).looks
    for first in range(0, len(questions), CHUNK):
        pairs, names = [], []
        for one in questions[first : first + CHUNK]:
            seen = open_image(one.image, one.source) if looks and isinstance(one.image, Path | bytes) else None
            for option, pair in enumerate(encode(subject, one, settings.template), 1):
                fitting = fit(pair, context_limit(subject.model.config))
                truncated += fitting is not pair
                pairs.append((Prompt(fitting[0], seen), fitting[1]) if seen is not None else fitting)
                names.append(f"{one.source}: option {option}")
        found = score_pairs(subject.model, pairs, adapters=subject.adapters, pack_tokens=subject.budget, names=names)
        logprobs = iter(score.logprob for score in found)
        for one in questions[first : first + CHUNK]:
            scores.append(torch.tensor([next(logprobs) for _ in one.choices], dtype=torch.float64))
    return _result(questions, scores, settings, truncated)


def encode(subject: Subject, one: Question, template: bool) -> list[Pair]:
    """What is read and what is predicted for every option. Raises ConfigError."""
    if not template:
        known: dict[str, list[int]] = {}
        return [
            encode_pair(subject.tokenizer, c, o, known) for c, o in zip(one.contexts, one.continuations, strict=True)
        ]
    if not one.asked:
        raise ConfigError(f"template=true: {one.source} fills a blank, which no template asks for; leave it out")
    row = chat_row([{"role": "user", "content": one.asked}], one.source)
    prompt = encode_prompt(row, subject.template, subject.tokenizer)
    return [(prompt, subject.tokenizer.encode(reply, continuation=True)) for reply in one.replies]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, known: dict[str, list[int]] | None = None
) -> Pair:
    """Ids of a context and of what follows it, cut as lm-evaluation-harness does; `known` keeps the contexts' ids."""
    known = {} if known is None else known
    text = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    if text and text not in known:
        known[text] = [*begin, *tokenizer.encode(text)]
    if not text:
        nothing = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return [nothing if nothing is not None else whole[0]], whole
    return known[text], whole[len(known[text]) - len(begin) :] or tokenizer.encode(continuation, continuation=True)


def fit(pair: Pair, limit: int | None) -> Pair:
    """The pair, or one without as many first tokens as the model has no room for."""
    over = len(pair[0]) + len(pair[1]) - 1 - limit if limit is not None else 0  # the last token is never fed
    return pair if over <= 0 else (pair[0][over:], pair[1])


def _result(
    questions: Sequence[Question], scores: Sequence[Tensor], settings: ChoiceSettings, truncated: int
) -> Result:
    lengths = {
        "acc": [[1] * len(q.choices) for q in questions],
        "acc_norm": [[max(len(c), 1) for c in q.choices] for q in questions],
        "acc_bytes": [[max(len(c.encode()), 1) for c in q.choices] for q in questions],
    }
    chosen = {
        name: [int((s / torch.tensor(size)).argmax()) for s, size in zip(scores, sizes, strict=True)]
        for name, sizes in lengths.items()
        if name == "acc" or any(len(set(size)) > 1 for size in sizes)
    }
    right = {name: [c == q.answer for c, q in zip(found, questions, strict=True)] for name, found in chosen.items()}
    figures = {name: share(hits) for name, hits in right.items()}
    figures["ece"] = calibration_error(confidence_of(scores), right["acc"])
    figures |= _by_stratum(questions, right["acc"])
    stated = {
        "shots": settings.shots,
        "template": settings.template,
        "chance": sum(1 / len(q.choices) for q in questions) / len(questions),
        "truncated": truncated,
        "ece_bins": BINS,
    }
    samples = [
        {"source": q.source, "answer": q.answer, "scores": s.tolist(), **{n: found[i] for n, found in chosen.items()}}
        for i, (q, s) in enumerate(zip(questions, scores, strict=True))
    ]
    note = f"{truncated} options were cut at their beginning to fit the model's context"
    each = {name: [float(hit) for hit in hits] for name, hits in right.items()}
    return Result(figures, stated, each, samples, [note] if truncated else [])


def _by_stratum(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, Figure]:
    members: dict[str, list[bool]] = {}
    for one, hit in zip(questions, right, strict=True):
        for stratum in one.strata:
            members.setdefault(stratum, []).append(hit)
    return {f"acc.{stratum}": share(members[stratum]) for stratum in sorted(members)}
