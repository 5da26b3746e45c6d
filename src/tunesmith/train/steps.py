"""The arithmetic of a run, in optimizer steps: one unit for epochs, warm-up, evaluations and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.config import TrainSection
from tunesmith.train.optim import Schedule, warmup_in_steps


@dataclass(frozen=True)
class Plan:
    """The resolved arithmetic of a run: what follows from settings, data and method before the first step."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    pack_tokens: int
    micro_batch: int | None
    share_prefix: bool
    schedule: Schedule
    eval_steps: int
    save_steps: int


def make_plan(
    settings: TrainSection, rows: int, *, learning_rate: float, pack_tokens: int, dropout: bool, eval_steps: int | None
) -> Plan:
    """Turn settings into numbers of optimizer steps.

    `dropout`: does the adapter draw some?
    """
    per_epoch = math.ceil(rows / settings.batch_size)
    steps = max(1, math.ceil(per_epoch * settings.epochs))
    steps = min(steps, settings.max_steps) if settings.max_steps else steps
    warmup = warmup_in_steps(steps, settings.warmup_steps, settings.warmup_ratio)
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        batch_size=settings.batch_size,
        pack_tokens=pack_tokens,
        micro_batch=settings.micro_batch,
        share_prefix=shares_prefix(settings, dropout),
        schedule=Schedule(settings.schedule, learning_rate, steps, warmup),
        eval_steps=eval_steps or per_epoch,
        save_steps=settings.save_steps or per_epoch,
    )


def shares_prefix(settings: TrainSection, dropout: bool) -> bool:
    """Are shared tokens computed once? Not where each example draws its own dropout, an adapter's or attention's."""
    return settings.share_prefix and not (dropout or settings.attention_dropout)
