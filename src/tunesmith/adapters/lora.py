"""LoRA: low-rank adaptation (arXiv:2106.09685), with rsLoRA (2312.03732), LoRA+ (2402.12354) and PiSSA (2404.02948).

    y + s B A x,    s = alpha / rank   (rsLoRA: alpha / sqrt(rank)),    A: (rank, in), B: (out, rank)

A starts kaiming-uniform(sqrt 5), B at zero, so the model starts as it was. PiSSA starts at the principal singular
vectors of W instead; W stays and the start is subtracted, y + s (B A - B0 A0) x, which is a LoRA of rank 2r when
exported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.targets import Layers, by_pattern, check_patterns, select_linears
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.errors import AdapterError
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRASettings:
    """Settings under `adapter:` for `kind: lora`."""

    rank: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; none is twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training.")
    target_modules: str | Words = Field(
        default="all-linear", description="Module names, a regular expression, or all-linear (every one but lm_head)."
    )
    layers_to_transform: Layers | None = Field(default=None, description="Only these layers; none is all.")
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

    A0: Tensor | None
    B0: Tensor | None

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
    learning_rate = 5e-4
    peft_type = "LORA"

    def identity_at_init(self, settings: LoRASettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: LoRASettings) -> bool:
        """See `Method`."""
        return True

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

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. PiSSA's subtracted start becomes further ranks: twice the rank at the same scale."""
        settings: LoRASettings = adapter.settings
        tensors = {}
        for place, delta in adapter.deltas.items():
            if isinstance(delta, LoRADelta):
                path = place.removesuffix(".edit")
                tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = delta.factors()
        ranks = 2 if settings.init == "pissa" else 1
        alphas = math.sqrt(ranks) if settings.rslora else ranks
        alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
        paths = [place.removesuffix(".edit") for place in adapter.deltas]
        targets, layers = _peft_targets(settings, paths)
        return {
            "r": ranks * settings.rank,
            "lora_alpha": _number(alphas * alpha),
            "lora_dropout": settings.dropout,
            "target_modules": targets,
            "layers_to_transform": layers,
            "layers_pattern": None,
            "rank_pattern": {key: ranks * rank for key, rank in settings.rank_pattern.items()},
            "alpha_pattern": {key: _number(alphas * value) for key, value in settings.alpha_pattern.items()},
            "use_rslora": settings.rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "init_lora_weights": True,  # PiSSA's start is in the tensors: PEFT must not take it from the base again
        }, tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        peft.check_keys(config, _READ, _HARMLESS, where, **_NEUTRAL)
        linears = {path: module for path, module in model.named_modules() if isinstance(module, Linear)}
        targets = peft.names(config, "target_modules", where)
        if isinstance(targets, list):
            targets = _known_targets(targets, linears, where)
        layers = _layers(config, where)
        ranks, alphas = (peft.patterns(config, key, where) for key in ("rank_pattern", "alpha_pattern"))
        rank = peft.whole(config, "r", where)
        settings = {
            "rank": rank,
            "alpha": peft.number(config, "lora_alpha", where, 8, least=1e-30),
            "dropout": peft.number(config, "lora_dropout", where, 0),
            "target_modules": targets,
            "layers_to_transform": layers,
            "rank_pattern": {key: peft.whole(ranks, key, f"{where}: rank_pattern") for key in ranks},
            "alpha_pattern": {key: peft.number(alphas, key, f"{where}: alpha_pattern", 0) for key in alphas},
            "rslora": peft.flag(config, "use_rslora", where),
        }
        found = peft.plain_keys(tensors, where)
        for path, linear in linears.items():  # PEFT adds a copy of a head that it adapts
            _drop_copy(found, f"{path}.base_layer.weight", linear.weight)
        expected = {}
        for path, linear in select_linears(model, targets, layers, where):
            own = by_pattern(ranks, path, rank)
            expected[f"{path}.lora_A.weight"] = (own, linear.in_features)
            expected[f"{path}.lora_B.weight"] = (linear.out_features, own)
        peft.check_tensors(expected, found, where)
        parts = {name: name.removesuffix(".weight").rpartition(".lora_") for name in expected}
        return settings, {f"{path}.edit.{letter}": found[name][1] for name, (path, _, letter) in parts.items()}


def scale_of(settings: LoRASettings, path: str) -> float:
    """s of the module at `path`."""
    rank = by_pattern(settings.rank_pattern, path, settings.rank)
    base = 2 * settings.rank if settings.alpha is None else settings.alpha
    alpha = by_pattern(settings.alpha_pattern, path, base)
    return alpha / (math.sqrt(rank) if settings.rslora else rank)


# Keys of adapter_config.json: those that are read, those that only say how it was trained, and, of others, the values
# that change nothing beside null, false and empty.
_READ = frozenset(
    "r lora_alpha lora_dropout target_modules layers_to_transform rank_pattern alpha_pattern use_rslora".split()
)
_HARMLESS = frozenset("qalora_group_size eva_config loftq_config lora_ga_config corda_config".split())
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layers_pattern": ("layers", ["layers"]),
    # The other starts (pissa, olora, loftq, corda, ...) make PEFT change the base weights when it loads the file.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def _peft_targets(settings: LoRASettings, paths: list[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that select exactly `paths` in PEFT as well.

    A regular expression is spelled out: PEFT would try it on modules that are no Linear, and not take layers beside it.
    """
    if not isinstance(settings.target_modules, str):
        layers = settings.layers_to_transform
        return list(settings.target_modules), None if layers is None else list(layers)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    if settings.target_modules == "all-linear":
        return names, None if settings.layers_to_transform is None else list(settings.layers_to_transform)
    return sorted(paths), None


def _layers(config: Mapping[str, Any], where: str) -> list[int] | None:
    value = config.get("layers_to_transform")
    value = [value] if type(value) is int else value or None
    if value is not None and not (isinstance(value, list) and all(type(layer) is int for layer in value)):
        raise AdapterError(f"{where}: layers_to_transform={str(value)[:60]!r} should list layer numbers")
    return value


def _known_targets(targets: list[str], linears: Mapping[str, Linear], where: str) -> list[str]:
    """The targets that name a module of this model: files list names of other architectures too, and PEFT lets them."""
    ends = {end for path in linears for end in _ends(path)}
    known = [name for name in targets if name in ends]
    if len(known) < len(targets):
        strange = ", ".join(sorted(set(targets) - set(known)))
        if not known:
            raise AdapterError(f"{where}: target_modules: none of {strange[:120]} is a linear module of this model")
        logger.warning("%s: target_modules: %s: no such module in this model, passed over", where, strange[:120])
    return known


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _drop_copy(found: dict[str, tuple[str, Tensor]], name: str, weight: Tensor) -> None:
    """Forget a copy of a base weight, if that is what it is."""
    if name in found and torch.equal(found[name][1].to(weight), weight):
        del found[name]


def _number(value: float) -> float:
    """A whole number without its point, as PEFT writes alpha."""
    return int(value) if value == int(value) else value


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
    # Contiguous: as a file gives them back, and a product rounds by its operands' layout.
    A, B = (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()
    return A, B, (A.clone(), B.clone())


METHOD = LoRA()
