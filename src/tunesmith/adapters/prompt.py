"""Prompt tuning: trained embeddings before every example, and nothing else   (arXiv:2104.08691).

    [ P_1 ... P_V | x_1 ... x_n ]                       P: (virtual_tokens, hidden)
    [ P_1 ... P_V | question | I_1 ... I_m | answer ]   I: (infix_tokens, hidden), before the answer

With infix tokens it is prefix-embedding tuning (the baseline of arXiv:2106.09685). Where they stand is our own choice:
before the answer that is learned or generated, not before earlier ones of a conversation. PEFT has none. Virtual tokens
have positions and cache slots of their own: an example's first token is at position V. Rows start at embeddings of
tokens drawn from the vocabulary, at those of a text (`init_text`), or, with `init: normal`, at N(0, s^2), s the root
mean square of the embedding's values.

Never the identity, since every virtual token takes a share of the attention, and never mergeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.starts import StartSettings, start_ids, with_ids
from tunesmith.config import STRICT
from tunesmith.errors import CannotExchange, CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

PLACE = "model.embed"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptSettings(StartSettings):
    """Settings under `adapter:` for `kind: prompt`."""

    virtual_tokens: int = Field(default=20, ge=0, description="Virtual tokens before every example.")
    infix_tokens: int = Field(default=0, ge=0, description="Virtual tokens before the answer.")

    @model_validator(mode="after")
    def _some(self) -> PromptSettings:
        if not self.virtual_tokens + self.infix_tokens:
            raise ValueError("virtual_tokens and infix_tokens are both 0, so there is nothing to train")
        return self


class PromptDelta(Delta):
    """Puts `prompt` (virtual_tokens, hidden) before examples and `infix` (infix_tokens, hidden) before answers."""

    prompt: nn.Parameter | None
    infix: nn.Parameter | None

    def __init__(self, prompt: Tensor, infix: Tensor) -> None:
        super().__init__()
        self.virtual_tokens, self.infix_tokens = len(prompt), len(infix)
        self.register_parameter("prompt", nn.Parameter(prompt) if len(prompt) else None)
        self.register_parameter("infix", nn.Parameter(infix) if len(infix) else None)

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """Embeddings (tokens, hidden) of the ids `given`, where infix token i is -1 - i."""
        own = ctx.virtual.get(self.adapter)
        if self.prompt is not None and own is not None:
            value = value.index_copy(0, own.flatten(), self.prompt.to(value.dtype).repeat(len(own), 1))
        if self.infix is not None:
            here = (given < 0) & (given >= -self.infix_tokens)
            if self.adapter in ctx.routes:
                here &= torch.zeros_like(here).index_fill(0, ctx.routes[self.adapter], True)
            rows = self.infix.to(value.dtype)[(-1 - given).clamp(0, self.infix_tokens - 1)]
            value = torch.where(here[:, None], rows, value)
        return value

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge("prompt tuning adds tokens, which no weight of the base can hold: keep it beside its base")


class Prompt:
    """The method of `kind: prompt`."""

    kind = "prompt"
    settings = PromptSettings
    learning_rate = 3e-2
    peft_type = "PROMPT_TUNING"

    def identity_at_init(self, settings: PromptSettings) -> bool:
        """No: virtual tokens are seen."""
        return False

    def mergeable(self, settings: PromptSettings) -> bool:
        """No: they are tokens, not weights."""
        return False

    def with_ids(self, settings: PromptSettings, encode: Callable[[str], Sequence[int]]) -> PromptSettings:
        """See `Worded`."""
        return with_ids(settings, encode)

    def place(self, model: Llama, settings: PromptSettings) -> Iterator[Placement]:
        """One delta, at the embedding. Raises AdapterError for a start that this model's vocabulary has not."""
        weight = model.model.embed_tokens.weight.detach()
        if settings.init == "normal":
            scale = 1.0 if weight.is_meta else root_mean_square(weight)
            counts = settings.virtual_tokens, settings.infix_tokens
            parts = [torch.randn(count, weight.shape[1]) * scale for count in counts]
        else:
            ids = start_ids(model, settings), torch.randint(len(weight), (settings.infix_tokens,))
            parts = [weight[each.to(weight.device)].float() for each in ids]
        yield Placement("model", "embed", PromptDelta(*parts))

    def unfreeze(self, model: Llama, settings: PromptSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: PromptSettings) -> float:
        """One rate for all."""
        return 1.0

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. Raises CannotExchange where there are infix tokens."""
        delta = adapter.deltas[PLACE]
        if not isinstance(delta, PromptDelta) or delta.prompt is None or delta.infix is not None:
            raise CannotExchange("PEFT's PROMPT_TUNING has no infix tokens; train with infix_tokens: 0 for PEFT")
        return {
            "num_virtual_tokens": delta.virtual_tokens,
            "token_dim": delta.prompt.shape[1],
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",  # it starts at the saved rows: PEFT must not ask for a tokenizer
            "modules_to_save": None,
        }, {peft.PROMPT: delta.prompt}

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        known = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")
        peft.check_keys(config, known, _STARTS, where, num_transformer_submodules=(1,))
        count = peft.whole(config, "num_virtual_tokens", where)
        found = peft.plain_keys(tensors, where)
        peft.check_tensors({peft.PROMPT: (count, model.config.hidden_size)}, found, where, "")
        return {"virtual_tokens": count}, {f"{PLACE}.prompt": found[peft.PROMPT][1]}


def root_mean_square(weight: Tensor) -> float:
    """Of all values."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return float(torch.linalg.vector_norm(weight, dtype=wide)) / math.sqrt(weight.numel())


# Keys of adapter_config.json that say only where the rows started.
_STARTS = frozenset("prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split())

METHOD = Prompt()
