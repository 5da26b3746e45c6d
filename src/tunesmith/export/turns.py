"""A prompt template as fixed text around messages, found by rendering it, and said again in Jinja and in Go's syntax.

    opening | before S after     then, for each exchange:  [between]  U  ask  lead A end     (S, U, A: messages' texts)

Other tools know Jinja chat templates (transformers, llama.cpp, vLLM) or Go's (Ollama). A template that was trained with
and is neither, such as Alpaca's, is rendered with stand-ins for the texts and cut at them; what was found must render
further conversations to the same text, or the template has no such form.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from tunesmith.data.chat import ChatTemplate
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import Turn, chat_row
from tunesmith.data.segments import Template
from tunesmith.errors import TemplateError
from tunesmith.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """The fixed texts. `between` is None where only one exchange fits, `system` where there is no place for one.

    A prompt ends with `ask`; `lead` is what an answer begins with by itself.
    """

    opening: str
    ask: str
    lead: str
    end: str
    between: str | None
    system: tuple[str, str] | None
    strips: bool = False

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The text of a conversation; `prompt`: up to where the next answer begins."""
        rest = list(messages)
        out = self.opening
        if rest and rest[0]["role"] == "system" and self.system is not None:
            out = self.system[0] + self._text(rest.pop(0)) + self.system[1]
        for i, message in enumerate(rest):
            if message["role"] == "user":
                out += (self.between or "" if i else "") + self._text(message) + self.ask
            else:
                out += self.lead + self._text(message) + self.end
        return out if prompt or not rest or rest[-1]["role"] != "user" else out.removesuffix(self.ask)

    def _text(self, message: Message) -> str:
        return message["content"].strip() if self.strips else message["content"]


def turns_of(template: Template) -> Turns | None:
    """The template's fixed texts; None where they depend on more than the order of the messages."""
    try:
        marks = _Marks()
        question = [marks.message("user")]
        opening, ask = _cut(_prompt(template, question), question)
        between, lead, end = _between(template, marks, opening, ask)
        found = Turns(opening, ask, lead, end, between, _system(template, marks, ask), _strips(template, opening, ask))
    except _NoForm:
        return None
    return found if _renders(found, template) else None


def to_jinja(turns: Turns, tokenizer: Tokenizer) -> str:
    """A Jinja chat template of the same text. BOS is written where the tokenizer would have put it by itself."""
    trim = " | trim" if turns.strips else ""
    begins = tokenizer.add_bos and tokenizer.bos_id is not None and not turns.opening.startswith(_bos(tokenizer))
    system, first = turns.system, _print(turns.opening)
    if system is not None:
        said = _print(system[0]) + "{{ messages[0]['content']" + trim + " }}" + _print(system[1])
        first = "{% if messages[0]['role'] == 'system' %}" + said + "{% else %}" + first + "{% endif %}"
    content = "{{ message['content']" + trim + " }}"
    between = "{% if asked.yes %}" + _print(turns.between) + "{% endif %}" if turns.between else ""
    return "".join(
        [
            "{{ bos_token }}" if begins else "",
            first,
            "{% set asked = namespace(yes=false) %}{% for message in messages %}",
            "{% if message['role'] == 'user' %}" + between + "{% set asked.yes = true %}" + content,
            "{% elif message['role'] == 'assistant' %}" + _print(turns.ask + turns.lead) + content + _print(turns.end),
            "{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}" + _print(turns.ask) + "{% endif %}",
        ]
    )


def to_go(turns: Turns, tokenizer: Tokenizer) -> str:
    """Ollama's TEMPLATE of the same text, without BOS, which its runner adds by itself where the model wants it."""
    bos = _bos(tokenizer) if tokenizer.add_bos else ""
    first = opening = _go(turns.opening.removeprefix(bos))
    if turns.system is not None:
        before, after = turns.system
        first = "{{ if .System }}" + _go(before.removeprefix(bos)) + "{{ .System }}" + _go(after)
        first += "{{ else }}" + opening + "{{ end }}" if opening else "{{ end }}"
    between = "{{ if $asked }}" + _go(turns.between) + "{{ end }}" if turns.between else ""
    return "".join(
        [
            first,
            "{{ $asked := false }}{{ range .Messages }}",
            '{{ if eq .Role "user" }}' + between + "{{ $asked = true }}{{ .Content }}" + _go(turns.ask),
            '{{ else if eq .Role "assistant" }}' + _go(turns.lead) + "{{ .Content }}" + _go(turns.end),
            "{{ end }}{{ end }}",
        ]
    )


def chat_template(template: Template | None, tokenizer: Tokenizer) -> tuple[str | None, list[str]]:
    """The Jinja text that prompts as `template` does, and notes; without one, the tokenizer's own.

    Raises TemplateError where the Jinja text would give other tokens.
    """
    if template is None:
        return tokenizer.chat_template, []
    source = template.source()
    if source["kind"] == "chat":
        return str(source["text"]), []
    turns = turns_of(template)
    if turns is None:
        return None, [f"the template {template.name!r} has no form as a chat template: other tools get none"]
    text = to_jinja(turns, tokenizer)
    again = ChatTemplate(text, tokenizer)
    for messages in _conversations(turns):
        row = chat_row(messages, "chat")
        if encode_prompt(row, again, tokenizer) != encode_prompt(row, template, tokenizer):
            raise TemplateError(f"template {template.name!r}: its chat template would give other tokens; not exported")
    note = f"the chat template is that of training ({template.name}), written in Jinja"
    return text, [note] if turns.between is not None else [f"{note}: one question and one answer"]


class _NoForm(Exception):
    """The template is no fixed text around messages."""


class _Marks:
    """Texts that no template holds."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def message(self, role: str) -> Message:
        return {"role": role, "content": f"\ue0f0{next(self._numbers)}\ue0f1"}


def _prompt(template: Template, messages: list[Message]) -> str:
    try:
        return "".join(segment.text for segment in template.prompt(chat_row(messages, "probe")))
    except TemplateError:
        raise _NoForm from None


def _cut(text: str, messages: list[Message]) -> list[str]:
    """The pieces of `text` around the messages, in their order."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            raise _NoForm
        pieces.append(before)
    return [*pieces, text]


def _between(template: Template, marks: _Marks, opening: str, ask: str) -> tuple[str | None, str, str]:
    """What stands between two exchanges, what an answer begins with, and what ends it."""
    said = [marks.message("user"), marks.message("assistant")]
    asked = chat_row(said[:1], "probe")
    answered = replace(asked, turns=(*asked.turns, Turn("assistant", said[1]["content"], True)))
    try:
        whole = "".join(s.text for s in template.segments(answered))
    except TemplateError:
        raise _NoForm from None
    _, before, end = _cut(whole, said)
    lead = before.removeprefix(ask)
    more = [*said, marks.message("user")]
    try:
        pieces = _cut(_prompt(template, more), more)
    except _NoForm:
        return None, lead, end
    if before != ask + lead or pieces[:2] != [opening, before] or pieces[3] != ask:
        raise _NoForm
    if not pieces[2].startswith(end):  # white space after the end of a turn is not rendered at the very end
        end = end.rstrip()
    if not pieces[2].startswith(end):
        raise _NoForm
    return pieces[2].removeprefix(end), lead, end


def _system(template: Template, marks: _Marks, ask: str) -> tuple[str, str] | None:
    messages = [marks.message("system"), marks.message("user")]
    try:
        before, after, last = _cut(_prompt(template, messages), messages)
    except _NoForm:
        return None
    return (before, after) if last == ask else None


def _strips(template: Template, opening: str, ask: str) -> bool:
    return _prompt(template, [{"role": "user", "content": "  x  "}]) == f"{opening}x{ask}"


def _conversations(turns: Turns) -> list[list[Message]]:
    """What the form is tried on: one exchange and several, with a system text and without."""
    user, answer = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}
    system = [{"role": "system", "content": "Be brief. "}] if turns.system is not None else []
    talks = [[user]] if turns.between is None else [[user], [user, answer, user], [user, answer, user, answer, user]]
    spaced = [{"role": "user", "content": " two  spaces\n"}]
    return [talks[0], spaced, *talks[1:], *([*system, *talk] for talk in talks if system)]


def _renders(turns: Turns, template: Template) -> bool:
    try:
        return all(_prompt(template, talk) == turns.render(talk, prompt=True) for talk in _conversations(turns))
    except _NoForm:
        return False


def _bos(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)


def _print(text: str) -> str:
    """Jinja that writes this text; nothing for none."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return "{{ '" + escaped + "' }}" if text else ""


def _go(text: str) -> str:
    """Literal text of a Go template."""
    return text.replace("{{", '{{ "{{" }}')
