"""BoolQ: a question with yes or no, answered by a passage   (arXiv:1905.10044).

{"question", "title", "answer": true, "passage"}      as published
{"question", "passage", "idx", "label": 1}            in SuperGLUE
"""

from __future__ import annotations

from tunesmith.errors import DataError
from tunesmith.evaluate.choice import Question, question
from tunesmith.evaluate.sets.llm_adapters import is_instruction, parse
from tunesmith.evaluate.sets.rows import Raw, choice_task, text

OPTIONS = ("no", "yes")


def row(raw: Raw, where: str) -> Question:
    """A question of a row; LLM-Adapters' rows have no passage."""
    if is_instruction(raw):
        asked, names, right = parse(raw, where)
        return question(where, f"Question: {asked}\nAnswer:", OPTIONS, int(names[right] == "true"))
    answer = raw.get("answer", raw.get("label"))
    if answer not in (False, True):  # 0 and 1 too
        raise DataError(f"{where}: 'answer' (or 'label') must be true or false; take a file with answers")
    context = f"{text(raw, 'passage', where)}\nQuestion: {text(raw, 'question', where)}?\nAnswer:"
    return question(where, context, OPTIONS, int(answer))


BOOLQ = choice_task("boolq", "yes or no, by a passage", row)
