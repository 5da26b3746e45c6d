"""A simulated step holds the bytes that a real one does: both are counted, one on the meta device, one on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.laws.small import TINY, build, examples, packs_of

from tunesmith.adapters import attach
from tunesmith.model.llama import Llama
from tunesmith.model.native import built, select
from tunesmith.train.loss import pack_loss
from tunesmith.train.simulate import LiveBytes, StepBytes, step_bytes

SPECS: list[dict[str, Any]] = [{"kind": kind} for kind in ("lora", "llama_adapter", "prefix", "full")]


def counted(spec: dict[str, Any], recompute: bool) -> StepBytes:
    """A real step on the CPU."""
    model = build(TINY, torch.float32).train()
    adapter = attach(model, spec)
    (pack,) = packs_of(model, examples())
    trained = list(adapter.trainable.values())
    ctx = model.context(pack.layout)
    with LiveBytes() as live:
        live.ignore([*model.parameters(), *model.buffers(), pack.tokens, pack.where, pack.target, pack.weight])
        for p in trained:
            p.grad = torch.zeros_like(p)
        live.ignore([p.grad for p in trained if p.grad is not None])
        live.now = live.peak = 0
        loss = pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, recompute))
        kept = live.now
        loss.backward()
    return StepBytes(kept, live.peak)


def simulated(spec: dict[str, Any], recompute: bool, native: bool) -> StepBytes:
    with torch.device("meta"):
        model = Llama(TINY)
    model.requires_grad_(False)
    adapter = attach(model, spec)
    (pack,) = packs_of(model, examples(), device="meta")
    return step_bytes(model, adapter, pack, recompute=recompute, native=native)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["kind"])
def test_a_simulated_step_holds_what_a_real_one_does(spec: dict[str, Any], recompute: bool, kernels: str) -> None:
    if kernels == "native" and built()[0] is None:
        pytest.skip("NOT TESTED: no C++ compiler here")
    select(kernels)
    try:
        real = counted(spec, recompute)
    finally:
        select("auto")
    made = simulated(spec, recompute, kernels == "native")
    assert real.peak > real.kept > 10_000
    assert made == real


def test_a_longer_pack_and_no_recomputation_hold_more() -> None:
    lora = SPECS[0]
    assert simulated(lora, False, True).kept > 2 * simulated(lora, True, True).kept
