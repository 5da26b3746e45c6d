"""What readers of published sets share: a field that must be text, a plain text as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.errors import DataError, did_you_mean
from tunesmith.tokenizer import Tokenizer


def text_of(raw: Any, key: str, where: str) -> str:
    """The text under `key` of a row. Raises DataError, with the keys that are there."""
    keys = [str(name) for name in raw] if isinstance(raw, Mapping) else []
    value = raw.get(key) if isinstance(raw, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        found = f"keys here: {', '.join(keys[:8]) or 'none'}"
        raise DataError(
            f"{where}: has no text under {key!r} ({found}){did_you_mean(key, keys) if value is None else ''}"
        )
    return value


def plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that is no conversation, BOS before it where the model's own tokenizer puts one."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*bos, *tokenizer.encode(text)]
