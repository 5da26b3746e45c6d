"""What a template makes of a row: segments of text, each marked as target or not, trusted or not."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.data.schemas import Row, Turn, join_input
from tunesmith.errors import TemplateError

Answers = Literal["all", "last"]

# The fixed conversation whose rendering travels with an adapter, so that a changed template is noticed.
PROBE = Row(
    "probe",
    "messages",
    (Turn("user", "What is 2 + 2?"), Turn("assistant", "4", True)),
    fields={"instruction": "What is 2 + 2?", "input": "", "output": "4", "system": "", "prompt": "What is 2 + 2?"}
    | {"choices": "A. 4"},
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered row.

    `supervised`: its tokens are targets. `special`: it is the template's own text, in which special-token strings
    become their ids; other text (a user's) never can.
    """

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question with its input, and the answer to it (None where the answer is awaited)."""

    instruction: str
    input: str
    answer: str | None
    supervised: bool


class Template(ABC):
    """Renders rows. `name` is what the user called it; `stop` are strings that end an answer beside EOS."""

    name: str
    stop: tuple[str, ...] = ()

    @abstractmethod
    def segments(self, row: Row, *, answers: Answers = "all") -> tuple[Segment, ...]:
        """Render the whole row; `answers` says whether all supervised answers of a conversation count or only the last.

        Joined, the segments are the rendered text; the boundary between prompt and answer is a boundary of segments.
        Raises TemplateError where the row cannot be rendered faithfully.
        """

    @abstractmethod
    def prompt(self, row: Row) -> tuple[Segment, ...]:
        """Render everything before the last answer: what the model reads before it generates."""

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Return what this template is made of, as JSON: enough for `from_dict` to make it again."""

    def golden(self) -> list[list[object]]:
        """Render the fixed probe conversation: [[text, supervised, special], ...]."""
        return [[s.text, s.supervised, s.special] for s in self.segments(PROBE)]

    def fingerprint(self) -> dict[str, Any]:
        """Return {"name", "sha256" of the source, "golden"}: equal for templates that render alike."""
        canonical = json.dumps(self.source(), sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        return {"name": self.name, "sha256": digest, "golden": self.golden()}

    def to_dict(self) -> dict[str, Any]:
        """Return the template as JSON, with its fingerprint, to be saved with an adapter."""
        return {"source": self.source(), **self.fingerprint()}


def exchanges(row: Row) -> tuple[str, list[Exchange]]:
    """Return the system text and the exchanges of a row; an awaited answer is None."""
    turns = list(row.turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    result = []
    for user, answer in zip(turns[::2], [*turns[1::2], None][: len(turns[::2])], strict=True):
        said = (answer.text, answer.supervised) if answer else (None, False)
        result.append(Exchange(user.text, "", *said))
    if row.kind in {"alpaca", "dolly", "classification"} and result:
        last = result[-1]
        result[-1] = Exchange(row.fields["instruction"], row.fields["input"], last.answer, last.supervised)
        if not result[-1].instruction:  # a text to classify, without an instruction
            result[-1] = Exchange(row.fields["input"], "", last.answer, last.supervised)
    return system, result


def values(row: Row, system: str, exchange: Exchange) -> Mapping[str, str]:
    """Return what the placeholders of a template stand for in this row and exchange."""
    texts = {key: value for key, value in row.fields.items() if key in PLACEHOLDERS}
    texts |= {"instruction": exchange.instruction, "input": exchange.input, "system": system}
    texts["prompt"] = join_input(exchange.instruction, exchange.input)
    texts["output"] = exchange.answer or ""
    if row.kind == "messages":  # what somebody types stands for the text of a row, and the answer for its label
        return {"text": texts["prompt"], "question": texts["prompt"], "label": texts["output"], **texts}
    return texts


def raw_text(row: Row, eos: str) -> tuple[Segment, ...]:
    """Render a raw-text row: the text as it is, all of it a target, then EOS."""
    return (Segment(row.fields["text"], True, False), *((Segment(eos, True, True),) if eos else ()))


def last_only(supervised: list[bool], answers: Answers) -> list[bool]:
    """Keep all supervised answers, or only the conversation's last one."""
    if answers == "all":
        return supervised
    return [flag and i == len(supervised) - 1 for i, flag in enumerate(supervised)]


def refuse_text(row: Row, name: str) -> None:
    """Raise TemplateError: a raw-text row has no prompt."""
    raise TemplateError(f"{row.source}: raw text has no prompt to answer (template {name}); use generate with a prompt")


PLACEHOLDERS = (
    "instruction", "input", "output", "system", "text", "label", "question", "choices", "prompt",
)  # fmt: skip
