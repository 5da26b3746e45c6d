"""How fast, in what groups and how safely parameters move. Every length here is counted in optimizer steps."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tunesmith.config import TrainSection
from tunesmith.errors import ConfigError, NumericalError, did_you_mean
from tunesmith.train.adamw import (
    FusedAdamW,
    HoldsStates,
    Layout,
    SlicedAdamW,
    in_eight_bits,
    layout_sizes,
    slice_bytes,
    state_layout,
)
from tunesmith.train.offload import aligned, place_for

logger = logging.getLogger(__name__)

LONG_WARMUP = 0.2  # a larger share of training spent warming up is nearly always a mistake of units
NO_DECAY = frozenset({"bias", "gate", "adaption_gate"})


def constant(progress: float) -> float:
    """f(p) = 1"""
    return 1.0


def linear(progress: float) -> float:
    """f(p) = 1 - p"""
    return max(0.0, 1.0 - progress)


def cosine(progress: float) -> float:
    """f(p) = (1 + cos(pi p)) / 2"""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}


@dataclass(frozen=True)
class Schedule:
    """lr(s) = lr * s / W for s < W, then lr * f((s - W) / (T - W)); s from 0, W warm-up steps, T steps in all.

    Agrees with transformers' get_{constant,linear,cosine}_schedule_with_warmup. Raises ConfigError for an unknown
    name, or for a warm-up that never ends; a warm-up beyond 20% of training is warned of.
    """

    name: str
    learning_rate: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ConfigError(
                f"train.schedule: {self.name!r} is not one of {known}{did_you_mean(self.name, SCHEDULES)}"
            )
        if self.learning_rate < 0 or not math.isfinite(self.learning_rate):
            raise ConfigError(f"train.learning_rate: {self.learning_rate} must be a number of 0 or more")
        warning = check_warmup(self.warmup_steps, self.total_steps)
        if warning:
            logger.warning(warning)

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of optimizer step `step` (0 is the first)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step / max(1, self.warmup_steps))
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * SCHEDULES[self.name](progress)


def warmup_in_steps(total_steps: int, warmup_steps: int | None = None, warmup_ratio: float | None = None) -> int:
    """Give the warm-up in optimizer steps, from a number of steps or a share of all steps (rounded up), not both.

    Raises ConfigError if both are set or either is out of range.
    """
    if warmup_steps and warmup_ratio:
        raise ConfigError(
            f"train.warmup_steps={warmup_steps} and train.warmup_ratio={warmup_ratio}: they are two ways to say the "
            "same thing; set only one"
        )
    if warmup_ratio is not None and not 0 <= warmup_ratio <= 1:
        raise ConfigError(f"train.warmup_ratio: {warmup_ratio} is a share of all steps, so between 0 and 1")
    if (warmup_steps or 0) < 0:
        raise ConfigError(f"train.warmup_steps: {warmup_steps} is a number of optimizer steps, so 0 or more")
    if not warmup_ratio:
        return warmup_steps or 0
    rounded = math.ceil(total_steps * warmup_ratio)  # as transformers
    return (
        min(rounded, total_steps - 1) if warmup_ratio < 1 else rounded
    )  # a run of one step still has one at full rate


def check_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """Say, in a line, that a warm-up is long; None if it is not.

    Raises ConfigError if it is so long that the full learning rate is never reached.
    """
    if warmup_steps and warmup_steps >= total_steps:
        raise ConfigError(
            f"train.warmup_steps: {warmup_steps} of warm-up and only {total_steps} optimizer steps in all, so the full "
            f"learning rate is never reached; use at most {int(LONG_WARMUP * total_steps)} (an optimizer step is a "
            "whole batch, not a micro-batch)"
        )
    if warmup_steps > max(1, LONG_WARMUP * total_steps):
        return (
            f"warm-up takes {warmup_steps} of {total_steps} optimizer steps ({warmup_steps / total_steps:.0%}); more "
            f"than {LONG_WARMUP:.0%} is rarely meant: check that micro-batches were not counted as steps"
        )
    return None


@dataclass(frozen=True)
class Kind:
    """A `train.optimizer`: are its states 8-bit codes, and are they paged?"""

    eight: bool
    paged: bool


OPTIMIZERS = {
    "adamw": Kind(eight=False, paged=False),
    "adamw_8bit": Kind(eight=True, paged=False),
    "paged_adamw": Kind(eight=False, paged=True),
    "paged_adamw_8bit": Kind(eight=True, paged=True),
}


@dataclass(frozen=True)
class Choice:
    """The optimizer and the offload that are used, and a line for each that is not what was asked for."""

    optimizer: str
    offload: str
    notes: tuple[str, ...] = ()


def choose_optimizer(optimizer: str, offload: str, device: torch.device) -> Choice:
    """Give what is used on `device` for `train.optimizer` and `train.offload`, and say where it is something else.

    Raises ConfigError for an unknown name.
    """
    kind = _kind(optimizer)
    notes = []
    missing = None if not kind.paged else _no_paging(device)
    if missing is not None:
        asked, optimizer = optimizer, "adamw_8bit" if kind.eight else "adamw"
        notes.append(f"train.optimizer: {asked}: {missing}; {optimizer} is used, whose states stay where the model is")
    if offload == "cpu" and device.type == "cpu":
        offload = "none"
        notes.append("train.offload: cpu: the model is in main memory, and its optimizer's states are there already")
    return Choice(optimizer, offload, tuple(notes))


def build_optimizer(
    parameters: Mapping[str, Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr_scale: Mapping[str, float] | None = None,
    decay_all: bool = False,
    optimizer: str = "adamw",
    offload: str = "none",
    folder: Path | None = None,
) -> HoldsStates:
    """Give AdamW over named parameters: p <- p - lr k (m / (sqrt(v) + eps) + d p)   (arXiv:1711.05101).

    `lr_scale` gives k for names that are not to move at k = 1 (LoRA+'s B). The decay d leaves out vectors, biases and
    gates unless `decay_all`. Each parameter group carries its `lr_scale` and the `names` in it. `optimizer`, one of
    OPTIMIZERS, says how m and v are held, `offload` where: none (with the parameters), cpu or disk, in `folder`.
    Raises ConfigError if there is nothing to train, a scale names no parameter or a word is unknown, and DiskError
    where the disk has no room.
    """
    kind = _kind(optimizer)
    groups = _groups(parameters, learning_rate, weight_decay, dict(lr_scale or {}), decay_all)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if kind.paged:
        from tunesmith.train.paged import PagedAdamW

        if offload != "none":
            raise ConfigError(f"train.offload: {offload} moves states that {optimizer} pages already; keep one")
        return PagedAdamW(groups, eight=kind.eight, **settings)
    if kind == OPTIMIZERS["adamw"] and offload == "none":
        return FusedAdamW(groups, **settings)
    size = sum(aligned(size) for layout in _layouts(parameters, optimizer) for size in layout_sizes(layout))
    return SlicedAdamW(groups, eight=kind.eight, place=place_for(offload, folder, size), **settings)


def optimizer_of(
    settings: TrainSection,
    parameters: Mapping[str, Parameter],
    *,
    learning_rate: float,
    lr_scale: Mapping[str, float] | None = None,
    folder: Path | None = None,
) -> HoldsStates:
    """Give the optimizer of a run, in which `choose_optimizer` has had its say; `folder` is the run's. See above."""
    return build_optimizer(
        parameters,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        lr_scale=lr_scale,
        optimizer=settings.optimizer,
        offload=settings.offload,
        folder=folder,
    )


def state_bytes(parameters: Mapping[str, Tensor], optimizer: str = "adamw") -> int:
    """Give the bytes of an optimizer's states, wherever they lie: 8 a parameter, or 2.03 in 8 bits (see adamw.py)."""
    return sum(size for layout in _layouts(parameters, optimizer) for size in layout_sizes(layout))


def workspace_bytes(
    parameters: Mapping[str, Tensor], optimizer: str = "adamw", offload: str = "none", device: str = "cpu"
) -> int:
    """Give the most bytes that an optimizer's step holds for a moment, beside parameters, gradients and states."""
    kind = _kind(optimizer)
    in_place = kind.paged or kind == OPTIMIZERS["adamw"] and offload == "none"
    if in_place or not parameters:
        return 0
    return slice_bytes(max(p.numel() for p in parameters.values()), kind.eight, offload != "none", device)


def _kind(optimizer: str) -> Kind:
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ConfigError(f"train.optimizer: {optimizer!r} is not one of {known}{did_you_mean(optimizer, OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]


def _no_paging(device: torch.device) -> str | None:
    """Why there is no paging on `device`; None where there is."""
    if device.type != "cuda":
        return "a CPU has no GPU memory to page"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes, which does it, is not installed (pip install bitsandbytes)"
    return None


def _layouts(parameters: Mapping[str, Tensor], optimizer: str) -> list[Layout]:
    eight = _kind(optimizer).eight
    return [state_layout(p, eight and in_eight_bits(name, p)) for name, p in parameters.items()]


def _groups(
    parameters: Mapping[str, Parameter], rate: float, decay: float, scales: Mapping[str, float], decay_all: bool
) -> list[dict[str, Any]]:
    """Parameter groups by scale and decay. Raises ConfigError."""
    unknown = [name for name in scales if name not in parameters]
    if unknown:
        raise ConfigError(f"learning rate scale for {unknown[0]!r}: no such parameter is trained")
    if not parameters:
        raise ConfigError("nothing to train: no parameter is trainable; check adapter.kind and adapter.target_modules")
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        scale, decays = float(scales.get(name, 1.0)), decay_all or _decays(name, parameter)
        group = groups.setdefault((scale, decays), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "lr": rate * scale, "lr_scale": scale, "weight_decay": decay if decays else 0.0}
        for (scale, decays), group in groups.items()
    ]


def set_learning_rate(optimizer: HoldsStates, learning_rate: float) -> None:
    """Set every group to `learning_rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def gradient_norm(parameters: Iterable[Parameter]) -> float:
    """Give the 2-norm of all gradients together, summed in float64; inf or nan if a gradient is not finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).to(gradients[0].device) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def clip_gradients(parameters: Iterable[Parameter], max_norm: float | None) -> float:
    """Scale all gradients so that their common 2-norm is at most `max_norm` (None or 0: no limit); give the norm.

    Neither squares of large gradients overflow nor those of small ones vanish. Gradients that are not finite are
    left as they are: the caller sees it in the norm.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    if max_norm and math.isfinite(norm):
        coefficient = max_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if coefficient < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)
    return norm


class LossScaler:
    """Keeps fp16 gradients from vanishing: backward of S * loss, gradients / S, S halved when they overflow.

    After `interval` good steps in a row S doubles again. Works on any device and keeps no state but three numbers,
    which belong in checkpoints. `enabled=False` makes it do nothing (S = 1).

        scaler.scale(loss).backward()
        good = scaler.unscale(parameters)      # False: gradients overflowed, skip the optimizer step
        if good: optimizer.step()
        scaler.update(good)
    """

    def __init__(self, *, enabled: bool = True, initial: float = 65536.0, interval: int = 2000) -> None:
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.interval = interval
        self.good_steps = 0
        self.skipped = 0  # steps skipped since the start of training

    def scale(self, loss: Tensor) -> Tensor:
        """Give S * loss, in fp32 at least: S times an fp16 loss would itself overflow."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value if self.enabled else loss

    def unscale(self, parameters: Iterable[Parameter]) -> bool:
        """Divide the gradients by S in place; whether all of them are finite."""
        if not self.enabled:
            return True
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(1.0 / self.value)  # S is a power of two: exact
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def update(self, good: bool) -> None:
        """Take note of a step that was made (`good`) or skipped.

        Raises NumericalError when S has sunk below 1: the values themselves overflow fp16, not the scale.
        """
        if not self.enabled:
            return
        if good:
            self.good_steps += 1
            if self.good_steps == self.interval:
                self.value, self.good_steps = self.value * 2.0, 0
            return
        self.value, self.good_steps, self.skipped = self.value / 2.0, 0, self.skipped + 1
        if self.value < 1.0:
            raise NumericalError(
                "fp16 gradients overflow even without loss scaling: activations exceed fp16's 65504; "
                "use model.dtype=bfloat16 or float32"
            )

    def state(self) -> dict[str, float | int]:
        """Give what a checkpoint has to keep (JSON)."""
        return {"value": self.value, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state(self, state: Mapping[str, float | int]) -> None:
        """Go on from what `state` gave."""
        self.value = float(state["value"])
        self.good_steps, self.skipped = int(state["good_steps"]), int(state["skipped"])


def _decays(name: str, parameter: Parameter) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple GPUs have no float64
