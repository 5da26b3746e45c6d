"""Labels for texts that have none: the likeliest label of each, and its probability among all labels.

    p(label | text) = softmax over labels of  sum_t log p(label_t | prompt, label_<t)

Constrained scoring, as for `accuracy`: what prompts begin with is computed once a pack, and a text's labels share
its prompt. A text that is too long for the model loses its beginning, never its end nor the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tunesmith.data.encode import Encoder
from tunesmith.data.schemas import Row, find_schema, read_row, with_instruction
from tunesmith.data.segments import Template
from tunesmith.errors import ConfigError
from tunesmith.evaluate.classification import label_options
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.score import score_continuations
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Labelled:
    """The label of a text, its probability in [0, 1], and whether the text was cut."""

    label: str
    probability: float
    cut: bool


@dataclass(frozen=True)
class Labeller:
    """What labels texts: a model with the adapters that act, its template, the labels and the instruction before a
    text. `limit`: most tokens of prompt and label together. `budget`: tokens of a pack.

    Raises ConfigError for fewer than two labels.
    """

    model: Llama
    tokenizer: Tokenizer
    template: Template
    labels: tuple[str, ...]
    instruction: str
    adapters: tuple[str, ...] | None
    limit: int
    budget: int = 4096

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"labels: needs two or more different ones, found {list(self.labels)}")

    def label(self, texts: Sequence[str]) -> list[Labelled]:
        """The label of every text, in order. Raises GenerationError, TemplateError."""
        if not texts:
            return []
        prompts, cuts = zip(*map(self._prompt, texts), strict=True)
        scores = score_continuations(
            self.model, prompts, [self._options] * len(prompts), adapters=self.adapters, pack_tokens=self.budget
        )
        found = []
        for score, cut in zip(scores, cuts, strict=True):
            chances = score.softmax(-1)
            best = int(chances.argmax())
            found.append(Labelled(self.labels[best], float(chances[best]), cut))
        return found

    @cached_property
    def _options(self) -> list[list[int]]:
        rows = (self._row("-"),)
        subject = Subject(self.model, self.tokenizer, self.template, rows, (), self.labels, self.adapters)
        return label_options(subject)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _room(self) -> int:
        """Most tokens of a prompt, so that every label fits behind it."""
        return self.limit - max(map(len, self._options))

    def _row(self, text: str) -> Row:
        row = read_row({"text": text, "label": self.labels[0]}, "text", find_schema("classification"))
        return with_instruction([row], self.instruction)[0]

    def _prompt(self, text: str) -> tuple[list[int], bool]:
        """The tokens that ask for the label of `text`, and whether its beginning had to go."""
        ids = self._ids(text)
        return (ids, False) if len(ids) <= self._room else (self._ids(self._ending(text.rstrip())), True)

    def _ids(self, text: str) -> list[int]:
        return self._encoder.run(self.template.prompt(self._row(text)))[0]

    def _ending(self, text: str) -> str:
        """The longest end of `text` whose prompt fits. Raises ConfigError where not even its last character does."""
        fits, beyond = 0, 1
        while beyond < len(text) and len(self._ids(text[-beyond:])) <= self._room:
            fits, beyond = beyond, min(2 * beyond, len(text))
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if len(self._ids(text[-middle:])) <= self._room:
                fits = middle
            else:
                beyond = middle
        if not fits:
            raise ConfigError(
                f"--cutoff {self.limit}: leaves no room for a text beside instruction and label; raise it"
            )
        return text[-fits:]
