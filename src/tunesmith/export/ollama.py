"""An Ollama Modelfile beside a GGUF model: FROM, TEMPLATE in Go's syntax, the strings that end an answer.

`faults` holds a Modelfile against the rules that Ollama documents: instructions, parameters, quoting, and in TEMPLATE
balanced actions that use documented variables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunesmith.data.segments import Template
from tunesmith.export.turns import to_go, turns_of
from tunesmith.tokenizer import Tokenizer

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
PARAMETERS = {"stop": str, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repeat_penalty": float}
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_SAMPLING |= {"repetition_penalty": "repeat_penalty"}
_ACTION = re.compile(r"\{\{-?(.*?)-?\}\}", re.S)
_OPENS = ("if", "range", "with")
# An action's words: documented variables, one of our own, and functions of Go's templates.
_WORD = re.compile(
    r"\.System|\.Messages|\.Role|\.Content|\.Prompt|\.Response|\$asked|:=|=|true|false|eq|if|else|end|range|"
    r'"(?:user|assistant|\{\{)"'
)


def modelfile(
    template: Template | None, tokenizer: Tokenizer, sampling: dict[str, Any], model: str = "model.gguf"
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and notes. Without a template, Ollama goes by the one inside the GGUF file."""
    lines, notes = [f"FROM ./{model}"], []
    turns = None if template is None else turns_of(template)
    if turns is not None and not (text := to_go(turns, tokenizer)).count('"""'):
        lines.append(f'TEMPLATE """{text}"""')
    elif template is not None:
        notes.append(
            f"the template {template.name!r} has no form in Go's syntax: Ollama goes by the one in the GGUF file"
        )
    for stop in template.stop if template is not None else ():
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    for key, name in _SAMPLING.items():
        if key in sampling and sampling.get("do_sample", True):
            lines.append(f"PARAMETER {name} {sampling[key]}")
    return "\n".join(lines) + "\n", notes


def faults(text: str, folder: Path) -> list[str]:
    """What in a Modelfile is against Ollama's rules; empty where nothing is."""
    found, names = [], []
    for name, argument in _instructions(text):
        names.append(name)
        if name not in INSTRUCTIONS:
            found.append(f"{name[:40]} is no instruction")
        elif name == "FROM" and not (folder / argument).is_file():
            found.append(f"FROM {argument[:80]}: there is no such file")
        elif name == "PARAMETER":
            found += _parameter_faults(argument)
        elif name == "TEMPLATE":
            found += template_faults(argument)
    return found if names.count("FROM") == 1 else [*found, f"{names.count('FROM')} FROM lines, where one is needed"]


def template_faults(text: str) -> list[str]:
    """What in a TEMPLATE is no balanced Go template of documented variables."""
    found, depth = [], 0
    for action in _ACTION.findall(text):
        words = action.split()
        if unknown := [word for word in words if not _WORD.fullmatch(word)]:
            found.append(f"TEMPLATE: {unknown[0][:40]!r} is not known")
        if words[:1] and words[0] in _OPENS:
            depth += 1
        elif words[:1] == ["end"]:
            depth -= 1
        if depth < 0:
            found.append("TEMPLATE: an {{ end }} too many")
            depth = 0
    rest = _ACTION.sub("", text)
    if depth or "{{" in rest or "}}" in rest and "{{" in rest:
        found.append("TEMPLATE: an action is not closed")
    return found


def _instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) of every one, arguments in triple quotes taken whole."""
    found, rest = [], text
    while rest.strip():
        rest = rest.lstrip()
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        line, _, after = rest.partition("\n")
        if (at := line.find('"""')) >= 0:  # what is in triple quotes may go over several lines
            body, closed, after = rest[at + 3 :].partition('"""')
            line = f'{line[:at]}"{body}"' if closed else f"{line[:at]}{{{{"
        name, _, argument = line.partition(" ")
        whole = name.upper() == "TEMPLATE" and argument.startswith('"')
        found.append((name.upper(), argument[1:-1] if whole else argument.strip()))
        rest = after
    return found


def _parameter_faults(argument: str) -> list[str]:
    name, _, value = argument.partition(" ")
    kind = PARAMETERS.get(name)
    if kind is None:
        return [f"PARAMETER {name[:40]} is not known"]
    if kind is str:
        return [] if re.fullmatch(r'"[^"]*"', value) else [f"PARAMETER {name}: {value[:40]} is not quoted"]
    try:
        kind(value)
    except ValueError:
        return [f"PARAMETER {name}: {value[:40]!r} is no number"]
    return []


def _quoted(text: str) -> str:
    """Nothing is escaped in a Modelfile: three quotes hold new lines."""
    return f'"{text}"' if "\n" not in text else f'"""{text}"""'
