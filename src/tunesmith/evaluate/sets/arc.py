"""ARC, easy and challenge (arXiv:1803.05457), and OpenBookQA (arXiv:1809.02789): science questions for schools.

{"id", "question": {"stem", "choices": [{"text", "label": "A"}, ...]}, "answerKey": "A"}       as published
{"id", "question" or "question_stem", "choices": {"text": [...], "label": [...]}, "answerKey"}   on the hub
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.errors import DataError
from tunesmith.evaluate.choice import Question, question
from tunesmith.evaluate.sets.llm_adapters import is_instruction, parse
from tunesmith.evaluate.sets.rows import Raw, choice_task, text, texts


def parts(raw: Raw, where: str) -> tuple[str, tuple[str, ...], int]:
    """Stem, options, the right one's number. Raises DataError."""
    if is_instruction(raw):
        return parse(raw, where)
    asked = raw.get("question")
    if isinstance(asked, Mapping):
        stem, listed = text(asked, "stem", where), asked.get("choices")
        if not isinstance(listed, list) or not all(isinstance(option, Mapping) for option in listed):
            raise DataError(f"{where}: question.choices must be a list of objects with text and label; correct the row")
        choices: Raw = {key: [option.get(key) for option in listed] for key in ("text", "label")}
    else:
        stem = text(raw, "question" if "question" in raw else "question_stem", where)
        found = raw.get("choices")
        choices = found if isinstance(found, Mapping) else {}
    options, labels = texts(choices, "text", where), texts(choices, "label", where)
    key = text(raw, "answerKey", where).strip()
    if key not in labels or len(labels) != len(options):
        raise DataError(f"{where}: answerKey {key[:20]!r} is not among the labels {', '.join(labels)}; correct the row")
    return stem, options, labels.index(key)


def _row(frame: Callable[[str], str]) -> Callable[[Raw, str], Question]:
    def row(raw: Raw, where: str) -> Question:
        stem, options, answer = parts(raw, where)
        return question(where, frame(stem), options, answer)

    return row


asked = _row(lambda stem: f"Question: {stem}\nAnswer:")
continued = _row(str)

ARC_EASY = choice_task("arc_easy", "science questions for schools", asked, split="test", within="ARC-Easy")
ARC_CHALLENGE = choice_task(
    "arc_challenge", "those that word counting gets wrong", asked, split="test", within="ARC-Challenge"
)
OPENBOOKQA = choice_task("openbookqa", "elementary science, sentences to complete", continued, split="test")
