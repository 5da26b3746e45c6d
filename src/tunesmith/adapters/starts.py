"""Where virtual tokens start: at real tokens, drawn from the vocabulary or those of a text, or at random.

init_text -> token ids, once, when the adapter is attached -> cut to `virtual_tokens`, or said again until as many
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tunesmith.config import STRICT
from tunesmith.errors import AdapterError
from tunesmith.model.llama import Llama

Ids = Annotated[tuple[int, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StartSettings:
    """How many virtual tokens there are, and where they start."""

    virtual_tokens: int = Field(default=20, ge=1, description="Virtual tokens before every example.")
    init: Literal["vocabulary", "normal"] | None = Field(
        default=None, description="Start at tokens drawn from the vocabulary, or at random; none is vocabulary."
    )
    init_text: str | None = Field(
        default=None, description="Start at the tokens of this text, cut to the number of virtual tokens or repeated."
    )
    init_ids: Ids | None = Field(
        default=None, description="Start at these tokens; filled in from init_text where there is one."
    )

    @model_validator(mode="after")
    def _one_start(self) -> StartSettings:
        if self.init is not None and (self.init_text is not None or self.init_ids is not None):
            raise ValueError("init and init_text (or init_ids) both say where to start; keep one")
        if not self.virtual_tokens and (self.init_text is not None or self.init_ids is not None):
            raise ValueError("init_text (or init_ids) is where virtual tokens start, and there are none")
        return self


S = TypeVar("S", bound=StartSettings)


def with_ids(settings: S, encode: Callable[[str], Sequence[int]]) -> S:
    """See `Worded`."""
    if settings.init_text is None or settings.init_ids is not None:
        return settings
    ids = tuple(int(i) for i in encode(settings.init_text))
    if not ids:
        raise AdapterError(f"adapter.init_text: {settings.init_text!r} holds no token to start from; give it a text")
    return replace(settings, init_ids=repeated(ids, settings.virtual_tokens))


def repeated(ids: Sequence[int], count: int) -> tuple[int, ...]:
    """The first `count` of these ids, said again and again where they are fewer."""
    return (tuple(ids) * -(-count // len(ids)))[:count]


def start_ids(model: Llama, settings: StartSettings) -> Tensor:
    """The tokens that the virtual ones start at, (virtual_tokens,). Raises AdapterError for what is no such token."""
    count, vocab = settings.virtual_tokens, model.config.vocab_size
    given = settings.init_ids
    if given is None:
        if settings.init_text is not None:
            raise AdapterError("adapter.init_text: only a tokenizer makes ids of it; give init_ids instead")
        return torch.randint(vocab, (count,))
    if not given or min(given) < 0 or max(given) >= vocab:
        raise AdapterError(f"adapter.init_ids: {list(given)[:5]} should be tokens of a vocabulary of {vocab}")
    return torch.tensor(repeated(given, count))
