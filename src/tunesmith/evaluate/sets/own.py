"""Multiple-choice questions of your own, as data for training has them.

question, choices, answer, and context where there is one
"""

from __future__ import annotations

from tunesmith.data.schemas import find_schema, read_row
from tunesmith.evaluate.choice import Question, question
from tunesmith.evaluate.sets.rows import Raw, choice_task


def row(raw: Raw, where: str) -> Question:
    """A question; under a template it is put as in training, and answered with "The answer is (X)"."""
    read = read_row(raw, where, find_schema("multiple-choice"))
    context = raw.get("context") or ""
    asked = "\n".join(part for part in (context, f"Question: {read.fields['question']}", "Answer:") if part)
    letters = [chr(ord("A") + number) for number in range(len(read.choices))]
    return question(
        where,
        asked,
        read.choices,
        letters.index(read.label or ""),
        asked=read.turns[-2].text,
        replies=tuple(f"The answer is ({letter})" for letter in letters),
    )


CHOICE = choice_task("choice", "questions of your own with options", row)
