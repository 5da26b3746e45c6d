"""Where memory runs out in a step, smaller packs do the same step: same batch, same gradient, and a line says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import small

from tunesmith.adapters import attach
from tunesmith.config import TrainSection
from tunesmith.data.pack import Pack
from tunesmith.model import allocator
from tunesmith.train.loop import Trainer
from tunesmith.train.steps import make_plan

ROOT = Path(__file__).resolve().parents[2]


class Lines:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, values: Any) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Keep it."""
        self.said.append(line)


class Short(Trainer):
    """A trainer for which packs of more than `room` tokens are too many, once their forward has been done."""

    room = 10**9

    def _accumulate(self, pack: Pack, *rest: Any) -> float:
        value = super()._accumulate(pack, *rest)
        if pack.layout.tokens > self.room:
            raise RuntimeError("can't allocate memory: 123 bytes were asked for")
        return value


def trainer(folder: Path, room: int, pack_tokens: int = 4096, dropout: float = 0.0, **settings: Any) -> Short:
    """One of 12 rows a step in float64."""
    model = small.build(dtype=torch.float64)
    adapter = attach(model, {"kind": "lora", "rank": 3, "dropout": dropout})
    small.disturb(adapter)
    rows = small.examples(count=12)
    section = TrainSection(batch_size=12, shuffle=False, max_grad_norm=0.0, **settings)
    plan = make_plan(section, 12, learning_rate=1e-3, pack_tokens=pack_tokens, dropout=dropout > 0, eval_steps=None)
    made = Short(model, adapter, rows, section, plan, folder, Lines())
    made.room = room
    model.train()
    return made


def gradient(one: Short) -> torch.Tensor:
    """After one step."""
    torch.manual_seed(3)
    one._step()
    return torch.cat([p.grad.flatten() for p in one.parameters.values() if p.grad is not None])


def test_smaller_packs_give_the_same_gradient(tmp_path: Path) -> None:
    easy, tight = trainer(tmp_path / "a", 10**9), trainer(tmp_path / "b", 60)
    expected = gradient(easy)
    assert (gradient(tight) - expected).norm() <= 1e-10 * expected.norm()
    packs = tight._packs([tight.examples[i] for i in tight.batch(0)])
    assert max(p.layout.tokens for p in packs) <= 60 < max(p.layout.tokens for p in easy._packs(easy.examples))
    assert all("memory ran out; packs have at most" in line for line in tight.reporter.said) and tight.reporter.said
    tight.save()
    again = trainer(tmp_path / "b", 60)
    again.resume(next((tmp_path / "b").glob("checkpoint-*")))
    assert again.progress.pack_tokens == tight.progress.pack_tokens
    tight._step()
    said = len(tight.reporter.said)
    again._step()
    assert len(tight.reporter.said) == said and not again.reporter.said  # once found, the size is kept


def test_the_same_dropout_is_drawn_again(tmp_path: Path) -> None:
    tight = trainer(tmp_path / "a", 60, dropout=0.3)
    found = gradient(tight)
    asked = trainer(tmp_path / "b", 10**9, pack_tokens=tight.progress.pack_tokens, dropout=0.3)
    assert torch.equal(found, gradient(asked))


@pytest.mark.parametrize(("room", "settings"), [(60, {"memory": "fixed"}), (1, {})])
def test_what_cannot_be_helped_is_an_error_and_changes_nothing(tmp_path: Path, room: int, settings: Any) -> None:
    one = trainer(tmp_path, room, **settings)
    before = {name: p.detach().clone() for name, p in one.parameters.items()}
    with pytest.raises(RuntimeError, match="can't allocate"):
        one._step()
    assert all(torch.equal(p, before[name]) for name, p in one.parameters.items()) and one.progress.step == 0


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path, 10**9)

    def fails(*_: Any) -> float:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(one, "_accumulate", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        one._step()
    assert not one.reporter.said


CHILD = """
import json, resource, sys
import numpy as np, torch
from tunesmith.model import allocator
allocator.use()
from tunesmith.adapters import attach
from tunesmith.config import TrainSection
from tunesmith.data.encode import Example
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.train.loop import Trainer
from tunesmith.train.steps import make_plan
from pathlib import Path

class Lines:
    said, losses = [], []
    def step(self, values): self.losses.append(values["loss"])
    def say(self, line): self.said.append(line)

room, memory = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = Llama(ModelConfig(model_type="llama", vocab_size=300, hidden_size=192, intermediate_size=512,
    num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, head_dim=32))
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.05)
model.requires_grad_(False)
adapter = attach(model, {"kind": "lora", "rank": 4})
drawn = np.random.default_rng(0)
rows = [Example(drawn.integers(0, 300, 128, dtype=np.int32), np.arange(128) > 60, "row") for _ in range(48)]
settings = TrainSection(batch_size=16, memory=memory, save_steps=100)
plan = make_plan(settings, 48, learning_rate=1e-3, pack_tokens=2048, dropout=False, eval_steps=None)
taken = int(next(s for s in open("/proc/self/status") if s.startswith("VmData")).split()[1]) << 10
if room:
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (room << 20), taken + (room << 20)))
lines = Lines()
Trainer(model, adapter, rows, settings, plan, Path(sys.argv[3]), lines).run()
print(json.dumps({"losses": lines.losses, "said": lines.said, "peak": allocator.counts().peak >> 20}))
"""


def child(room: int, memory: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process that may take `room` MiB more than it has; 0 is no limit."""
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CHILD, str(room), memory, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=env, check=False)


@pytest.mark.skipif(not allocator.can_be_used(), reason="NOT TESTED: Linux and a C++ compiler are needed")
def test_a_run_under_a_real_limit_ends_with_the_same_losses(tmp_path: Path) -> None:
    free = json.loads(child(0, "auto", tmp_path / "free").stdout)
    assert free["peak"] > 125 and not any("memory" in line for line in free["said"])
    tight = child(110, "auto", tmp_path / "tight")
    found = json.loads(tight.stdout)
    assert any("memory ran out" in line for line in found["said"])
    assert found["losses"] == pytest.approx(free["losses"], rel=1e-5)
    assert child(110, "fixed", tmp_path / "fixed").returncode != 0
