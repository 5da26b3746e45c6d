"""HellaSwag: how does an everyday scene go on?   (arXiv:1905.07830)

    {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings": [4], "label": 3, "split", "split_type", "source_id"}

The context is "ACTIVITY: CTX_A Ctx_b"; marks of WikiHow in brackets are taken out of it and of the endings.
"""

from __future__ import annotations

import re

from tunesmith.evaluate.choice import Question, question
from tunesmith.evaluate.sets.llm_adapters import is_instruction, parse
from tunesmith.evaluate.sets.rows import Raw, choice_task, number, text, texts

MARKS = re.compile(r"\[.*?\]")


def clean(scene: str) -> str:
    """A text without WikiHow's marks; a title ends a sentence."""
    return MARKS.sub("", scene.strip().replace(" [title]", ". ")).replace("  ", " ")


def row(raw: Raw, where: str) -> Question:
    """A question of a row of hellaswag_val.jsonl, of the hub, or of LLM-Adapters."""
    if is_instruction(raw):
        scene, endings, answer = parse(raw, where)
    else:
        endings = texts(raw, "endings", where)
        answer = number(raw.get("label"), len(endings), where, "label")
        activity, begun, going_on = (text(raw, key, where) for key in ("activity_label", "ctx_a", "ctx_b"))
        scene = f"{activity}: {begun} {going_on.capitalize()}"
    return question(where, clean(scene), [clean(ending) for ending in endings], answer)


HELLASWAG = choice_task("hellaswag", "how an everyday scene goes on, four endings", row)
