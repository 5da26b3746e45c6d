"""The template that an adapter was trained with, and the one of a bare base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.adapters.peft_format import AdapterInfo
from tunesmith.data.segments import Template
from tunesmith.data.templates import from_dict, get_template
from tunesmith.errors import TokenizerError

if TYPE_CHECKING:
    from tunesmith.tokenizer import Tokenizer


def saved_template(info: AdapterInfo, tokenizer: Tokenizer, base: str) -> Template | None:
    """The template saved with an adapter, if there is one; `tokenizer` is that of its `base`.

    Raises TokenizerError where it is not the one that the adapter was trained with, TemplateError.
    """
    if info.tokenizer is not None and tokenizer.fingerprint() != dict(info.tokenizer):
        raise TokenizerError(
            f"{info.folder}: was trained with another tokenizer than {base} has now; use the base it was trained on"
        )
    return from_dict(info.template, tokenizer) if info.template else None


def base_template(tokenizer: Tokenizer) -> Template:
    """The bare base's own chat template; else plain text."""
    return get_template("chat" if tokenizer.chat_template else "plain", tokenizer)
