"""LoRA: low-rank adaptation (arXiv:2106.09685), with rsLoRA (2312.03732), LoRA+ (2402.12354) and PiSSA (2404.02948).

    y + s B A x,    s = alpha / rank   (rsLoRA: alpha / sqrt(rank)),    A: (rank, in), B: (out, rank)
    e + s B A[:, token]    on the token embedding e,    A: (rank, vocabulary), B: (hidden, rank)

A starts kaiming-uniform(sqrt 5), B at zero, so the model starts as it was; on the embedding, A starts at zero and B
normal. PiSSA starts at the principal singular vectors of W instead; W stays and the start is subtracted,
y + s (B A - B0 A0) x, which is a LoRA of rank 2r when exported. Norms, embedding and head may be trained whole beside
it, as LongLoRA does (2309.12307).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import lora_peft
from tunesmith.adapters.base import Adapter, Delta, Placement, weight_path
from tunesmith.adapters.norms import select_norms
from tunesmith.adapters.targets import EMBEDDING, Layers, by_pattern, check_patterns, select_targets
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.errors import AdapterError
from tunesmith.model.dropout import draw_seed, dropped_product
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.matmul import add_product, linear
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRASettings:
    """Settings under `adapter:` for `kind: lora`."""

    rank: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; none is twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training.")
    target_modules: str | Words = Field(
        default="all-linear",
        description="Names of linear modules or embed_tokens, a regular expression, or all-linear (all but lm_head).",
    )
    layers_to_transform: Layers | None = Field(default=None, description="Only these layers; none is all.")
    rank_pattern: Mapping[str, int] = Field(default_factory=dict, description="Other ranks, by pattern of module name.")
    alpha_pattern: Mapping[str, float] = Field(
        default_factory=dict, description="Other alphas, by pattern of module name."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank).")
    init: Literal["kaiming", "gaussian", "pissa"] = Field(default="kaiming", description="How A and B start.")
    lora_plus_ratio: float = Field(default=1.0, gt=0, description="B learns this many times faster than A (LoRA+).")
    train_norms: bool = Field(default=False, description="Train the weights of all norms too (LongLoRA).")
    train_embeddings: bool = Field(
        default=False, description="Train the token embedding whole (LongLoRA), and with it a head that is tied to it."
    )
    train_head: bool = Field(default=False, description="Train lm_head whole, and with it an embedding tied to it.")

    @model_validator(mode="after")
    def _ranks(self) -> LoRASettings:
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError("rank_pattern: a rank must be at least 1")
        return self


class LoRADelta(Delta):
    """y + s B A dropout(x) on one Linear; `start` subtracts PiSSA's initial B0 A0."""

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout = scale, dropout
        self.register_buffer("A0", None if start is None else start[0])
        self.register_buffer("B0", None if start is None else start[1])

    def exported(self) -> dict[str, Tensor]:
        """The tensors of the whole update, by the names of `lora_peft.NAMES`."""
        A, B = self.factors()
        return {"A": A, "B": B}

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (tokens, out) and the Linear's input `given` (tokens, in) -> (tokens, out)."""
        seed = draw_seed() if self.dropout and self.training else None
        inner = self._inner(given, self.A, seed)
        if self.A0 is None or self.B0 is None:
            return add_product(value, inner, self.B.to(inner.dtype), self.scale)
        start = linear(self._inner(given, self.A0, seed), self.B0.to(inner.dtype))
        # the same products twice: exactly 0 at the start
        change = linear(inner, self.B.to(inner.dtype)) - start
        return torch.add(value, change, alpha=self.scale)

    def _inner(self, x: Tensor, A: Tensor, seed: Tensor | None) -> Tensor:
        A = A.to(x.dtype)
        return linear(x, A) if seed is None else dropped_product(x, A, self.dropout, seed)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """See `Delta`; not of what is built upon LoRA and computes something else."""
        own = type(self).forward is LoRADelta.forward and self.A0 is None and not (self.dropout and self.training)
        return (self.A, self.B, self.scale) if own else None

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


class EmbeddingDelta(Delta):
    """e + s B A[:, token] on the token embedding."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def exported(self) -> dict[str, Tensor]:
        """See `LoRADelta.exported`."""
        return {"A": self.A, "B": self.B}

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (rows, hidden) and the rows' token ids `given` (rows,) -> (rows, hidden); ids below 0 are no tokens."""
        mine = given >= 0
        if self.adapter in ctx.routes:  # this seam is called on all rows, whosever they are
            mine = mine & torch.zeros_like(mine).index_fill(0, ctx.routes[self.adapter], True)
        inner = functional.embedding(given.clamp(min=0), self.A.T).to(value.dtype)
        change = functional.linear(inner, self.B.to(value.dtype))
        return torch.add(value, change.masked_fill(~mine[:, None], 0), alpha=self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s (B A)^T of W (vocabulary, hidden), in float32 (float64 stays)."""
        wide = torch.promote_types(weight.dtype, self.A.dtype)
        return weight.to(wide) + self.scale * (self.B.detach().to(wide) @ self.A.detach().to(wide)).T, bias


class LoRA:
    """The method of `kind: lora`."""

    kind = "lora"
    settings: type[LoRASettings] = LoRASettings
    learning_rate = 3e-4
    peft_type = "LORA"

    def identity_at_init(self, settings: LoRASettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: LoRASettings) -> bool:
        """See `Method`."""
        return True

    def trains_base(self, settings: LoRASettings) -> bool:
        """See `Method`: with norms, embedding or head."""
        return settings.train_norms or settings.train_embeddings or settings.train_head

    def place(self, model: Llama, settings: LoRASettings) -> Iterator[Placement]:
        """One delta on each target. Raises AdapterError where a pattern matches nothing, or a target trains whole."""
        targets = dict(select_targets(model, settings.target_modules, settings.layers_to_transform))
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns(getattr(settings, name), list(targets), f"adapter.{name}")
        self.check(model, settings, targets)
        for path, module in targets.items():
            rank, scale = by_pattern(settings.rank_pattern, path, settings.rank), scale_of(settings, path)
            if isinstance(module, Linear):
                yield Placement(path, "edit", self.delta(module, rank, scale, settings))
            else:
                yield Placement("model", "embed", EmbeddingDelta(*_embedding_start(module.weight, rank), scale))

    def delta(self, linear: Linear, rank: int, scale: float, settings: LoRASettings) -> LoRADelta:
        """The delta on one linear, as it starts."""
        A, B, start = start_of(linear, rank, scale, settings.init)
        return LoRADelta(A, B, scale, settings.dropout, start)

    def unfreeze(self, model: Llama, settings: LoRASettings) -> Iterator[str]:
        """The norms, the embedding, the head, as the settings say; a tied weight once, as the embedding."""
        if settings.train_norms:
            yield from (f"{path}.weight" for path in select_norms(model))
        tied = model.config.tie_word_embeddings
        if settings.train_embeddings or (tied and settings.train_head):
            yield f"{EMBEDDING}.weight"
        if settings.train_head and not tied:
            yield "lm_head.weight"

    def lr_scale(self, name: str, settings: LoRASettings) -> float:
        """LoRA+'s ratio for B."""
        return settings.lora_plus_ratio if name.endswith(".B") else 1.0

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See `Exchangeable`: DoRA's files are of this type too."""
        return not config.get("use_dora")

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. PiSSA's subtracted start becomes further ranks: twice the rank at the same scale."""
        tensors = lora_peft.whole_weights(adapter)
        for place, delta in adapter.deltas.items():
            if isinstance(delta, LoRADelta | EmbeddingDelta):
                tensors |= lora_peft.named(weight_path(place), delta.exported())
        return lora_peft.peft_config(adapter, 2 if adapter.settings.init == "pissa" else 1), tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        return lora_peft.from_peft(config, tensors, model, where)

    def check(self, model: Llama, settings: LoRASettings, targets: Mapping[str, nn.Module]) -> None:
        whole = {name.removesuffix(".weight") for name in self.unfreeze(model, settings)}
        if model.config.tie_word_embeddings and EMBEDDING in whole:
            whole.add("lm_head")
        if both := sorted(whole & targets.keys()):
            raise AdapterError(
                f"adapter.target_modules: {both[0]} is trained whole (train_embeddings, train_head): leave one out"
            )
        for path, module in targets.items() if settings.init == "pissa" else ():
            rank = by_pattern(settings.rank_pattern, path, settings.rank)
            most = min(module.in_features, module.out_features) if isinstance(module, Linear) else 0
            if rank > most:
                raise AdapterError(
                    f"adapter.init: pissa has no start of rank {rank} for {path} (linears only, at most {most}): "
                    "use another init, rank_pattern or target_modules"
                )


def scale_of(settings: LoRASettings, path: str) -> float:
    """s of the module at `path`."""
    rank = by_pattern(settings.rank_pattern, path, settings.rank)
    base = 2 * settings.rank if settings.alpha is None else settings.alpha
    alpha = by_pattern(settings.alpha_pattern, path, base)
    return alpha / (math.sqrt(rank) if settings.rslora else rank)


def start_of(linear: Linear, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """A, B and, for PiSSA, copies of them to subtract. On the meta device, shapes alone."""
    device, start = "meta" if linear.weight.is_meta else "cpu", None
    A = torch.empty(rank, linear.in_features, device=device)
    B = torch.zeros(linear.out_features, rank, device=device)
    if init == "pissa":
        if not linear.weight.is_meta:
            A, B = _principal(linear.dense_weight(), rank, scale)
        start = A.clone(), B.clone()
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, B, start


def _principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with s B A the best approximation of W of this rank."""
    left, singular, right = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    # Contiguous: as a file gives them back, and a product rounds by its operands' layout.
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def _embedding_start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    device = "meta" if weight.is_meta else "cpu"
    return torch.zeros(rank, len(weight), device=device), torch.randn(weight.shape[1], rank, device=device)


METHOD = LoRA()
