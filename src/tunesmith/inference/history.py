"""What a conversation asks next: its turns through a template, as many as template and context have room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tunesmith.data.encode import Prompt, encode_prompt
from tunesmith.data.schemas import Row, chat_row
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tunesmith.data.segments import Template
    from tunesmith.model.sight import Picture
    from tunesmith.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """A system message, questions and answers so far, and the question that waits; `picture`: what it is about."""

    system: str | None
    history: Sequence[Message]
    text: str
    picture: Picture | None = None

    def row(self, history: Sequence[Message]) -> Row:
        """The question after this much of the history, as a row of data. Raises DataError."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = chat_row([*system, *history, {"role": "user", "content": self.text}], "chat")
        return row if self.picture is None else replace(row, image=self.picture)


def fitting(
    asked: Turns, template: Template, tokenizer: Tokenizer, limit: int | None, answer_tokens: int
) -> tuple[Prompt, list[str]]:
    """The question's tokens with as much history as there is room for, and lines that say what was left out.

    `limit`: tokens of the model's context; an answer keeps `answer_tokens` of them, but at most a quarter. The oldest
    exchanges go first. Raises DataError, TemplateError.
    """
    history, notices = list(asked.history), []
    if history and not _keeps_history(asked, template):
        history = []
        notices.append(f"the template {template.name!r} has one question and one answer: every turn stands by itself")
    while True:
        ids = encode_prompt(asked.row(history), template, tokenizer)
        room = 1 if limit is None else min(answer_tokens, limit // 4)
        if limit is None or len(ids) + room <= limit or not history:
            return ids, list(dict.fromkeys(notices))
        history = history[2:]
        notices.append(f"the conversation exceeds the model's context of {limit} tokens: its oldest turns are left out")


def _keeps_history(asked: Turns, template: Template) -> bool:
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        template.prompt(replace(asked, text="c").row(probe))
    except TemplateError:
        return False
    return True
