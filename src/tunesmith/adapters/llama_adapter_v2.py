"""LLaMA-Adapter v2: v1, with every norm trained and a scale and a bias on every linear   (arXiv:2304.15010).

    y <- s * (W x + b),    s = 1, b = 0 at the start;  every Linear, lm_head among them

v1's prompts go through k_proj and v_proj with their scale and bias. Where a base has biases b0 (Qwen2), s acts on them
too: y <- s * (W x + b0 + b). LLaMA-7B: 1,229,760 for v1, 65 norms of 4,096, 2 (32 42,496 + 32,000) for scales and
biases: 4,279,744 parameters.

Of the scripts that were published later, one computes W (s x) + b and its filter trains nothing of that, and one trains
norms and biases only; this is the paper's formula. A scale and a bias fold into their linear, W' = diag(s) W and
b' = s b, but v1's gates do not: the whole cannot be merged. PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.llama_adapter import METHOD as V1
from tunesmith.adapters.llama_adapter import LlamaAdapterSettings
from tunesmith.adapters.norms import select_norms
from tunesmith.config import STRICT
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaAdapterV2Settings(LlamaAdapterSettings):
    """Settings under `adapter:` for `kind: llama_adapter_v2`: those of v1."""


class ScaleAndBias(Delta):
    """s * (value + b0 + b) - b0 on one Linear, whose own bias b0, if it has one, is added after the seam."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor, host: Any, ctx: Context, given: Tensor) -> Tensor:
        """(tokens, out) -> (tokens, out)."""
        moved = value + self.bias.to(value.dtype)
        whole = moved if host.bias is None else moved + host.bias
        # Not moved * s: rounded to bfloat16, s = 1 + e loses a small e. And exactly value where s is 1 and b is 0.
        return torch.addcmul(moved, whole, (self.scale - 1).to(value.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(s) W and s (b0 + b)."""
        wide = torch.promote_types(weight.dtype, self.scale.dtype)
        scale, own = self.scale.detach().to(wide), self.bias.detach().to(wide)
        return scale[:, None] * weight.to(wide), scale * (own if bias is None else bias.to(wide) + own)


class LlamaAdapterV2:
    """The method of `kind: llama_adapter_v2`."""

    kind = "llama_adapter_v2"
    settings = LlamaAdapterV2Settings
    learning_rate = 1e-3
    trains_base = True

    def identity_at_init(self, settings: LlamaAdapterV2Settings) -> bool:
        """With gates at zero."""
        return V1.identity_at_init(settings)

    def mergeable(self, settings: LlamaAdapterV2Settings) -> bool:
        """No: v1's part is an attention of its own."""
        return False

    def place(self, model: Llama, settings: LlamaAdapterV2Settings) -> Iterator[Placement]:
        """v1's deltas, then one on every Linear. Raises AdapterError for more layers than there are."""
        yield from V1.place(model, settings)
        for path, module in model.named_modules():
            if isinstance(module, Linear):
                yield Placement(path, "edit", ScaleAndBias(module.out_features))

    def unfreeze(self, model: Llama, settings: LlamaAdapterV2Settings) -> Iterator[str]:
        """The weight of every norm."""
        return (f"{path}.weight" for path in select_norms(model))

    def lr_scale(self, name: str, settings: LlamaAdapterV2Settings) -> float:
        """One rate for all."""
        return 1.0


METHOD = LlamaAdapterV2()
