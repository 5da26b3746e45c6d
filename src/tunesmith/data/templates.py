"""Prompt templates by name, from a user's string or file, and from what was saved with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.chat import ChatTemplate
from tunesmith.data.patterns import BUILT_IN, MAX_SOURCE, Layout, PatternTemplate, StringTemplate
from tunesmith.data.segments import Segment, Template
from tunesmith.errors import TemplateError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.tokenizer import Tokenizer

__all__ = ["NAMES", "Segment", "Template", "from_dict", "get_template"]

NAMES = (*BUILT_IN, "chat")


def get_template(spec: str, tokenizer: Tokenizer) -> Template:
    """Return the template meant by `spec`: one of NAMES, a string with {placeholders}, a jinja text or .jinja file.

    Raises TemplateError for an unknown name or placeholder, an unreadable file, a model without a chat template.
    """
    name = spec.replace("_", "-")
    if name in BUILT_IN:
        return PatternTemplate(name, BUILT_IN[name], tokenizer)
    if spec == "chat":
        if not tokenizer.chat_template:
            others = ", ".join(BUILT_IN)
            raise TemplateError(f"data.template: this model's tokenizer has no chat template; choose one of {others}")
        return ChatTemplate(tokenizer.chat_template, tokenizer)
    if "{%" in spec or ("{{" in spec and "messages" in spec):
        return ChatTemplate(spec, tokenizer, "chat (given as text)")
    if "{" in spec:
        return StringTemplate(spec, tokenizer)
    if spec.endswith(".jinja"):
        return ChatTemplate(_read(Path(spec)), tokenizer, Path(spec).name)
    known = ", ".join(NAMES)
    raise TemplateError(
        f"data.template: unknown template {spec!r}{did_you_mean(name, NAMES)} (known: {known}, a string with "
        "{instruction} and {output}, or a .jinja file)"
    )


def from_dict(data: Mapping[str, Any], tokenizer: Tokenizer) -> Template:
    """Make a template again from `Template.to_dict()`; raise TemplateError unless it renders as it did when saved."""
    try:
        source = data["source"]
        kind, name = source["kind"], str(source["name"])
        if kind == "pattern":
            template: Template = PatternTemplate(name, Layout(**source["layout"]), tokenizer)
        elif kind == "string":
            template = StringTemplate(source["text"], tokenizer, name)
        elif kind == "chat":
            template = ChatTemplate(source["text"], tokenizer, name)
        else:
            raise TemplateError(f"saved template: unknown kind {kind!r}; it was written by another version")
        saved = {key: data[key] for key in ("name", "sha256", "golden")}
    except (KeyError, TypeError, AttributeError) as error:
        raise TemplateError(f"saved template is damaged ({type(error).__name__}: {error}); save it again") from None
    now = template.fingerprint()
    changed = [key for key in saved if saved[key] != now[key]]
    if changed:
        raise TemplateError(
            f"saved template {name!r} does not render as it did in training ({', '.join(changed)} changed): use the "
            "tokenizer that was saved with it, or train again"
        )
    return template


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_SOURCE:
            raise TemplateError(f"{path}: a template of {path.stat().st_size} bytes; the limit is {4 * MAX_SOURCE}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.jinja")] if path.parent.is_dir() else []
        raise TemplateError(f"{path}: no such file{did_you_mean(path.name, beside)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: cannot be read as UTF-8 text ({error})") from None
