"""What free generation shows: exact answers, copied prompts, answers that do not end."""

from __future__ import annotations

from tunesmith.data.encode import encode_prompt
from tunesmith.errors import DataError
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.inference.generate import generate
from tunesmith.inference.sample import GenerationSettings

MARGIN = 16  # tokens an answer may run beyond the longest reference before it counts as never ending
RUN = 8  # tokens in a row that count as copied


def exact_match(subject: Subject) -> dict[str, float]:
    """Share of greedy answers equal to the row's, white space at the ends aside."""
    answers = greedy_answers(subject)
    right = sum(a.text.strip() == row.turns[-1].text.strip() for a, row in zip(answers, subject.rows, strict=True))
    return {"exact_match": right / len(answers)}


def prompt_copy_rate(subject: Subject) -> dict[str, float]:
    """Share of greedy answers at least half of which are runs of RUN tokens copied from their prompt."""
    answers = greedy_answers(subject)
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    copies = sum(copied_share(p, a.ids) >= 0.5 for p, a in zip(prompts, answers, strict=True))
    return {"prompt_copy_rate": copies / len(answers)}


def unfinished_rate(subject: Subject) -> dict[str, float]:
    """Share of greedy answers that had not ended where the longest reference would have."""
    answers = greedy_answers(subject)
    return {"unfinished_rate": sum(a.finish_reason == "length" for a in answers) / len(answers)}


def copied_share(prompt: list[int], answer: list[int] | tuple[int, ...]) -> float:
    """Share of `answer`'s tokens that lie in a run of RUN tokens which also stands in `prompt`."""
    runs = {tuple(prompt[i : i + RUN]) for i in range(len(prompt) - RUN + 1)}
    copied = [False] * len(answer)
    for i in range(len(answer) - RUN + 1):
        if tuple(answer[i : i + RUN]) in runs:
            copied[i : i + RUN] = [True] * RUN
    return sum(copied) / len(answer) if answer else 0.0


def greedy_answers(subject: Subject) -> list[Generation]:
    """The greedy answer to every row. Raises DataError without rows."""
    if not subject.rows:
        raise DataError("evaluation: there are no rows to answer; give data.valid or data.valid_size")
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    longest = max(int(e.supervised.sum()) for e in subject.examples)
    return generate(
        subject.model,
        prompts,
        GenerationSettings(max_new_tokens=longest + MARGIN, stop=subject.template.stop),
        eos_ids=subject.tokenizer.eos_ids,
        tokenizer=subject.tokenizer,
        adapters=subject.adapters,
    )
