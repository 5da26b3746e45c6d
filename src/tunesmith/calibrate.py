"""How long an epoch will take here, from the time of one and of two blocks of the model's own sizes.

    seconds a token = t(1 block) + (blocks - 1) (t(2 blocks) - t(1 block)),   t: forward and backward of a real pack

Random weights of those sizes, with the run's method, storage, dtype and recomputation. What a run does beside its
steps (loading, measuring, checkpoints, verification) is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from tunesmith.adapters import Adapter, attach
from tunesmith.config import Run
from tunesmith.data.pack import plan_packs
from tunesmith.errors import TunesmithError
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import quantize, spec_of
from tunesmith.train.loss import pack_loss
from tunesmith.train.memory import available_memory, block_weights
from tunesmith.train.order import row_order
from tunesmith.train.planner import Choice, Work

SHARE = 0.25  # of the memory at hand that two blocks and the embedding may take
REPEATS = 3


def seconds_an_epoch(run: Run, work: Work, choice: Choice) -> tuple[float | None, str]:
    """Seconds of an epoch's steps on this machine, and a line that says how it is known, or why it is not."""
    config, dtype = work.model.config, work.model.dtype
    size = 2 * block_weights(config) // config.num_hidden_layers + config.vocab_size * config.hidden_size
    if size * (4 + dtype.itemsize) > SHARE * available_memory(work.device):
        return None, f"time: not measured, since two blocks of this model have {size / 1e9:.1f} billion parameters"
    packs = _packs(work, choice)
    tokens = sum(pack[1] for pack in packs)
    if not packs:
        return None, "time: not measured, since there are no rows"
    rows, typical = sorted(packs, key=lambda pack: pack[1])[len(packs) // 2]
    try:
        one, two = (_time(run, work, choice, rows, blocks) for blocks in (1, 2))
    except TunesmithError as error:
        return None, f"time: not measured: {error}"
    a_pack = one + (config.num_hidden_layers - 1) * max(two - one, 0.0)
    return a_pack * tokens / typical, f"time: from one and two blocks with a pack of {typical} tokens"


def _packs(work: Work, choice: Choice) -> list[tuple[list[int], int]]:
    """The packs of the first epoch: their rows, and their tokens."""
    settings, found = work.train, []
    order = row_order(len(work.examples), settings, 0).tolist()
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        for pack in _pack(work, choice, rows, "meta"):
            found.append(([rows[i] for i in pack.examples], pack.layout.tokens))
    return found


def _pack(work: Work, choice: Choice, rows: Sequence[int], device: str | torch.device) -> list:
    return plan_packs(
        [work.examples[i] for i in rows],
        budget=choice.pack_tokens,
        max_rows=work.train.micro_batch,
        share=work.share_prefix,
        device=device,
        needs=work.model.needs(),
    )


def _time(run: Run, work: Work, choice: Choice, rows: Sequence[int], blocks: int) -> float:
    """Seconds of forward and backward of one pack through that many blocks. Raises AdapterError."""
    model = Llama(replace(work.model.config, num_hidden_layers=blocks)).to(work.model.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.04, 0.04)
    model.requires_grad_(False).to(work.device)
    spec = spec_of(run.quant)
    if spec is not None and spec.kind != "keep":
        quantize(model, spec)
    model.pattern = work.model.pattern
    adapter: Adapter = attach(model, run.adapter)
    (pack,) = _pack(work, choice, rows, work.device)
    model.train()
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        ctx = model.context(pack.layout, dropout=work.train.attention_dropout)
        pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, choice.recompute, pack.read)).backward()
        for parameter in adapter.trainable.values():
            parameter.grad = None
        if work.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])
