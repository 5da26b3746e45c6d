"""LoRA: low-rank adaptation (arXiv:2106.09685), with rsLoRA (2312.03732), LoRA+ (2402.12354) and PiSSA (2404.02948).

    y + s B A x,    s = alpha / rank   (rsLoRA: alpha / sqrt(rank)),    A: (rank, in), B: (out, rank)

A starts kaiming-uniform(sqrt 5), B at zero, so the model starts as it was. PiSSA starts at the principal singular vectors of
W instead; W stays and the start is subtracted, y + s (B A - B0 A0) x, which is a LoRA of rank 2r when exported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.targets import by_pattern, check_patterns, select_linears
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRASettings:
    """Settings under `adapter:` for `kind: lora`."""

    rank: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; none is twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training.")
    target_modules: str | Words = Field(
        default="all-linear", description="Module names, a regular expression, or all-linear (every one but lm_head)."
    )
    layers_to_transform: tuple[int, ...] | None = Field(default=None, description="Only these layers; none is all.")
    rank_pattern: Mapping[str, int] = Field(default_factory=dict, description="Other ranks, by pattern of module name.")
    alpha_pattern: Mapping[str, float] = Field(
        default_factory=dict, description="Other alphas, by pattern of module name."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank).")
    init: Literal["kaiming", "gaussian", "pissa"] = Field(default="kaiming", description="How A and B start.")
    lora_plus_ratio: float = Field(default=1.0, gt=0, description="B learns this many times faster than A (LoRA+).")

    @model_validator(mode="after")
    def _ranks(self) -> LoRASettings:
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError("rank_pattern: a rank must be at least 1")
        return self


class LoRADelta(Delta):
    """y + s B A dropout(x) on one Linear; `start` subtracts PiSSA's initial B0 A0."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout = scale, dropout
        self.register_buffer("A0", None if start is None else start[0])
        self.register_buffer("B0", None if start is None else start[1])

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (tokens, out) and the Linear's input `given` (tokens, in) -> (tokens, out)."""
        x = functional.dropout(given, self.dropout, self.training) if self.dropout else given
        inner = functional.linear(x, self.A.to(x.dtype))
        if self.A0 is None or self.B0 is None:
            return torch.addmm(value, inner, self.B.to(x.dtype).T, alpha=self.scale)
        start = functional.linear(functional.linear(x, self.A0.to(x.dtype)), self.B0.to(x.dtype))
        change = functional.linear(inner, self.B.to(x.dtype)) - start  # the same products twice: exactly 0 at the start
        return torch.add(value, change, alpha=self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update, PiSSA's subtracted start included as further ranks."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, in float32 (float64 stays)."""
        A, B = self.factors()
        wide = torch.promote_types(weight.dtype, A.dtype)
        return weight.to(wide) + self.scale * (B.detach().to(wide) @ A.detach().to(wide)), bias


class LoRA:
    """The method of `kind: lora`."""

    kind = "lora"
    settings = LoRASettings
    learning_rate = 1e-3
    identity_at_init = True
    mergeable = True

    def place(self, model: Llama, settings: LoRASettings) -> Iterator[Placement]:
        """One delta on each target. Raises AdapterError where a pattern matches nothing."""
        targets = dict(select_linears(model, settings.target_modules, settings.layers_to_transform))
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns(getattr(settings, name), list(targets), f"adapter.{name}")
        for path, linear in targets.items():
            rank = by_pattern(settings.rank_pattern, path, settings.rank)
            A, B, start = _initial(linear.weight, rank, scale_of(settings, path), settings.init)
            yield Placement(path, "edit", LoRADelta(A, B, scale_of(settings, path), settings.dropout, start))

    def unfreeze(self, model: Llama, settings: LoRASettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: LoRASettings) -> float:
        """LoRA+'s ratio for B."""
        return settings.lora_plus_ratio if name.endswith(".B") else 1.0


def scale_of(settings: LoRASettings, path: str) -> float:
    """s of the module at `path`."""
    rank = by_pattern(settings.rank_pattern, path, settings.rank)
    base = 2 * settings.rank if settings.alpha is None else settings.alpha
    alpha = by_pattern(settings.alpha_pattern, path, base)
    return alpha / (math.sqrt(rank) if settings.rslora else rank)


def _initial(weight: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """A, B and, for PiSSA, copies of them to subtract."""
    out, inside = weight.shape
    if init != "pissa":
        A = torch.empty(rank, inside)
        if init == "gaussian":
            nn.init.normal_(A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, torch.zeros(out, rank), None
    left, singular, right = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    A, B = root[:, None] * right[:rank], left[:, :rank] * root
    return A, B, (A.clone(), B.clone())


METHOD = LoRA()
