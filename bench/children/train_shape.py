"""Tunesmith's training loop on random weights of a shape: what a GPU bench needs without a model to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.children.common import IGNORE, TARGETS, device_peak, read_examples, spec, synchronise, tell


def main() -> None:
    """Train as the specification says, save the adapter's tensors, and tell of every step."""
    wanted = spec()
    import numpy as np
    import torch

    from tunesmith.adapters import attach
    from tunesmith.config.sections import TrainSection
    from tunesmith.data.encode import Example
    from tunesmith.train.loop import Trainer
    from tunesmith.train.steps import make_plan

    torch.manual_seed(wanted["seed"])
    device, out = wanted["device"], Path(wanted["out"])
    rows = read_examples(wanted["train"])
    model = random_model(wanted)
    lora = {"kind": "lora", "rank": wanted["rank"], "alpha": wanted["alpha"], "dropout": 0.0}
    adapter = attach(model, {**lora, "target_modules": TARGETS[wanted["targets"]]}, "default", wanted["seed"])
    examples = [
        Example(np.array(row["ids"], np.int32), np.array([i != IGNORE for i in row["labels"]]), f"random:{i}")
        for i, row in enumerate(rows)
    ]
    settings = TrainSection(
        batch_size=wanted["batch_size"], schedule="constant", seed=wanted["seed"], save_steps=10**9, epochs=1
    )
    budget = pack_tokens(model, adapter, settings, examples)
    plan = make_plan(
        settings, len(rows), learning_rate=wanted["learning_rate"], pack_tokens=budget, dropout=False, eval_steps=None
    )

    class Tell:
        """The run's reporter: tells of every step's end."""

        tokens = 0

        def step(self, values: Mapping[str, float]) -> None:
            synchronise(device)
            tokens = int(values["num_tokens"])
            tell("step", tokens=tokens - self.tokens, loss=values["loss"])
            self.tokens = tokens

        def say(self, line: str) -> None:
            tell("said", line=line)

    trainer = Trainer(model, adapter, examples, settings, plan, out, Tell())
    tell("begin", pack_tokens=budget)
    trainer.run()  # saves a checkpoint at its end
    tell("saved", device_peak=device_peak(device))


def random_model(wanted: Mapping[str, Any]) -> Any:
    """A frozen LLaMA of the wanted shape: normal weights of deviation .02, norms of 1."""
    import torch

    from tunesmith.model.config import ModelConfig
    from tunesmith.model.llama import Llama

    config = ModelConfig.from_hf(wanted["config"])
    dtype, device = getattr(torch, wanted["dtype"]), wanted["device"]
    with torch.device("meta"):
        model = Llama(config)
    state = {}
    for name, shape in config.weight_shapes().items():
        if len(shape) == 1:
            state[name] = torch.ones(shape, dtype=dtype, device=device)
        else:
            state[name] = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    return model


def pack_tokens(model: Any, adapter: Any, settings: Any, rows: Sequence[Any]) -> int:
    """The pack size that `tunesmith train` would choose here."""
    from tunesmith.adapters import attach
    from tunesmith.model.shadow import shapes_of
    from tunesmith.train.memory import usable_memory
    from tunesmith.train.planner import Work, choose

    shadow = shapes_of(model.config, model.dtype)
    work = Work(shadow, attach(shadow, {**vars(adapter.settings), "kind": adapter.kind}), rows, settings)
    work = replace(work, device=model.device.type, native=model.device.type == "cpu")
    return choose(work, usable_memory(model.device)).pack_tokens


if __name__ == "__main__":
    main()
