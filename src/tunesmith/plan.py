"""`tunesmith plan` and `data preview`: what a run would do, need and learn from, without loading weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tunesmith.adapters import attach
from tunesmith.config import Run
from tunesmith.model.llama import Llama
from tunesmith.prepare import (
    base_of,
    check_precision,
    choose_device,
    choose_dtype,
    load_data,
    memory_job,
    sizes_and_tokenizer,
    template_for,
)
from tunesmith.scratch import check_trains_all
from tunesmith.train.loop import make_plan
from tunesmith.train.memory import GIB, usable_memory
from tunesmith.train.memory import plan as plan_memory


def plan_run(run: Run) -> dict[str, Any]:
    """Steps, tokens, trained parameters and memory by part (GiB). Raises OutOfMemory where not even one row fits."""
    config, tokenizer = sizes_and_tokenizer(run.model)
    data = load_data(run, tokenizer, template_for(run, tokenizer))
    device = choose_device(run.model.device)
    dtype = choose_dtype(base_of(run).dtype, device)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.requires_grad_(False)
    adapter = attach(model, run.adapter, seed=run.train.seed, encode=tokenizer.encode)
    check_precision(adapter)
    check_trains_all(run.model, model, adapter)
    job, why = memory_job(run, model, adapter, data, device)
    steps = make_plan(
        run.train,
        len(data.train.examples),
        learning_rate=run.train.learning_rate or adapter.method.learning_rate,
        pack_tokens=job.pack_tokens,
        dropout=bool(getattr(adapter.settings, "dropout", 0.0)),
        eval_steps=run.evaluate.every_steps,
    )
    memory = plan_memory(job)
    return {
        "method": adapter.kind,
        "trainable_parameters": job.trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "rows": len(data.train.examples),
        "tokens": data.train.report.tokens,
        "supervised_tokens": data.train.report.supervised,
        "steps": steps.steps,
        "steps_per_epoch": steps.steps_per_epoch,
        "pack_tokens": job.pack_tokens,
        "why": why,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_gib": round(memory.total / GIB, 2),
        "memory_parts_gib": {part: round(size / GIB, 3) for part, size in memory.parts.items()},
        "available_gib": round(usable_memory(device) / GIB, 2),
    }


def preview_data(run: Run, *, rows: int = 3, as_json: bool = False) -> None:
    """Print the first rows of a run's data with what is supervised, and the counts; loads the tokenizer only."""
    from rich.console import Console as RichConsole

    from tunesmith.data.preview import preview

    _, tokenizer = sizes_and_tokenizer(run.model)
    data = load_data(run, tokenizer, template_for(run, tokenizer))
    shown = RichConsole(highlight=False)
    if as_json:
        sets = {"train": data.train, "valid": data.valid}
        shown.print_json(data={name: asdict(found.report) for name, found in sets.items() if found is not None})
    else:
        shown.print(preview(data.train, tokenizer, rows=rows, valid=data.valid, colour=shown.is_terminal))
