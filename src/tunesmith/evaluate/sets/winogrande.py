"""WinoGrande: who or what is meant?   (arXiv:1907.10641)

    {"qID", "sentence": "... because the _ was small.", "option1", "option2", "answer": "1"}

Each option fills the blank, and what is scored is the rest of the sentence after it, so lengths do not matter.
"""

from __future__ import annotations

from tunesmith.errors import DataError
from tunesmith.evaluate.choice import Question
from tunesmith.evaluate.sets.llm_adapters import is_instruction, parse
from tunesmith.evaluate.sets.rows import Raw, choice_task, number, text

BLANK = "_"


def row(raw: Raw, where: str) -> Question:
    """A question of a row of train_xl.jsonl or dev.jsonl, of the hub, or of LLM-Adapters."""
    if is_instruction(raw):
        sentence, options, answer = parse(raw, where)
    else:
        sentence = text(raw, "sentence", where)
        options = (text(raw, "option1", where), text(raw, "option2", where))
        answer = number(raw.get("answer"), 2, where, "answer", first=1)
    before, blank, after = sentence.partition(BLANK)
    if not blank or not after.strip():
        raise DataError(
            f"{where}: the sentence has no blank '{BLANK}' with something after it; correct or remove the row"
        )
    contexts = tuple(before + option for option in options)
    rest = f" {after.strip()}"
    return Question(where, contexts, (rest,) * len(options), (after.strip(),) * len(options), answer)


WINOGRANDE = choice_task("winogrande", "who is meant, two options in a blank", row)
