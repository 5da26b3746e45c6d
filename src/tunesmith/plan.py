"""`tunesmith plan` and `data preview`: what a run would do, need and learn from, without loading weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tunesmith.calibrate import seconds_an_epoch
from tunesmith.config import Run
from tunesmith.data.encode import Example
from tunesmith.errors import ConfigError, ModelError, OutOfMemory
from tunesmith.footprint import base_without_weights, work_of
from tunesmith.model.config import ModelConfig
from tunesmith.model.quantize import held_weights
from tunesmith.model.sight import StandIn
from tunesmith.prepare import choose_device, load_data, sizes_and_tokenizer, template_for
from tunesmith.train.memory import GIB, usable_memory
from tunesmith.train.padded import padded_bytes
from tunesmith.train.planner import Choice, Work, choose, least, plan, with_step
from tunesmith.train.steps import make_plan

REFERENCE_ROWS = 4  # of a padded micro-batch where train.micro_batch does not say


@dataclass(frozen=True)
class Ask:
    """What a plan is asked for beside the run: `rows` of `tokens` instead of data, another machine's `memory` (bytes),
    the plain formulation beside it, the time of an epoch, and every way to need less.
    """

    rows: int = 256
    tokens: int | None = None
    memory: int | None = None
    reference: bool = False
    time: bool = False
    ways: bool = False


def work_for(run: Run, ask: Ask | None = None) -> Work:
    """What the planner is given of a run. Raises what reading data and sizes raises."""
    exact = ask is None or not ask.reference
    base = base_without_weights(run.model)
    if ask is not None and ask.tokens:
        vocab = 1000 if not isinstance(base, ModelConfig) else base.vocab_size
        return work_of(run, made_up(ask.rows, ask.tokens, vocab), None, base, here=False, exact=exact)
    if isinstance(base, ModelConfig) and run.model.init != "random":
        raise ConfigError(
            f"model.path: {run.model.path} is the name of a shape, without weights or tokenizer; say how long rows are "
            "(tunesmith plan --tokens N)"
        )
    _, tokenizer = sizes_and_tokenizer(run.model)
    data = load_data(run, tokenizer, template_for(run, tokenizer))
    return work_of(run, data.train.examples, tokenizer.encode, base, here=False, exact=exact)


def made_up(rows: int, tokens: int, vocab: int) -> list[Example]:
    """Rows of that many tokens that have nothing in common, all of them targets but the first token; each has an image,
    which what looks at none does not see.
    """
    ids = np.random.default_rng(0).integers(0, vocab, (rows, tokens), dtype=np.int32)
    supervised = np.arange(tokens) > 0
    return [Example(row, supervised, "made up", picture=StandIn(str(i))) for i, row in enumerate(ids)]


def plan_run(run: Run, ask: Ask | None = None) -> dict[str, Any]:
    """Steps, tokens, trained parameters, memory by part (GiB), whether it fits; where it does not, what would."""
    ask = ask or Ask()
    work = work_for(run, replace(ask, reference=False))
    available = ask.memory or _available(work)
    try:
        choice, fits = choose(work, available), True
    except OutOfMemory as error:
        tokens = run.train.pack_tokens or least(work)
        choice, fits = Choice(tokens, run.train.recompute, plan(work, tokens), str(error)), False
    found = _about(run, work, choice) | {
        "memory_gib": _gib(choice.memory.total),
        "memory_gb": round(choice.memory.total / 1e9, 2),
        "memory_parts_gib": {part: _gib(size, 3) for part, size in choice.memory.parts.items()},
        "available_gib": _gib(available),
        "fits": fits,
    }
    if ask.ways or not fits:
        found["ways"] = ways(run, ask, available)
        found["fastest_that_fits"] = next((way["settings"] for way in found["ways"] if way["fits"]), None)
    if ask.reference:
        found["reference"] = reference(run, ask, available)
    if ask.time:
        seconds, how = seconds_an_epoch(run, work, choice)
        found |= {"seconds_per_epoch": None if seconds is None else round(seconds, 1), "time": how}
    return found


def _about(run: Run, work: Work, choice: Choice) -> dict[str, Any]:
    adapter, model = work.adapter, work.model
    steps = make_plan(
        run.train,
        len(work.examples),
        learning_rate=run.train.learning_rate or adapter.method.learning_rate,
        pack_tokens=choice.pack_tokens,
        dropout=not work.share_prefix,
        eval_steps=run.evaluate.every_steps,
    )
    return {
        "method": adapter.kind,
        "trainable_parameters": sum(p.numel() for p in adapter.trainable.values()),
        "total_parameters": sum(p.numel() for p in model.parameters() if p.is_floating_point()) + held_weights(model),
        "rows": len(work.examples),
        "tokens": sum(len(e.ids) for e in work.examples),
        "supervised_tokens": int(sum(e.supervised.sum() for e in work.examples)),
        "steps": steps.steps,
        "steps_per_epoch": steps.steps_per_epoch,
        "pack_tokens": choice.pack_tokens,
        "recompute": choice.recompute,
        "why": choice.why,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": work.device,
    }


def ways(run: Run, ask: Ask, available: int) -> list[dict[str, Any]]:
    """Settings that need less memory, the fastest first, each with what it needs and whether it fits."""
    found = []
    ask = replace(ask, reference=False)
    for changes in _changes(run, work_for(run, ask)):
        changed = _with(run, changes)
        try:
            work = work_for(replace(changed, train=replace(changed.train, memory="fixed")), ask)
        except (ConfigError, ModelError):  # no way for this model, such as blocks that do not divide its weights
            continue
        try:
            choice, fits = choose(work, available), True
        except OutOfMemory:
            tokens = run.train.pack_tokens or least(work)
            choice, fits = Choice(tokens, work.train.recompute, plan(work, tokens), ""), False
        settings = {**changes, "train.pack_tokens": choice.pack_tokens}
        found.append({"settings": settings, "memory_gib": _gib(choice.memory.total), "fits": fits})
    return found


def _changes(run: Run, work: Work) -> list[dict[str, Any]]:
    """What may be changed, in the order of what it costs in time."""
    again = [{"train.recompute": kind} for kind in ("selective", True)]
    half: list[dict[str, Any]] = [{}]
    few: list[dict[str, Any]] = [{}]
    if work.model.dtype.itemsize > 2 and not work.adapter.base:
        half.append({"model.dtype": "bfloat16"})
    if run.quant.kind == "none" and not work.adapter.base:
        few.append({"quant.kind": "nf4"})
    sparse = [{}, {"model.attention": {"pattern": "s2", "group": work.longest // 8 * 2}}]
    sparse = sparse if work.longest >= 1024 and run.model.attention is None else sparse[:1]
    combined = [a | b | c | d for d in sparse for c in few for b in half for a in ({}, *again)]
    return list(combined)


def _with(run: Run, changes: dict[str, Any]) -> Run:
    for key, value in changes.items():
        section, name = key.split(".")
        run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    return run


def reference(run: Run, ask: Ask, available: int) -> dict[str, Any]:
    """The plan of the plain padded formulation: what a trainer without packs would need for the same rows.

    Where the run leaves the dtype open it is bfloat16, of trained base weights too.
    """
    plain = replace(run, model=replace(run.model, dtype="bfloat16")) if run.model.dtype == "auto" else run
    work = work_for(plain, replace(ask, reference=True))
    rows = run.train.micro_batch or REFERENCE_ROWS
    memory, fused = (
        with_step(
            work,
            padded_bytes(
                work.model, work.adapter, work.examples, rows, recompute=bool(run.train.recompute), fused=fused
            ),
        )
        for fused in (False, True)
    )
    return {
        "micro_batch": rows,
        "tokens": work.longest,
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "memory_gib": _gib(memory.total),
        "memory_gb": round(memory.total / 1e9, 2),
        "memory_parts_gib": {part: _gib(size, 3) for part, size in memory.parts.items()},
        "fits": memory.total <= available,
        "memory_gib_with_fused_attention": _gib(fused.total),
    }


def _available(work: Work) -> int:
    try:
        return usable_memory(choose_device(work.device))
    except (ConfigError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no {work.device} here: say how much memory it has (--memory GIB)") from error


def _gib(size: int, digits: int = 2) -> float:
    return round(size / GIB, digits)


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
