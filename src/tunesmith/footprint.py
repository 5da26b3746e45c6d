"""A run as the planner sees it: its rows, and its model and adapter on the meta device, without any weights.

work_of(run, examples, encode, path) # what `planner.plan` and `planner.choose` take
fitted(run, work, 8 * GIB)           # the run with packs (and recomputation) for which 8 GiB are enough
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith.adapters import attach
from tunesmith.config import ModelSection, Run
from tunesmith.data.catalog import CATALOG, resolve_model
from tunesmith.data.encode import Example
from tunesmith.model import allocator
from tunesmith.model.config import ModelConfig
from tunesmith.model.native import built
from tunesmith.model.quantize import spec_of
from tunesmith.model.shadow import load_shapes, shapes_of
from tunesmith.model.shapes import shape, shapes
from tunesmith.model.sparse import pattern_of
from tunesmith.prepare import base_of, check_precision, choose_device, choose_dtype
from tunesmith.scratch import check_trains_all, describe, is_random
from tunesmith.train.memo import Memo
from tunesmith.train.memory import usable_memory
from tunesmith.train.planner import Choice, Work, choose
from tunesmith.train.steps import shares_prefix


def work_of(
    run: Run,
    examples: Sequence[Example],
    encode: Callable[[str], Sequence[int]] | None,
    base: Path | ModelConfig,
    *,
    here: bool = True,
    exact: bool = True,
) -> Work:
    """What `run` does, for the planner. `base`: where the model lies, or its sizes.

    `here`: on this machine; else its device need not be there. `exact`: refuse to train half precision. Raises
    ConfigError, ModelError.
    """
    device = choose_device(run.model.device) if here else torch.device(_named(run.model.device))
    dtype, quant = _dtype((base_of(run) if exact else run.model).dtype, device), spec_of(run.quant)
    model = shapes_of(base, dtype, quant) if isinstance(base, ModelConfig) else load_shapes(base, dtype, quant)
    model.pattern = pattern_of(run.model.attention, model.config.num_key_value_heads)
    adapter = attach(model, run.adapter, seed=run.train.seed, encode=encode)
    if exact:
        check_precision(adapter)
    check_trains_all(run.model, model, adapter)
    native = run.train.kernels != "torch" and built()[0] is not None
    return Work(
        model,
        adapter,
        examples,
        run.train,
        share_prefix=shares_prefix(run.train, bool(getattr(adapter.settings, "dropout", 0.0))),
        device=device.type,
        native=native and device.type == "cpu",
        blocks=native and allocator.can_be_used(),
        memo=Memo(model, run.adapter, run.model.attention, run.quant, run.train.attention_dropout, native, device),
    )


def _named(name: str) -> str:
    return str(choose_device(name)) if name == "auto" else name


def _dtype(name: str, device: torch.device) -> torch.dtype:
    absent = device.type == "cuda" and not torch.cuda.is_available()
    return choose_dtype("bfloat16" if absent and name == "auto" else name, device)


def base_without_weights(section: ModelSection) -> Path | ModelConfig:
    """Where a run's base lies; for one to be drawn at random, and for a published shape's name, its sizes."""
    if is_random(section):
        return describe(section)[0]
    if section.path in shapes() and section.path not in CATALOG and not Path(section.path).exists():
        return shape(section.path)
    return resolve_model(section.path, revision=section.revision)


def chosen(work: Work) -> Choice:
    """What a run on this machine will use. Raises OutOfMemory."""
    return choose(work, usable_memory(work.device))


def fitted(run: Run, work: Work, available: int) -> Run:
    """The run with the packs and the recomputation that fit `available` bytes. Raises OutOfMemory."""
    choice = choose(work, available)
    return with_choice(run, choice)


def with_choice(run: Run, choice: Choice) -> Run:
    """The run with what was chosen written down, so that a rerun or a resume makes the same choice."""
    return replace(run, train=replace(run.train, pack_tokens=choice.pack_tokens, recompute=choice.recompute))
