"""A budget as optimizer steps: the most whole steps that stay within it, counted on the very rows of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.config import TrainSection
from tunesmith.config.grid import Budget
from tunesmith.errors import ConfigError
from tunesmith.train.order import row_order


@dataclass(frozen=True)
class Use:
    """What some steps of training use: `steps`, and the `examples` and `tokens` seen in them."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0


def within(budget: Budget, lengths: Sequence[int], settings: TrainSection, step_seconds: float | None) -> Use:
    """The most steps within the budget, over rows of these `lengths` in tokens, as often as it takes.

    `step_seconds`: how long a step takes, where the budget is in seconds. Raises ConfigError where not one fits.
    """
    last = Use()
    for use in walk(lengths, settings):
        if over := _over(budget, use, step_seconds):
            if not last.steps:
                raise ConfigError(
                    f"budget.{over}: is less than one step of train.batch_size={settings.batch_size} rows"
                )
            return last
        last = use
    return last


def used_by(steps: int, lengths: Sequence[int], settings: TrainSection) -> Use:
    """What that many steps see."""
    return next((use for use in walk(lengths, settings) if use.steps == steps), Use())


def walk(lengths: Sequence[int], settings: TrainSection) -> Iterator[Use]:
    """What was used after each step, one epoch after the other, without an end."""
    use, epoch = Use(), 0
    while lengths:
        order = row_order(len(lengths), settings, epoch)
        for at in range(0, len(order), settings.batch_size):
            rows = order[at : at + settings.batch_size]
            tokens = sum(lengths[row] for row in rows)
            use = Use(use.steps + 1, use.examples + len(rows), use.tokens + tokens)
            yield use
        epoch += 1


def _over(budget: Budget, use: Use, step_seconds: float | None) -> str:
    """The part of the budget that is exceeded; empty where none is."""
    if budget.examples is not None and use.examples > budget.examples:
        return "examples"
    if budget.tokens is not None and use.tokens > budget.tokens:
        return "tokens"
    if budget.seconds is not None and use.steps * (step_seconds or 0.0) > budget.seconds:
        return "seconds"
    return ""
