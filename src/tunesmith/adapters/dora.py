"""DoRA: low-rank adaptation of the direction of each row of W, and a magnitude for it   (arXiv:2402.09353).

    W' = m (W + s B A) / ||W + s B A||,    the norm of each row; m starts as ||W||, so the model starts as it was

As an edit of the product: y <- m / ||W + s B A|| (y + s B A x). The norm is held constant in the gradient (section 4.3
of the paper; so does PEFT). Dropout acts on the input of A alone; PEFT's also on that of the product it rescales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import lora_peft
from tunesmith.adapters.base import Adapter
from tunesmith.adapters.lora import LoRA, LoRADelta, LoRASettings, start_of
from tunesmith.adapters.targets import EMBEDDING
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DoRASettings(LoRASettings):
    """Settings under `adapter:` for `kind: dora`: LoRA's, for linear modules."""

    init: Literal["kaiming", "gaussian"] = Field(default="kaiming", description="How A and B start.")


class DoRADelta(LoRADelta):
    """m / ||W + s B A|| (y + s B A dropout(x)) on one Linear."""

    detached = frozenset({"A", "B"})

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, weight: Tensor) -> None:
        super().__init__(A, B, scale, dropout, None)
        self.magnitude = nn.Parameter(self.norms(weight).to(A.device))

    def exported(self) -> dict[str, Tensor]:
        """See `LoRADelta.exported`."""
        return {**super().exported(), "magnitude": self.magnitude}

    def norms(self, weight: Tensor) -> Tensor:
        """||W + s B A|| of each row, (out,), in float32 (float64 stays), without a gradient."""
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, self.A.dtype)
            A, B = (factor.to(weight.device, wide) for factor in (self.A, self.B))
            norms = torch.linalg.vector_norm(torch.addmm(weight.to(wide), B, A, alpha=self.scale), dim=1)
            return norms.clamp_min(torch.finfo(wide).tiny)  # rows of zeros stay so: unused tokens of a head

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (tokens, out) and the Linear's input `given` (tokens, in) -> (tokens, out)."""
        y = super().forward(value, host, ctx, given)
        weight = host.dense_weight() if isinstance(host, Linear) else host.get_parameter("weight")
        ratio = self.magnitude / self.norms(weight)
        # Not y * ratio: rounded to bfloat16, 1 + e loses a small e. At the start the ratio is exactly 1.
        return torch.addcmul(y, y, (ratio - 1).to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m (W + s B A) / ||W + s B A||, in float32 (float64 stays)."""
        whole, bias = super().fold(weight, bias)
        ratio = self.magnitude.detach().to(whole.dtype) / self.norms(weight)
        return ratio[:, None] * whole, bias


class DoRA(LoRA):
    """The method of `kind: dora`."""

    kind = "dora"
    settings = DoRASettings
    learning_rate = 1e-3

    def delta(self, linear: Linear, rank: int, scale: float, settings: LoRASettings) -> LoRADelta:
        """The delta on one linear, as it starts."""
        A, B, _ = start_of(linear, rank, scale, settings.init)
        return DoRADelta(A, B, scale, settings.dropout, linear.dense_weight())

    def check(self, model: Llama, settings: LoRASettings, targets: Mapping[str, nn.Module]) -> None:
        """LoRA's, and nothing on the embedding."""
        super().check(model, settings, targets)
        if EMBEDDING in targets:
            raise AdapterError(
                "adapter.target_modules: dora has no form for embed_tokens; use lora, or train_embeddings"
            )

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See `Exchangeable`."""
        return bool(config.get("use_dora"))

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        config, tensors = super().to_peft(adapter)
        return config | {"use_dora": True}, tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        if not self.reads(config):
            raise AdapterError(f"{where}: use_dora={config.get('use_dora')}, but it is saved as a DoRA; copy it again")
        return lora_peft.from_peft(config, tensors, model, where, dora=True)


METHOD = DoRA()
