"""Templates made of text with {placeholders}: the classic instruction formats, and a string of the user's own."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.schemas import Row
from tunesmith.data.segments import (
    PLACEHOLDERS,
    Answers,
    Exchange,
    Segment,
    Template,
    exchanges,
    last_only,
    raw_text,
    refuse_text,
    values,
)
from tunesmith.errors import TemplateError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.tokenizer import Tokenizer

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
MAX_SOURCE = 1 << 20  # characters

Piece = tuple[str, str | None]  # literal text, then the placeholder after it (None at the end)


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a text template; {placeholders} are filled from the row.

    `opening` and `opening_input` come once, before the first exchange without or with an input, and a row's own system
    text replaces them through `system`. `ask` and `ask_input` put the question, `answer` follows it and is supervised;
    EOS ends it. `between` parts the exchanges of a conversation.
    """

    ask: str
    ask_input: str
    opening: str = ""
    opening_input: str = ""
    system: str = "{system}\n\n"
    answer: str = "{output}"
    between: str = "\n\n"
    bos_each: bool = False
    strip: bool = False


def _titled(name: str) -> str:
    """Alpaca's form, with `name` as the title of the input (tloen/alpaca-lora, templates/alpaca_short.json)."""
    return f"### Instruction:\n{{instruction}}\n\n### {name}:\n{{input}}\n\n### Response:\n"


ASK = "### Instruction:\n{instruction}\n\n### Response:\n"
BUILT_IN: dict[str, Layout] = {
    # word for word tloen/alpaca-lora's templates/alpaca.json: stanford_alpaca's text and a newline after "###
    # Response:"
    "alpaca": Layout(
        ask=ASK,
        ask_input=_titled("Input"),
        opening=f"{TASK}. {REQUEST}\n\n",
        opening_input=f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n",
    ),
    "alpaca-short": Layout(ask=ASK, ask_input=_titled("Input")),
    "dolly": Layout(ask=ASK, ask_input=_titled("Context")),
    "plain": Layout(ask="{instruction}\n\n", ask_input="{instruction}\n\n{input}\n\n"),
    # Meta's llama/generation.py: texts stripped, BOS and EOS around each exchange, the system text inside the first
    "llama2-chat": Layout(
        ask="[INST] {instruction} [/INST]",
        ask_input="[INST] {instruction}\n\n{input} [/INST]",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        answer=" {output} ",
        between="",
        bos_each=True,
        strip=True,
    ),
}
STOPS = {"alpaca": ("\n### Instruction:",), "alpaca-short": ("\n### Instruction:",), "dolly": ("\n### Instruction:",)}


class PatternTemplate(Template):
    """A built-in text template."""

    def __init__(self, name: str, layout: Layout, tokenizer: Tokenizer) -> None:
        self.name = name
        self.layout = layout
        self.stop = STOPS.get(name, ())
        self._eos = eos_text(tokenizer, name)
        self._bos = _token_text(tokenizer, tokenizer.bos_id)
        self._pieces = {key: parse(text) for key, text in asdict(layout).items() if isinstance(text, str)}

    def segments(self, row: Row, *, answers: Answers = "all") -> tuple[Segment, ...]:
        """Render the whole row; raw text stays as it is, with EOS."""
        return raw_text(row, self._eos) if row.kind == "text" else self._render(row, answers)

    def prompt(self, row: Row) -> tuple[Segment, ...]:
        """Render everything before the last answer."""
        if row.kind == "text":
            refuse_text(row, self.name)
        return self._render(row, None)

    def source(self) -> dict[str, Any]:
        """Return {"kind": "pattern", "name", "layout"}."""
        return {"kind": "pattern", "name": self.name, "layout": asdict(self.layout)}

    def _render(self, row: Row, answers: Answers | None) -> tuple[Segment, ...]:
        """Render all exchanges; `answers=None` leaves out the last answer."""
        system, pairs = exchanges(row)
        flags = last_only([pair.supervised for pair in pairs], answers or "all")
        out: list[Segment] = []
        for i, pair in enumerate(pairs):
            out += self._question(row, system if i == 0 else "", pair, first=i == 0)
            if answers is None and i == len(pairs) - 1:
                break
            said = values(row, system, pair)
            out += _fill(self._pieces["answer"], self._texts(said), flags[i])
            out.append(Segment(self._eos, flags[i], True))
        return tuple(segment for segment in out if segment.text)

    def _question(self, row: Row, system: str, pair: Exchange, *, first: bool) -> list[Segment]:
        form = "_input" if pair.input.strip() else ""
        texts = self._texts(values(row, system, pair))
        ask = self._pieces["ask" + form]
        if self.name == "plain" and row.kind == "prompt-completion":
            ask = parse("{instruction}")  # the prompt is continued exactly where it ends
        if self.layout.bos_each:
            # the system text stands inside the first question
            lead, rest = ask[0], ask[1:]
            out = [Segment(self._bos, False, True), Segment(lead[0], False, True)]
            out += _fill(self._pieces["system"], texts, False) if system else []
            return out + _fill([("", lead[1]), *rest], texts, False)
        opening = "system" if system else "opening" + form
        return _fill(self._pieces[opening if first else "between"], texts, False) + _fill(ask, texts, False)

    def _texts(self, texts: Mapping[str, str]) -> Mapping[str, str]:
        return {key: text.strip() for key, text in texts.items()} if self.layout.strip else texts


class StringTemplate(Template):
    """A user's string: supervision starts at {output}, or at {label} where there is no {output}.

    A string with neither gets the answer appended. EOS ends the row unless the string itself ends with it.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, name: str | None = None) -> None:
        self.name = name or text
        self._text = text
        self._pieces = parse(text)
        self._eos = eos_text(tokenizer, "of this string")
        self._answer_at = _answer_place(self._pieces, text)
        if any(text.endswith(tokenizer.token(i)) for i in tokenizer.eos_ids):
            self._eos = ""

    def segments(self, row: Row, *, answers: Answers = "all") -> tuple[Segment, ...]:
        """Render the row; only single-exchange rows fit a string."""
        system, pair = self._exchange(row)
        texts = values(row, system, pair) if pair else row.fields
        supervised = pair.supervised if pair else True
        if row.kind == "text":
            out = _fill(self._pieces, self._known(row, texts), True)
        else:
            out = self._prompt(row, texts)
            if self._answer_at is None:
                out.append(Segment(texts["output"], supervised, False))
            else:
                out += _fill([("", self._pieces[self._answer_at][1])], self._known(row, texts), supervised)
                out += _fill(self._pieces[self._answer_at + 1 :], self._known(row, texts), supervised)
        out.append(Segment(self._eos, supervised, True))
        return tuple(segment for segment in out if segment.text)

    def prompt(self, row: Row) -> tuple[Segment, ...]:
        """Render what stands before {output}."""
        if row.kind == "text":
            refuse_text(row, self.name)
        system, pair = self._exchange(row)
        return tuple(s for s in self._prompt(row, values(row, system, pair) if pair else row.fields) if s.text)

    def source(self) -> dict[str, Any]:
        """Return {"kind": "string", "name", "text"}."""
        return {"kind": "string", "name": self.name, "text": self._text}

    def _prompt(self, row: Row, texts: Mapping[str, str]) -> list[Segment]:
        if self._answer_at is None:
            return _fill(self._pieces, self._known(row, texts), False)
        before, cut = self._pieces[: self._answer_at], self._pieces[self._answer_at][0]
        return _fill([*before, (cut, None)], self._known(row, texts), False)

    def _exchange(self, row: Row) -> tuple[str, Exchange | None]:
        if row.kind == "text":
            return "", None
        system, pairs = exchanges(row)
        if len(pairs) > 1:
            raise TemplateError(
                f"{row.source}: a conversation of {len(pairs)} exchanges does not fit a template string, which has one "
                "{output}; use data.template=chat, alpaca or llama2-chat"
            )
        return system, pairs[0]

    def _known(self, row: Row, texts: Mapping[str, str]) -> Mapping[str, str]:
        for _, key in self._pieces:
            if key is not None and key not in texts:
                has = ", ".join("{" + k + "}" for k in sorted(texts))
                raise TemplateError(f"{row.source}: a {row.kind} row has nothing for {{{key}}} (it has {has})")
        return texts


def parse(text: str) -> list[Piece]:
    """Split a template at its {placeholders}; raise TemplateError for an unknown one or an unbalanced brace."""
    if len(text) > MAX_SOURCE:
        raise TemplateError(f"template of {len(text)} characters: the limit is {MAX_SOURCE}")
    pieces: list[Piece] = []
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise TemplateError(f"template {shown}: {error}; write {{{{ and }}}} for literal braces") from None
    for literal, key, spec, conversion in parsed:
        if key is not None and key not in PLACEHOLDERS:
            known = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
            hint = did_you_mean(key, PLACEHOLDERS)
            raise TemplateError(f"template {shown}: unknown placeholder {{{key}}}{hint} (known: {known})")
        if spec or conversion:
            raise TemplateError(f"template {shown}: {{{key}}} takes no ':' or '!' part; write {{{key}}}")
        if pieces and pieces[-1][1] is None:  # an escaped brace splits a literal: join it again
            literal = pieces.pop()[0] + literal
        pieces.append((literal, key))
    return pieces


def eos_text(tokenizer: Tokenizer, name: str) -> str:
    """Return the EOS token's string; raise TemplateError for a tokenizer without EOS: the model would never stop."""
    text = _token_text(tokenizer, tokenizer.eos_id)
    if not text:
        raise TemplateError(
            f"template {name}: the tokenizer has no EOS token, so an answer could not end; set eos_token"
        )
    return text


def _token_text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token(token_id)


def _fill(pieces: list[Piece], texts: Mapping[str, str], supervised: bool) -> list[Segment]:
    out = []
    for literal, key in pieces:
        out.append(Segment(literal, supervised, True))
        if key is not None:
            out.append(Segment(texts[key], supervised, False))
    return [segment for segment in out if segment.text]


def _answer_place(pieces: list[Piece], text: str) -> int | None:
    """Index of the piece that ends with the answer's placeholder; the answer must not stand before it as well."""
    keys = [key for _, key in pieces]
    answer = "output" if "output" in keys else "label" if "label" in keys else None
    if answer is None:
        return None
    place = keys.index(answer)
    if "label" in keys[:place]:
        raise TemplateError(f"template {text[:60]!r}: {{label}} before {{output}} would show the model its answer")
    return place
