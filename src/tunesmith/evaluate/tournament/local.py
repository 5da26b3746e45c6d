"""A model of ours as a judge, and as a contestant that answers the questions, turn after turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.segments import Template
from tunesmith.evaluate.tournament.answers import Question, Reply
from tunesmith.evaluate.tournament.prompts import Message
from tunesmith.inference.generate import stream
from tunesmith.inference.sample import GenerationSettings
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer

NOTHING = "(no answer)"  # in the history of a contestant that said nothing: no template takes an empty turn
AT_ONCE = 16  # conversations that are answered in one batch


@dataclass(frozen=True)
class LocalModel:
    """A loaded model with the adapters that act (None: all, (): the bare base) and the template it is asked with."""

    name: str
    model: Llama
    tokenizer: Tokenizer
    template: Template
    adapters: tuple[str, ...] | None = None
    settings: GenerationSettings = GenerationSettings(max_new_tokens=1024)

    def replies(self, conversations: Iterable[Sequence[Message]]) -> Iterator[tuple[int, str]]:
        """(number, answer) as they end, a batch at a time. Raises TemplateError, GenerationError."""
        waiting = enumerate(conversations)
        while batch := list(islice(waiting, AT_ONCE)):
            prompts = [
                encode_prompt(chat_row(list(messages), f"conversation {number + 1}"), self.template, self.tokenizer)
                for number, messages in batch
            ]
            settings = self.settings.changed(stop=(*self.settings.stop, *self.template.stop))
            pieces = stream(
                self.model,
                prompts,
                settings,
                eos_ids=self.tokenizer.eos_ids,
                tokenizer=self.tokenizer,
                adapters=self.adapters,
            )
            for piece in pieces:
                if piece.result is not None:
                    yield batch[piece.index][0], piece.result.text


def answer_questions(contestant: LocalModel, questions: Sequence[Question], turns: int = 1) -> dict[str, Reply]:
    """The contestant's answers by question, each turn with those before it as its history."""
    said: dict[str, list[str]] = {question.id: [] for question in questions}
    for turn in range(turns):
        asked = [question for question in questions if len(question.turns) > turn]
        conversations = (_history(question.turns, said[question.id], turn) for question in asked)
        for number, text in contestant.replies(conversations):
            said[asked[number].id].append(text)
    return _as_replies(contestant.name, said)


def _history(asked: Sequence[str], said: Sequence[str], turn: int) -> list[Message]:
    messages: list[Message] = []
    for question, answer in zip(asked[:turn], said, strict=True):
        answered = answer if answer.strip() else NOTHING
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": asked[turn]}]


def _as_replies(name: str, said: Mapping[str, Sequence[str]]) -> dict[str, Reply]:
    return {question: Reply(name, question, tuple(texts)) for question, texts in said.items()}
