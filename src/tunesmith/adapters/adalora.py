"""AdaLoRA: low-rank updates in the form of an SVD, whose ranks go where they matter   (arXiv:2303.10512).

    y + s P diag(lambda) Q x,    P: (out, rank), Q: (rank, in),    s = alpha / (init_rank + 1e-5)

lambda starts at zero, P and Q at N(0, 0.02^2). The mean over all matrices of |P^T P - I| and |Q Q^T - I| (Frobenius),
times `orthogonality`, is added to the loss. After step t of T, of every trained value w:

    sensitivity <- beta1 sensitivity + (1 - beta1) I,    I = |w dL/dw|
    uncertainty <- beta2 uncertainty + (1 - beta2) |I - sensitivity|

A triplet (a lambda, its column of P, its row of Q) matters by sensitivity * uncertainty of its lambda, plus the means
of that over the column and over the row. The budget of triplets in the whole model falls from init_rank a module, with
(1 - (t - tinit) / (T - tfinal - tinit))^3, to target_rank; every deltaT steps the lambdas of the triplets that matter
least are set to zero. They may come back until step T - tfinal; from there the choice stays. So do the authors' code
and PEFT, which differ from the paper's formulas in the scale and in the norm not being squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.lora_peft import drop_copies, peft_targets, read_targets
from tunesmith.adapters.targets import Layers, select_linears
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.model.dropout import draw_seed, dropped_product
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.matmul import add_product, linear
from tunesmith.model.seam import Context

TRIPLET = ("P", "singular", "Q")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaLoRASettings:
    """Settings under `adapter:` for `kind: adalora`."""

    init_rank: int = Field(default=12, ge=1, description="Rank of every update at the start.")
    target_rank: int = Field(default=8, ge=1, description="Their mean rank at the end.")
    alpha: float | None = Field(default=None, gt=0, description="Scale numerator; none is twice init_rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training.")
    target_modules: str | Words = Field(
        default="all-linear", description="Module names, a regular expression, or all-linear (every one but lm_head)."
    )
    layers_to_transform: Layers | None = Field(default=None, description="Only these layers; none is all.")
    tinit: int | None = Field(default=None, ge=0, description="Steps before ranks fall; none is a tenth of the run.")
    tfinal: int | None = Field(
        default=None, ge=0, description="Steps at the end in which the choice of ranks stays; none is half of the run."
    )
    deltaT: int | None = Field(
        default=None, ge=1, description="Steps from one choice of ranks to the next; none is a hundredth of the run."
    )
    total_steps: int | None = Field(
        default=None, ge=1, description="Steps that this is planned for; none is the run's."
    )
    beta1: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of the sensitivity.")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of its uncertainty.")
    orthogonality: float = Field(default=0.5, ge=0, description="Weight of the penalty on P and Q.")

    @property
    def rank(self) -> int:
        """What the memory plan counts with."""
        return self.init_rank


@plain_dataclass(frozen=True)
class Schedule:
    """When ranks are chosen: from step `tinit` to step `total - tfinal`, every `every` steps."""

    total: int
    tinit: int
    tfinal: int
    every: int

    @property
    def end(self) -> int:
        """The step of the last choice."""
        return self.total - self.tfinal

    def chooses(self, step: int) -> bool:
        """Are ranks chosen after this step?"""
        return step == self.end or (self.tinit < step < self.end and step % self.every == 0)

    def budget(self, step: int, start: int, target: int) -> int:
        """How many of `start` triplets are left after a step between `tinit` and `end`."""
        left = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((start - target) * left**3 + target)


def schedule_of(settings: AdaLoRASettings, steps: int | None) -> Schedule | None:
    """The schedule in a run of `steps`, or None where nobody says how many. Raises ConfigError if it has no room."""
    total = settings.total_steps or steps
    if total is None:
        return None
    tinit = total // 10 if settings.tinit is None else settings.tinit
    tfinal = total // 2 if settings.tfinal is None else settings.tfinal
    if tinit >= total - tfinal:
        raise ConfigError(
            f"adapter.tinit, adapter.tfinal: {tinit} steps before ranks fall and {tfinal} after leave none of {total}: "
            "lower them, or leave them out"
        )
    return Schedule(total, tinit, tfinal, settings.deltaT or max(1, total // 100))


class AdaLoRADelta(Delta):
    """y + s P diag(lambda) Q dropout(x) on one Linear; `keep` is 1 for triplets that the last choice of ranks kept."""

    keep: Tensor
    steps: Tensor

    def __init__(self, P: Tensor, Q: Tensor, scale: float, dropout: float, orthogonality: float) -> None:
        super().__init__()
        self.P, self.Q = nn.Parameter(P), nn.Parameter(Q)
        self.singular = nn.Parameter(Q.new_zeros(len(Q)))  # lambda
        self.scale, self.dropout, self.orthogonality = scale, dropout, orthogonality
        for name in TRIPLET:
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(self.get_parameter(name)))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(self.get_parameter(name)))
        # Numbers with a point, as all that an adapter's file holds.
        self.register_buffer("keep", Q.new_ones(len(Q)))
        self.register_buffer("steps", Q.new_zeros(()))

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """value (tokens, out) and the Linear's input `given` (tokens, in) -> (tokens, out)."""
        Q = self.Q.to(given.dtype)
        drops = self.dropout and self.training
        inner = dropped_product(given, Q, self.dropout, draw_seed()) if drops else linear(given, Q)
        return add_product(value, inner * self.singular.to(Q.dtype), self.P.to(Q.dtype), self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s P diag(lambda) Q, in float32 (float64 stays)."""
        wide = torch.promote_types(weight.dtype, self.P.dtype)
        P, singular, Q = (self.get_parameter(name).detach().to(wide) for name in TRIPLET)
        return weight.to(wide) + self.scale * ((P * singular) @ Q), bias

    def penalty(self) -> Tensor | None:
        """This module's share of the mean over all P and Q of how far they are from orthonormal."""
        if not self.orthogonality:
            return None
        one = torch.eye(len(self.Q), dtype=self.Q.dtype, device=self.Q.device)
        return self.orthogonality * ((self.P.T @ self.P - one).norm() + (self.Q @ self.Q.T - one).norm())

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth sensitivity and uncertainty of every value over one more step."""
        for name in TRIPLET:
            parameter = self.get_parameter(name)
            if parameter.grad is not None:
                mean, spread = self.get_buffer(f"{name}_sensitivity"), self.get_buffer(f"{name}_uncertainty")
                now = (parameter * parameter.grad).abs()
                mean.mul_(beta1).add_((1 - beta1) * now)
                spread.mul_(beta2).add_((1 - beta2) * (now - mean).abs())

    def importance(self) -> Tensor:
        """How much each triplet matters, (rank,)."""
        scores = [self.get_buffer(f"{name}_sensitivity") * self.get_buffer(f"{name}_uncertainty") for name in TRIPLET]
        return scores[1] + scores[0].mean(0) + scores[2].mean(1)

    @torch.no_grad()
    def prune(self) -> None:
        """Set the lambdas that are not kept to zero."""
        self.singular.masked_fill_(self.keep == 0, 0.0)

    def held(self) -> list[bool]:
        """Which triplets do something, or may again: those that go into a file. On the meta device, all."""
        if self.keep.is_meta:
            return [True] * len(self.keep)
        return ((self.keep != 0) | (self.singular != 0)).tolist()


class AdaLoRA:
    """The method of `kind: adalora`."""

    kind = "adalora"
    settings = AdaLoRASettings
    learning_rate = 1e-2
    peft_type = "ADALORA"

    def identity_at_init(self, settings: AdaLoRASettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: AdaLoRASettings) -> bool:
        """See `Method`."""
        return True

    def place(self, model: Llama, settings: AdaLoRASettings) -> Iterator[Placement]:
        """One delta on each target. Raises ConfigError for a target rank above the first."""
        if settings.target_rank > settings.init_rank:
            raise ConfigError(f"adapter.target_rank: {settings.target_rank} is above init_rank, {settings.init_rank}")
        targets = dict(select_linears(model, settings.target_modules, settings.layers_to_transform))
        share = settings.orthogonality / (2 * len(targets))
        for path, host in targets.items():
            device = "meta" if host.weight.is_meta else "cpu"
            P = torch.empty(host.out_features, settings.init_rank, device=device).normal_(std=0.02)
            Q = torch.empty(settings.init_rank, host.in_features, device=device).normal_(std=0.02)
            yield Placement(path, "edit", AdaLoRADelta(P, Q, scale_of(settings), settings.dropout, share))

    def unfreeze(self, model: Llama, settings: AdaLoRASettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: AdaLoRASettings) -> float:
        """One rate for all."""
        return 1.0

    def begin(self, adapter: Adapter, steps: int) -> None:
        """See `Stepwise`."""
        schedule_of(adapter.settings, steps)

    def after_step(self, adapter: Adapter) -> None:
        """See `Stepwise`: smooth, choose and prune, as the schedule says; without one, ranks stay as they are."""
        settings, deltas = adapter.settings, _deltas(adapter)
        for delta in deltas.values():
            delta.steps += 1
        schedule, step = schedule_of(settings, adapter.steps), int(next(iter(deltas.values())).steps)
        if schedule is None:
            return
        if step < schedule.end:
            for delta in deltas.values():
                delta.observe(settings.beta1, settings.beta2)
        if schedule.chooses(step):
            start = settings.init_rank * len(deltas)
            _choose(list(deltas.values()), schedule.budget(step, start, settings.target_rank * len(deltas)))
        if schedule.chooses(step) or step > schedule.end:
            for delta in deltas.values():
                delta.prune()

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. Triplets that were dropped are left out, and rank_pattern says which."""
        deltas = _deltas(adapter)
        held = {path: delta.held() for path, delta in deltas.items()}
        tensors: dict[str, Tensor] = {}
        for path, delta in deltas.items():
            which = slice(None) if all(held[path]) else torch.tensor(held[path], device=delta.keep.device)
            tensors[f"{path}.lora_A"] = delta.Q[which]
            tensors[f"{path}.lora_B"] = delta.P[:, which]
            tensors[f"{path}.lora_E"] = delta.singular[which, None]
        pattern = {f"{path}.lora_E": mask for path, mask in held.items()}
        return _peft_config(adapter, None if all(map(all, held.values())) else pattern, list(deltas)), tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        peft.check_keys(config, _READ, _HARMLESS, where, **_NEUTRAL)
        targets, layers = read_targets(config, model, where)
        settings: dict[str, Any] = {name: peft.whole(config, key, where) for name, key in _WHOLE.items()}
        settings |= {name: int(peft.number(config, name, where, 0)) for name in ("tinit", "tfinal")}
        settings |= {name: peft.number(config, key, where, default) for name, (key, default) in _NUMBERS.items()}
        settings |= {"target_modules": targets, "layers_to_transform": layers}
        linears = dict(select_linears(model, targets, layers, where))
        masks = _masks(config, list(linears), settings["init_rank"], where)
        found = peft.plain_keys(tensors, where)
        drop_copies(found, model)
        expected: dict[str, tuple[int, ...]] = {}
        for path, host in linears.items():
            mask = masks[path]
            rank = settings["init_rank"] if mask is None else sum(mask)
            expected[f"{path}.lora_A"] = (rank, host.in_features)
            expected[f"{path}.lora_B"] = (host.out_features, rank)
            expected[f"{path}.lora_E"] = (rank, 1)
        peft.check_tensors(expected, found, where)
        state: dict[str, Tensor] = {}
        for path, host in linears.items():
            own = [found[f"{path}.{name}"][1] for name in ("lora_A", "lora_B", "lora_E")]
            delta = _filled(host, masks[path] or [True] * settings["init_rank"], own)
            state |= {f"{path}.edit.{name}": value for name, value in delta.state_dict().items()}
        return settings, state


def scale_of(settings: AdaLoRASettings) -> float:
    """s of every module."""
    alpha = 2 * settings.init_rank if settings.alpha is None else settings.alpha
    return alpha / (settings.init_rank + 1e-5)


def _deltas(adapter: Adapter) -> dict[str, AdaLoRADelta]:
    """The deltas by the path of their Linear."""
    return {place.removesuffix(".edit"): d for place, d in adapter.deltas.items() if isinstance(d, AdaLoRADelta)}


def _choose(deltas: Sequence[AdaLoRADelta], budget: int) -> None:
    """Keep the `budget` triplets that matter most, wherever they are; of equals at the border, none."""
    scores = [delta.importance() for delta in deltas]
    whole = torch.cat(scores)
    dropped = len(whole) - budget
    border = whole.kthvalue(dropped).values if dropped else whole.new_tensor(-1.0)
    for delta, score in zip(deltas, scores, strict=True):
        delta.keep.copy_(score > border)


# adapter_config.json: our settings by PEFT's keys; keys that change nothing; values that do not.
_WHOLE = {"init_rank": "init_r", "target_rank": "target_r", "deltaT": "deltaT", "total_steps": "total_step"}
_NUMBERS = {
    "alpha": ("lora_alpha", 8.0),
    "dropout": ("lora_dropout", 0.0),
    "beta1": ("beta1", 0.85),
    "beta2": ("beta2", 0.85),
    "orthogonality": ("orth_reg_weight", 0.5),
}
_READ = frozenset("tinit tfinal target_modules layers_to_transform rank_pattern".split()) | {
    *_WHOLE.values(),
    *(key for key, _ in _NUMBERS.values()),
}
_HARMLESS = frozenset("r qalora_group_size eva_config loftq_config lora_ga_config corda_config".split())
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layers_pattern": ("layers", ["layers"]),
    "init_lora_weights": (True, "gaussian"),
}


def _peft_config(adapter: Adapter, pattern: dict[str, list[bool]] | None, paths: list[str]) -> dict[str, Any]:
    settings: AdaLoRASettings = adapter.settings
    targets, layers = peft_targets(settings, paths)
    plan = schedule_of(settings, adapter.steps)
    if plan is None:  # never trained; PEFT wants a plan with room all the same
        tinit, tfinal = settings.tinit or 0, settings.tfinal or 0
        plan = Schedule(tinit + tfinal + 1, tinit, tfinal, settings.deltaT or 1)
    alpha = 2 * settings.init_rank if settings.alpha is None else settings.alpha
    return {
        "init_r": settings.init_rank,
        "target_r": settings.target_rank,
        "tinit": plan.tinit,
        "tfinal": plan.tfinal,
        "deltaT": plan.every,
        "total_step": plan.total,
        "beta1": settings.beta1,
        "beta2": settings.beta2,
        "orth_reg_weight": settings.orthogonality,
        "rank_pattern": pattern,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _masks(config: Mapping[str, Any], paths: list[str], rank: int, where: str) -> dict[str, list[bool] | None]:
    """Which of each module's triplets the file holds, by rank_pattern (None: all). Raises AdapterError."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{where}: rank_pattern={str(pattern)[:60]!r} should map modules to lists")
    masks = {path: pattern.get(f"{path}.lora_E") for path in paths}
    for path, mask in masks.items():
        listed = isinstance(mask, list) and len(mask) == rank and all(isinstance(one, bool) for one in mask)
        if mask is not None and not listed:
            raise AdapterError(f"{where}: rank_pattern: {path}.lora_E should list {rank} times true or false")
    if strange := sorted(set(pattern) - {f"{path}.lora_E" for path in paths}):
        raise AdapterError(f"{where}: rank_pattern: {strange[0][:120]!r} is no adapted module here")
    return masks


def _filled(linear: Linear, mask: list[bool], own: Sequence[Tensor]) -> AdaLoRADelta:
    """A delta that holds lora_A, lora_B and lora_E of a file, its other triplets zero."""
    A, B, E = own
    P, Q = B.new_zeros(linear.out_features, len(mask)), A.new_zeros(len(mask), linear.in_features)
    delta = AdaLoRADelta(P, Q, 1.0, 0.0, 0.0)
    with torch.no_grad():
        which = torch.tensor(mask)
        delta.keep.copy_(which)
        delta.Q[which], delta.P[:, which], delta.singular[which] = A, B, E[:, 0].to(delta.singular)
    return delta


METHOD = AdaLoRA()
