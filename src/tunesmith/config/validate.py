"""Turn a mapping into a strict settings class, and complaints into one line that names key, value and place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tunesmith.config.source import Origins
from tunesmith.errors import ConfigError, did_you_mean

T = TypeVar("T")


def validate_section(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return `cls(**values)`; `cls` is a pydantic model or dataclass, `where` its dotted name, such as `adapter`.

    A `kind` that `cls` does not declare is left out: it has done its work when the class was found by it. Raises
    ConfigError, one line: `adapter.rnk: unknown key (config.yaml line 7); did you mean 'rank'?`.
    """
    origins: Origins = getattr(values, "origins", {})
    names = field_names(cls)
    given = {key: value for key, value in values.items() if key != "kind" or "kind" in names}
    for key in given:
        if key not in names:
            hint = did_you_mean(key, names)
            raise ConfigError(f"{dotted(where, key)}: unknown key{place(origins.get((key,)))}{hint}")
    try:
        return cls(**given)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, origins)) from None


def field_names(cls: type) -> tuple[str, ...]:
    """Return the keys that `cls` accepts."""
    if issubclass(cls, BaseModel):
        return tuple(field.alias or name for name, field in cls.model_fields.items())
    return tuple(getattr(cls, "__dataclass_fields__", {}))


def dotted(where: str, *keys: str) -> str:
    """Return the dotted name of a key below `where`, which may be empty."""
    return ".".join(part for part in (where, *keys) if part)


def place(origin: str | None) -> str:
    """Return ` (config.yaml line 7)`, or nothing where no origin is known."""
    return f" ({origin})" if origin else ""


def shown(value: Any) -> str:
    """Return a value as a short piece of a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(error: ValidationError, where: str, origins: Origins) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    path = tuple(str(part) for part in first["loc"])
    while path and path[-1] in _BRANCHES:  # pydantic names the branch of a union; the user wrote no such key
        path = path[:-1]
    message = _message(first)
    more = {problem["loc"][0] for problem in problems if problem["loc"]} - set(first["loc"][:1])
    also = f"; also wrong: {', '.join(dotted(where, str(key)) for key in sorted(more, key=str))}" if more else ""
    return f"{dotted(where, *path) or 'configuration'}: {message}{place(_origin(path, message, origins))}{also}"


_BRANCHES = {"int", "float", "str", "bool", "constrained-int", "constrained-str", "constrained-float"}


def _message(problem: Any) -> str:
    value, context = problem["input"], problem.get("ctx", {})
    if problem["type"] == "value_error":
        return str(context["error"])
    if problem["type"] == "missing":
        return "missing"
    text = str(problem["msg"])
    text = text[0].lower() + text[1:]
    text = text.removeprefix("input should ")
    hint = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, re.findall(r"'([^']+)'", context["expected"]))
    elif problem["type"] == "bool_type" and str(value).lower() in {"yes", "on", "no", "off"}:
        hint = f"; write {'true' if str(value).lower() in {'yes', 'on'} else 'false'}"
    verb = "should " if str(problem["msg"]).startswith("Input should") else ""
    return f"{verb}{text}, not {shown(value)}{hint}"


def _origin(path: tuple[str, ...], message: str, origins: Origins) -> str | None:
    """Where the key at `path` was written; for a rule about several keys, where those it mentions were written."""
    if not path:
        words = set(re.findall(r"\w+", message))
        return "; ".join(origin for key, origin in origins.items() if len(key) == 1 and key[0] in words) or None
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return None
