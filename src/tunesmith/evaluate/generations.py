"""What free generation shows: exact answers, copied prompts, answers that do not end, how many of them differ.

Every measure takes the rows and one greedy answer to each, which `evaluate.run` has generated once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.encode import encode_prompt
from tunesmith.errors import DataError
from tunesmith.evaluate.diversity import distinct
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.inference.generate import generate
from tunesmith.inference.sample import GenerationSettings

MARGIN = 16  # tokens an answer may run beyond the longest reference before it counts as never ending
RUN = 8  # tokens in a row that count as copied
LOOPS = 4  # times that the same tokens stand at an answer's end where it is caught in a loop


def exact_match(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """Share of greedy answers equal to the row's, white space at the ends aside."""
    right = sum(a.text.strip() == row.turns[-1].text.strip() for a, row in zip(answers, subject.rows, strict=True))
    return {"exact_match": right / len(answers)}


def prompt_copy_rate(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """Share of greedy answers at least half of which are runs of RUN tokens copied from their prompt."""
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    copies = sum(copied_share(p, a.ids) >= 0.5 for p, a in zip(prompts, answers, strict=True))
    return {"prompt_copy_rate": copies / len(answers)}


def never_stops(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """`unfinished_rate`: the share of greedy answers that had not ended where the longest reference would have.

    `looping_rate`: of all answers, the share that had not because the same tokens came again and again.
    """
    unfinished = [a for a in answers if a.finish_reason == "length"]
    return {
        "unfinished_rate": len(unfinished) / len(answers),
        "looping_rate": sum(map(loops, unfinished)) / len(answers),
    }


def distinct_rates(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """`distinct_1` and `distinct_2` of all greedy answers together, and `unique_rate`, the share of different ones."""
    texts = [a.text for a in answers]
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "unique_rate": len(set(texts)) / len(texts),
    }


def copied_share(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Share of `answer`'s tokens that lie in a run of RUN tokens which also stands in `prompt`."""
    runs = {tuple(prompt[i : i + RUN]) for i in range(len(prompt) - RUN + 1)}
    copied = [False] * len(answer)
    for i in range(len(answer) - RUN + 1):
        if tuple(answer[i : i + RUN]) in runs:
            copied[i : i + RUN] = [True] * RUN
    return sum(copied) / len(answer) if answer else 0.0


def loops(answer: Generation) -> bool:
    """Does the answer end in the same tokens, LOOPS times in a row?"""
    ids = answer.ids
    return any(ids[-LOOPS * period :] == ids[-period:] * LOOPS for period in range(1, len(ids) // LOOPS + 1))


def greedy_answers(subject: Subject) -> list[Generation]:
    """The greedy answer to every row. Raises DataError without rows."""
    if not subject.rows:
        raise DataError("evaluation: there are no rows to answer; give data.valid or data.valid_size")
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    longest = max(int(e.supervised.sum()) for e in subject.examples)
    settings = GenerationSettings(max_new_tokens=longest + MARGIN, stop=subject.template.stop)
    return answers_to(subject, prompts, settings)


def answers_to(subject: Subject, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[Generation]:
    """The subject's answers to prompts of token ids, `settings.n` to each."""
    return generate(
        subject.model,
        prompts,
        settings,
        eos_ids=subject.tokenizer.eos_ids,
        tokenizer=subject.tokenizer,
        adapters=subject.adapters,
    )
