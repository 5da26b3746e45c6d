"""Two optimizer steps in a fresh process: what the planner says of them, and the most that the process held."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import tunesmith.workflow  # noqa: F401  what a run imports
from bench.children.common import spec, tell
from tunesmith.adapters import attach, kinds
from tunesmith.config import QuantSection, TrainSection
from tunesmith.data.catalog import resolve_model
from tunesmith.hardware import describe
from tunesmith.model import allocator
from tunesmith.model.load import load_model
from tunesmith.model.native import select
from tunesmith.model.quantize import spec_of
from tunesmith.model.shadow import load_shapes
from tunesmith.plan import made_up
from tunesmith.tokenizer import load_tokenizer
from tunesmith.train.loop import Trainer
from tunesmith.train.memory import resident_memory
from tunesmith.train.planner import IMPORTS, Work, plan
from tunesmith.train.steps import make_plan

STEPS = 2


class Silent:
    """A reporter that reports nothing."""

    def step(self, values: Any) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def main() -> None:
    """Plan, train, tell."""
    wanted = spec()
    torch.set_num_threads(wanted["threads"])
    kernels, _ = select("auto")
    blocks = allocator.use() is None
    kinds()
    imported, _ = resident_memory()
    path = resolve_model(wanted["model"])
    tokenizer = load_tokenizer(path)
    quant = spec_of(QuantSection(kind=wanted["quant"]))
    settings = TrainSection(batch_size=wanted["rows"], recompute=wanted["recompute"], save_steps=1000)
    rows = made_up(STEPS * wanted["rows"], wanted["tokens"], 40_000)
    planned = plan(_work(path, quant, wanted["adapter"], rows, settings, kernels == "native", blocks), 4096)
    model = load_model(path, quant=quant)
    adapter = attach(model, wanted["adapter"], encode=tokenizer.encode)
    steps = make_plan(settings, len(rows), learning_rate=1e-4, pack_tokens=4096, dropout=False, eval_steps=None)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, adapter, rows, settings, steps, Path(folder), Silent()).run()
    _, peak = resident_memory()
    counted, found = allocator.counts(), describe()
    tell(
        "memory", planned=planned.total - IMPORTS, parts=planned.parts, measured=peak - imported, imported=imported,
        live=counted.peak if counted else None,
        about={
            "cpu": found["cpu"], "memory": found["memory"], "system": found["system"],
            "versions": {"tunesmith": found["tunesmith"], "commit": found["revision"], "python": found["python"],
                         "torch": torch.__version__},
        },
    )  # fmt: skip


def _work(
    path: Path, quant: Any, adapter: dict[str, Any], rows: Any, settings: TrainSection, native: bool, blocks: bool
) -> Work:
    model = load_shapes(path, torch.float32, quant)
    return Work(model, attach(model, adapter), rows, settings, native=native, blocks=blocks)


if __name__ == "__main__":
    main()
