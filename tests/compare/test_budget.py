"""A budget in steps, against a count by hand and against what the training loop does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tunesmith.compare.budget import Use, used_by, walk, within
from tunesmith.config import TrainSection
from tunesmith.config.grid import Budget
from tunesmith.errors import ConfigError
from tunesmith.train.loop import Trainer

PLAIN = TrainSection(batch_size=4, shuffle=False)
LENGTHS = [10, 20, 30, 40, 50, 60]  # batches of an epoch: 4 rows of 100 tokens, 2 rows of 110


@pytest.mark.parametrize(
    ("budget", "use"),
    [
        (Budget(examples=4), Use(1, 4, 100)),
        (Budget(examples=5), Use(1, 4, 100)),
        (Budget(examples=6), Use(2, 6, 210)),
        (Budget(examples=16), Use(5, 16, 520)),
        (Budget(tokens=209), Use(1, 4, 100)),
        (Budget(tokens=310), Use(3, 10, 310)),
        (Budget(seconds=1.0), Use(4, 12, 420)),
        (Budget(examples=16, tokens=210, seconds=9.0), Use(2, 6, 210)),
    ],
)
def test_the_most_whole_steps(budget, use):
    assert within(budget, LENGTHS, PLAIN, 0.25) == use


def test_less_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="budget.tokens: is less than one step of train.batch_size=4 rows"):
        within(Budget(examples=100, tokens=99), LENGTHS, PLAIN, None)


def test_rows_are_those_of_the_training_loop():
    settings = replace(PLAIN, shuffle=True, seed=3)
    plan = SimpleNamespace(steps_per_epoch=2, batch_size=4)
    trainer = SimpleNamespace(examples=LENGTHS, settings=settings, plan=plan, _order=None)
    seen = 0
    for step, use in enumerate(itertools.islice(walk(LENGTHS, settings), 9)):
        seen += sum(LENGTHS[row] for row in Trainer.batch(trainer, step))
        assert (use.steps, use.tokens) == (step + 1, seen)
        assert used_by(step + 1, LENGTHS, settings) == use
