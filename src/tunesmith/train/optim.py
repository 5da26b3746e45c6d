"""How fast, in what groups and how safely parameters move. Every length here is counted in optimizer steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tunesmith.errors import ConfigError, NumericalError, did_you_mean

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


def build_optimizer(
    parameters: Mapping[str, Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr_scale: Mapping[str, float] | None = None,
    decay_all: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Give AdamW over named parameters: p <- p - lr k (m / (sqrt(v) + eps) + d p)   (arXiv:1711.05101).

    `lr_scale` gives k for names that are not to move at k = 1 (LoRA+'s B). The decay d leaves out vectors, biases and
    gates unless `decay_all`. Each parameter group carries its `lr_scale` and the `names` in it. Raises ConfigError if
    there is nothing to train or a scale names no parameter.
    """
    scales = dict(lr_scale or {})
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
    settings = [
        {**group, "lr": learning_rate * scale, "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), group in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
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
