"""Rows of the commonsense sets as LLM-Adapters published them (arXiv:2304.01933): an instruction with its options.

{"instruction": "Please choose the correct answer to the question: Q\\n\\nAnswer1: A Answer2: B ...\\n\\nAnswer format:
 answer1/answer2/...", "input": "", "output": "the correct answer is answer1", "answer": "answer1"}
"""

from __future__ import annotations

import re

from tunesmith.errors import DataError
from tunesmith.evaluate.sets.rows import Raw, text

FORMAT = "Answer format:"
REQUEST = re.compile(r"Please (?:choose|answer)[^:]*: ")


def is_instruction(raw: Raw) -> bool:
    """Is this row in that form?"""
    return "instruction" in raw and "answer" in raw


def parse(raw: Raw, where: str) -> tuple[str, tuple[str, ...], int]:
    """The question without its request, the options, the right one's number. Raises DataError."""
    instruction, answer = text(raw, "instruction", where), text(raw, "answer", where)
    body, form, listed = instruction.rpartition(FORMAT)
    names = [name.strip() for name in listed.split("/")]
    request = REQUEST.match(body)
    if not form or len(names) < 2 or answer not in names or request is None:
        raise DataError(f"{where}: is not an instruction of LLM-Adapters with an '{FORMAT} a/b' line; correct the row")
    asked = body[request.end() :].strip()
    if not names[0][-1].isdigit():
        return asked, tuple(names), names.index(answer)
    marks = [f"{name.capitalize()}:" for name in names]
    asked, _, rest = asked.rpartition(f"\n\n{marks[0]}")
    options = []
    for mark in marks[1:]:
        option, found, rest = rest.partition(f" {mark}")
        if not found:
            raise DataError(f"{where}: option '{mark}' is not where the row's own format says; correct the row")
        options.append(option.strip())
    return asked.strip(), (*options, rest.strip()), names.index(answer)
