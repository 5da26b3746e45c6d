"""From the ecosystem's row shapes to one canonical `Row`; the schema is recognised by a row's keys, not its values.

| schema            | required keys                        | optional               |
|-------------------|--------------------------------------|------------------------|
| alpaca            | instruction, output                  | input, system, history |
| sharegpt          | conversations: [{from, value}]       | system                 |
| messages          | messages: [{role, content[, loss]}]  |                        |
| prompt-completion | prompt, completion                   | system                 |
| text              | text                                 |                        |
| classification    | text, label                          |                        |
| dolly             | instruction, context, response       | system                 |
| multiple-choice   | question, choices, answer            | context, system        |

Each may have an `image` as well: a path (from the file's folder), bytes, or a data URL. Other keys of a row (an id, a
category) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.image_field import image_of
from tunesmith.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.model.sight import Picture

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SENTIMENTS = frozenset({"negative", "positive", "neutral", "mixed"})


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: `role` is system, user or assistant; `supervised` says whether its tokens are training targets."""

    role: str
    text: str
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A data row in canonical form.

    `source` is "file:line", `kind` the schema's name, `turns` the conversation that every template can render, `label`
    the label of a classification row, `choices` the options of a multiple-choice row, `fields` the row's named texts
    (instruction, input, output, system, text, label, question, choices, prompt: those that the schema has), `image`
    its image: as the file has it, or opened (vision/open.py).
    """

    source: str
    kind: str
    turns: tuple[Turn, ...]
    label: str | None = None
    choices: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    image: Path | bytes | Picture | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """A known row shape: its name, the keys it must and may have, and the function that reads it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Row]

    def keys(self) -> str:
        """Return the keys as a user would type them, optional ones in brackets."""
        extra = "".join(f"[,{key}]" for key in self.optional)
        return "{" + ",".join(self.required) + extra + "}"


def read_row(raw: object, source: str, schema: Schema) -> Row:
    """Read one parsed row; raise DataError naming `source`, the field and the cure."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{source}: a row must be an object with keys, not {_type(raw)}; expected {schema.keys()}")
    missing = [key for key in schema.required if key not in raw]
    if missing:
        keys = ", ".join(map(str, list(raw)[:12])) or "none"
        hint = did_you_mean(missing[0], [str(k) for k in raw])
        raise DataError(
            f"{source}: field {missing[0]!r} is missing (keys here: {keys}){hint}; this file is read as "
            f"{schema.name} {schema.keys()}, and all rows of a file have one schema"
        )
    row, image = schema.read(raw, source), image_of(raw, source)
    return row if image is None else replace(row, image=image)


def find_schema(name: str) -> Schema:
    """Return the schema called `name`; raise DataError with the known names."""
    if name not in SCHEMAS:
        known = ", ".join(SCHEMAS)
        raise DataError(f"data.schema: unknown schema {name!r}{did_you_mean(name, SCHEMAS)} (known: auto, {known})")
    return SCHEMAS[name]


def recognise(raw: object, source: str) -> Schema:
    """Find the schema of a row by its keys; raise DataError when none or more than one fits.

    {"text"} fits only where nothing more specific does: Alpaca files often carry a ready-made "text" as well.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{source}: a row must be an object with keys, not {_type(raw)}")
    fits = [s for s in SCHEMAS.values() if all(key in raw for key in s.required)]
    specific = [s for s in fits if s.name != "text"]
    if len(specific) > 1 and {s.name for s in specific} & {"classification"}:
        # a ready-made "text" beside an unrelated "label" does not outweigh the keys of a whole other schema
        specific = [s for s in specific if s.name != "classification"]
    if len(specific or fits) == 1:
        return (specific or fits)[0]
    keys = [str(key) for key in list(raw)[:20]]
    seen = ", ".join(keys) or "none"
    if specific:
        names = " and ".join(s.name for s in specific)
        raise DataError(
            f"{source}: keys {seen} fit more than one schema ({names}); choose one with data.schema={specific[0].name}"
        )
    wanted = {key for s in SCHEMAS.values() for key in s.required}
    hints = [did_you_mean(key, wanted) for key in keys if key not in wanted]
    hint = next((h for h in hints if h), "")
    known = "; ".join(f"{s.name} {s.keys()}" for s in SCHEMAS.values())
    raise DataError(f"{source}: no known schema has the keys {seen}{hint}. Known: {known}")


def labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the sorted set of the labels that occur in `rows`."""
    return tuple(sorted({row.label for row in rows if row.label is not None}))


def default_instruction(names: Sequence[str], of: str = "the text") -> str:
    """Return the instruction used for classification rows when none is configured; it lists the labels."""
    if not names or len(names) > 20:
        return f"Classify {of}."
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    what = f"the sentiment of {of}" if {n.lower() for n in names} <= SENTIMENTS else of
    return f"Classify {what} as {listed}."


def with_instruction(rows: Sequence[Row], instruction: str) -> list[Row]:
    """Return `rows` with `instruction` put before the text of every classification row; other rows are unchanged."""
    return [_instructed(row, instruction) if row.kind == "classification" else row for row in rows]


def chat_row(messages: Sequence[Mapping[str, Any]], source: str = "messages") -> Row:
    """Make a Row of a conversation that waits for an answer: [{"role", "content"}], the last one from the user."""
    turns = tuple(_turn(m, "role", "content", f"{source}[{i}]") for i, m in enumerate(messages))
    _check_order(turns, source, open_end=True)
    return _conversation_row(turns, source, "messages")


def _instructed(row: Row, instruction: str) -> Row:
    fields = {**row.fields, "instruction": instruction}
    prompt = join_input(instruction, fields["input"])
    turns = (Turn("user", prompt), *row.turns[1:])
    return replace(row, turns=turns, fields={**fields, "prompt": prompt})


def join_input(instruction: str, context: str) -> str:
    """Join an instruction and its input, a blank line between them, for templates without a place for the input."""
    return f"{instruction}\n\n{context}" if instruction and context else instruction or context


def _type(value: object) -> str:
    names = {"str": "a string", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "a boolean"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def _text(raw: Mapping[str, Any], key: str, source: str, *, required: bool = True) -> str:
    """Return raw[key] as text. A missing or null optional field is ""; an empty required one is an error."""
    value = raw.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{source}: field {key!r} must be a string, not {_type(value)}; correct or remove the row")
    if required and not value.strip():
        raise DataError(f"{source}: field {key!r} is empty; give it a text or remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{source}: field {key!r} holds half of a surrogate pair, which is no text; correct the \\u escape or "
                "remove the row"
            ) from None
    return value


def _system(raw: Mapping[str, Any], source: str) -> tuple[str, tuple[Turn, ...]]:
    text = _text(raw, "system", source, required=False)
    return text, ((Turn("system", text),) if text.strip() else ())


def _single(source: str, kind: str, system: tuple[Turn, ...], history: tuple[Turn, ...], **named: str) -> Row:
    """Make a Row whose last exchange is an instruction with its input and one answer."""
    prompt = join_input(named["instruction"], named["input"])
    turns = (*system, *history, Turn("user", prompt), Turn("assistant", named["output"], True))
    if system:
        named["system"] = system[0].text
    return Row(source, kind, turns, fields={**named, "prompt": prompt})


def _alpaca(raw: Mapping[str, Any], source: str) -> Row:
    _, system = _system(raw, source)
    return _single(
        source,
        "alpaca",
        system,
        _history(raw.get("history"), source),
        instruction=_text(raw, "instruction", source),
        input=_text(raw, "input", source, required=False),
        output=_text(raw, "output", source),
    )


def _history(value: object, source: str) -> tuple[Turn, ...]:
    """Earlier exchanges [[user, assistant], ...]; their answers are supervised like any other answer."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{source}: field 'history' must be a list of [user, assistant] pairs, not {_type(value)}")
    turns: list[Turn] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{source}: history[{i}] must be a pair [user, assistant]; correct or remove the row")
        said = {f"history[{i}][{j}]": text for j, text in enumerate(pair)}
        user, answer = (_text(said, key, source) for key in said)
        turns += [Turn("user", user), Turn("assistant", answer, True)]
    return tuple(turns)


def _dolly(raw: Mapping[str, Any], source: str) -> Row:
    _, system = _system(raw, source)
    context = _text(raw, "context", source, required=False)
    instruction, response = _text(raw, "instruction", source), _text(raw, "response", source)
    return _single(source, "dolly", system, (), instruction=instruction, input=context, output=response)


def _prompt_completion(raw: Mapping[str, Any], source: str) -> Row:
    _, system = _system(raw, source)
    prompt, completion = _text(raw, "prompt", source), _text(raw, "completion", source)
    return _single(source, "prompt-completion", system, (), instruction=prompt, input="", output=completion)


def _raw_text(raw: Mapping[str, Any], source: str) -> Row:
    text = _text(raw, "text", source)
    return Row(source, "text", (Turn("assistant", text, True),), fields={"text": text, "output": text})


def _classification(raw: Mapping[str, Any], source: str) -> Row:
    text, label = _text(raw, "text", source), raw["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    label = _text({"label": label}, "label", source).strip()
    fields = {"text": text, "label": label, "input": text, "output": label, "instruction": "", "prompt": text}
    return Row(source, "classification", (Turn("user", text), Turn("assistant", label, True)), label, (), fields)


def _multiple_choice(raw: Mapping[str, Any], source: str) -> Row:
    choices = raw["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        what = f"{len(choices)} options" if isinstance(choices, list) else _type(choices)
        raise DataError(f"{source}: field 'choices' must be a list of 2 to 26 strings, not {what}; correct the row")
    named = {f"choices[{i}]": choice for i, choice in enumerate(choices)}
    options = tuple(_text(named, key, source) for key in named)
    letter = LETTERS[_answer_index(raw["answer"], options, source)]
    question = _text(raw, "question", source)
    listed = "\n".join(f"({LETTERS[i]}) {option}" for i, option in enumerate(options))
    context = _text(raw, "context", source, required=False)
    asked = "\n".join(part for part in (question, f"Context: {context}" if context else "", listed) if part)
    _, system = _system(raw, source)
    row = _single(
        source, "multiple-choice", system, (), instruction=asked, input="", output=f"The answer is ({letter})"
    )
    fields = {**row.fields, "question": question, "choices": listed, "label": letter}
    return replace(row, label=letter, choices=options, fields=fields)


def _answer_index(answer: object, options: tuple[str, ...], source: str) -> int:
    """The option meant by a 0-based number, an option's own text, or its letter; the text wins over the letter."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str):
        if options.count(answer) == 1:
            return options.index(answer)
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and letter in LETTERS[: len(options)]:
            return LETTERS.index(letter)
    shown = repr(answer)[:60]
    raise DataError(
        f"{source}: field 'answer' is {shown}; it must be one option's number from 0 to {len(options) - 1}, its letter "
        f"A to {LETTERS[len(options) - 1]}, or its text"
    )


def _turn(raw: object, role_key: str, text_key: str, where: str) -> Turn:
    if not isinstance(raw, Mapping):
        raise DataError(f'{where}: a message must be {{"{role_key}", "{text_key}"}}, not {_type(raw)}')
    for key in (role_key, text_key):
        if key not in raw:
            hint = did_you_mean(key, [str(k) for k in raw])
            raise DataError(f"{where}: field {key!r} is missing{hint}; a message has {role_key!r} and {text_key!r}")
    name = raw[role_key]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        hint = did_you_mean(str(name)[:40], ROLES)
        raise DataError(
            f"{where}: field {role_key!r} is {str(name)[:40]!r}{hint}; roles are system, user and assistant "
            "(human and gpt in ShareGPT)"
        )
    loss = raw.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{where}: field 'loss' must be true or false, not {_type(loss)}")
    if loss and role != "assistant":
        raise DataError(f"{where}: 'loss' is true on a {role} message; only assistant messages can be supervised")
    text = _text(raw, text_key, where, required=role != "system")
    return Turn(role, text, role == "assistant" and loss is not False)


def _check_order(turns: tuple[Turn, ...], source: str, *, open_end: bool = False) -> None:
    """A system message may come first; then user and assistant take turns, and the assistant has the last word."""
    body = turns[1:] if turns and turns[0].role == "system" else turns
    offset = len(turns) - len(body)
    for i, turn in enumerate(body):
        expected = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise DataError(
                f"{source}: message {i + offset} is from {turn.role!r} where {expected!r} was expected; after an "
                "optional system message, user and assistant take turns: join or remove messages"
            )
    if not body or (body[-1].role == "user") != open_end:
        end = "the user" if open_end else "the assistant"
        last = "is empty" if not body else f"ends with a message from {body[-1].role!r}"
        raise DataError(f"{source}: the conversation {last}; it must end with {end}: remove or complete the row")


def _conversation_row(turns: tuple[Turn, ...], source: str, kind: str) -> Row:
    fields = {"input": "", "system": turns[0].text if turns[0].role == "system" else ""}
    users = [turn.text for turn in turns if turn.role == "user"]
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    fields |= {"instruction": users[-1], "prompt": users[-1], "output": answers[-1] if answers else ""}
    return Row(source, kind, turns, fields=fields)


def _conversation(raw: Mapping[str, Any], source: str, kind: str, list_key: str, keys: tuple[str, str]) -> Row:
    said = raw[list_key]
    if not isinstance(said, list) or not said:
        what = "an empty list" if said == [] else _type(said)
        raise DataError(f"{source}: field {list_key!r} must be a list of messages, not {what}; correct the row")
    turns = tuple(_turn(m, *keys, f"{source}: {list_key}[{i}]") for i, m in enumerate(said))
    _, system = _system(raw, source)
    if system and turns[0].role == "system":
        raise DataError(f"{source}: a system message both in 'system' and in {list_key!r}; keep one")
    turns = system + turns
    _check_order(turns, source)
    return _conversation_row(turns, source, kind)


def _sharegpt(raw: Mapping[str, Any], source: str) -> Row:
    return _conversation(raw, source, "sharegpt", "conversations", ("from", "value"))


def _messages(raw: Mapping[str, Any], source: str) -> Row:
    return _conversation(raw, source, "messages", "messages", ("role", "content"))


SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
        Schema("sharegpt", ("conversations",), ("system",), _sharegpt),
        Schema("messages", ("messages",), ("system",), _messages),
        Schema("prompt-completion", ("prompt", "completion"), ("system",), _prompt_completion),
        Schema("text", ("text",), (), _raw_text),
        Schema("classification", ("text", "label"), (), _classification),
        Schema("dolly", ("instruction", "context", "response"), ("system",), _dolly),
        Schema("multiple-choice", ("question", "choices", "answer"), ("context", "system"), _multiple_choice),
    )
}
