"""A batch of 8 rows gives one gradient, however it is cut into packs: 8x1, 4x2, 1x8, by rows or by tokens."""

from __future__ import annotations

import pytest
import torch
from tests.laws import small

from tunesmith.adapters import attach
from tunesmith.config import TrainSection
from tunesmith.train.loop import Trainer
from tunesmith.train.steps import make_plan

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


class Silent:
    """A reporter that keeps the lines."""

    def __init__(self) -> None:
        self.lines = []

    def step(self, values):
        self.lines.append(dict(values))

    def say(self, line):
        raise AssertionError(line)


def gradient(tmp_path, dtype, micro, pack_tokens=4096, share=True, rows=None):
    """(gradient before clipping, loss, packs of the step) of the first optimizer step, through the Trainer."""
    model = small.build(dtype=dtype)
    adapter = attach(model, {"kind": "lora", "rank": 3})
    small.disturb(adapter)
    settings = TrainSection(batch_size=8, micro_batch=micro, shuffle=False, share_prefix=share, max_grad_norm=0.0)
    rows = rows or small.examples(count=8)
    plan = make_plan(settings, len(rows), learning_rate=1e-3, pack_tokens=pack_tokens, dropout=False, eval_steps=None)
    trainer = Trainer(model, adapter, rows, settings, plan, tmp_path, Silent())
    packs = len(trainer._packs([rows[i] for i in trainer.batch(0)]))
    values = trainer._step()
    grads = torch.cat([p.grad.flatten().double() for p in adapter.trainable.values()])
    assert values["grad_norm"] == pytest.approx(float(grads.norm()), rel=1e-6)
    return grads, values["loss"], packs


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("share", [True, False])
def test_accumulation_changes_nothing(tmp_path, dtype, share):
    whole, loss, packs = gradient(tmp_path, dtype, micro=None, share=share)
    assert packs == 1
    for micro, expected in ((8, 1), (4, 2), (2, 4), (1, 8)):
        part, part_loss, packs = gradient(tmp_path, dtype, micro=micro, share=share)
        assert packs >= expected
        assert small.relative(part, whole) <= BOUND[dtype]
        assert part_loss == pytest.approx(loss, rel=BOUND[dtype])


def test_so_does_the_budget_of_tokens(tmp_path):
    whole, _, _ = gradient(tmp_path, torch.float64, micro=None)
    part, _, packs = gradient(tmp_path, torch.float64, micro=None, pack_tokens=50)
    assert packs >= 3 and small.relative(part, whole) <= 1e-10


def test_a_row_without_a_target_changes_nothing(tmp_path):
    """Nor does where its pack begins: alone in a pack it has a loss of 0 over the batch's tokens, not over none."""
    from dataclasses import replace

    rows = small.examples(count=8)
    rows[3] = replace(rows[3], supervised=rows[3].supervised & False)
    parts = [gradient(tmp_path, torch.float64, micro=micro, rows=rows)[0] for micro in (None, 1)]
    assert small.relative(parts[1], parts[0]) <= 1e-10


def test_rows_have_unequal_lengths_and_targets():
    """Otherwise a mean of means would pass."""
    rows = small.examples(count=8)
    assert len({len(row.ids) for row in rows}) > 4 and len({int(row.supervised.sum()) for row in rows}) > 2


def test_a_mean_of_means_would_be_seen(tmp_path, monkeypatch):
    true = Trainer._accumulate
    whole, _, _ = gradient(tmp_path, torch.float64, micro=None)
    monkeypatch.setattr(Trainer, "_accumulate", lambda self, pack, _, rows: true(self, pack, 8 * pack.supervised, rows))
    part, _, _ = gradient(tmp_path, torch.float64, micro=1)
    assert small.relative(part, whole) > 1e-3
