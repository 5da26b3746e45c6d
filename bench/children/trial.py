"""One method on one base in this process, through the product's own functions: what searches and pages share.

prepare (once) -> [ attach -> train -> measure -> take_off ] ...
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters import detach
from tunesmith.config import Run, load_run
from tunesmith.data.catalog import resolve_data
from tunesmith.model.native import select
from tunesmith.prepare import Data, Loaded, attach_adapter, load_base, load_data, template_for
from tunesmith.train.checkpoint import seed_everything
from tunesmith.train.loop import Trainer
from tunesmith.train.steps import make_plan

PACK_TOKENS = 2048  # a batch of 16 reviews is one pack, on every machine


@dataclass(frozen=True)
class Bench:
    """A base with its data, on which one adapter after another is tried; `data.valid` is what it is measured on."""

    run: Run
    loaded: Loaded
    data: Data


@dataclass
class Notes:
    """A `Reporter` that keeps what was said, and the last step's values."""

    said: list[str] = field(default_factory=list)
    last: Mapping[str, float] = field(default_factory=dict)

    def step(self, values: Mapping[str, float]) -> None:
        """Keep the step."""
        self.last = dict(values)

    def say(self, line: str) -> None:
        """Keep the line."""
        self.said.append(line)


class Unsaved(Trainer):
    """The product's loop without its checkpoints: nobody resumes these runs, and their writing would be measured."""

    def save(self) -> None:
        """Write nothing."""


def prepare(wanted: Mapping[str, Any]) -> Bench:
    """Load base and data as a run would: `reviews` rows to train on, `held` rows of the split `split` to measure on."""
    torch.set_num_threads(wanted["threads"])
    flags = {
        "model.path": wanted["model"],
        "model.dtype": "float32",  # the same for all: a method that trains the base needs it
        "model.device": "cpu",
        "data.train": wanted["data"],
        "data.valid": str(resolve_data(wanted["data"]) / f"{wanted['split']}.jsonl"),
        "data.limit": wanted["reviews"],
        "train.batch_size": wanted["batch"],
        "train.epochs": 1,
        "train.warmup_ratio": 0.1,
        "train.pack_tokens": PACK_TOKENS,
        "train.seed": wanted["seed"],
        "evaluate.rows": wanted["held"],
        "evaluate.samples": 0,
    }
    run, _ = load_run(None, [], flags)
    select(run.train.kernels)
    loaded = load_base(run.model)
    loaded.template = template_for(run, loaded.tokenizer)
    return Bench(run, loaded, load_data(run, loaded.tokenizer, loaded.template))


def attach(bench: Bench, adapter: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Attach; returns copies of the base weights that it will train. Raises ConfigError, AdapterError."""
    attached = attach_adapter(replace(bench.run, adapter=dict(adapter)), bench.loaded)
    return {name: parameter.detach().clone() for name, parameter in attached.base.items()}


def train(bench: Bench, rate: float) -> dict[str, Any]:
    """One pass over the training rows at the peak rate `rate`.

    Raises NumericalError where a loss or a gradient is not finite, ConfigError for settings that do not fit the steps.
    """
    adapter, rows = bench.loaded.adapters["default"], bench.data.train.examples
    settings = replace(bench.run.train, learning_rate=rate)
    plan = make_plan(
        settings,
        len(rows),
        learning_rate=rate,
        pack_tokens=PACK_TOKENS,
        dropout=bool(getattr(adapter.settings, "dropout", 0.0)),
        eval_steps=None,
    )
    seed_everything(settings.seed)
    notes = Notes()
    trainer = Unsaved(bench.loaded.model, adapter, rows, settings, plan, Path(), notes)
    began = time.perf_counter()
    progress = trainer.run()
    seconds = time.perf_counter() - began
    return {
        "train_s": seconds, "tokens": progress.tokens, "tokens_per_s": progress.tokens / seconds,
        "steps": progress.step, "train_loss": notes.last["loss"], "said": notes.said,
    }  # fmt: skip


def take_off(bench: Bench, kept: Mapping[str, torch.Tensor]) -> None:
    """Take the adapter off and put the base weights `kept` back: the base is then as it was, bit by bit."""
    adapter = bench.loaded.adapters.pop("default")
    with torch.no_grad():
        for name, parameter in adapter.base.items():
            parameter.copy_(kept[name])
            parameter.requires_grad_(False)
            parameter.grad = None
    adapter.base.clear()
    detach(bench.loaded.model, adapter)
    bench.loaded.model.eval()
