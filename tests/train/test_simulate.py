"""A simulated step holds the bytes that a real one does: both are counted, one on the meta device, one on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.laws.small import TINY, build, examples, packs_of

from tunesmith.adapters import attach
from tunesmith.model.llama import Llama
from tunesmith.model.native import built, select
from tunesmith.train.loss import pack_loss
from tunesmith.train.simulate import StepBytes, alike, counting, from_few_blocks, step_bytes

SPECS: list[dict[str, Any]] = [{"kind": kind} for kind in ("lora", "llama_adapter", "prefix", "full")]
DROPS = {"kind": "lora", "dropout": 0.3}


def counted(spec: dict[str, Any], recompute: bool, first: bool = False) -> StepBytes:
    """A real step on the CPU."""
    model = build(TINY, torch.float32).train()
    adapter = attach(model, spec)
    (pack,) = packs_of(model, examples())
    ctx = model.context(pack.layout)
    with counting(model, adapter, pack, first) as count:
        hidden = model.run(pack.tokens, ctx, recompute, pack.read)
        count.forward()
        loss = pack_loss(model, pack, ctx, hidden)
        del hidden
        count.loss()
        loss.backward()
    return count.found


def simulated(spec: dict[str, Any], recompute: bool, native: bool, first: bool = False) -> StepBytes:
    with torch.device("meta"):
        model = Llama(TINY)
    model.requires_grad_(False)
    adapter = attach(model, spec)
    (pack,) = packs_of(model, examples(), device="meta")
    return step_bytes(model, adapter, pack, recompute=recompute, native=native, first=first)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", [*SPECS, DROPS], ids=lambda spec: "-".join(map(str, spec.values())))
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


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_come_in_the_first_backward(recompute: bool) -> None:
    """Those of the whole model: at its end they are there, and at the peak less than beside all activations."""
    full = {"kind": "full"}
    real, made = counted(full, recompute, first=True), simulated(full, recompute, True, first=True)
    assert made == real and made.first
    later = simulated(full, recompute, True)
    with torch.device("meta"):
        model = Llama(TINY)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert made.end >= size > later.end
    assert made.peak < later.peak + size


def test_dropout_holds_no_more_than_its_seeds() -> None:
    """And while it multiplies, no more than one input, its mask and the numbers that these are drawn from."""
    without, with_it = (counted(spec, False) for spec in (SPECS[0], DROPS))
    assert 0 <= with_it.kept - without.kept <= 8 * 7 * TINY.num_hidden_layers
    assert with_it.peak < 1.05 * without.peak


def test_a_longer_pack_and_no_recomputation_hold_more() -> None:
    lora = SPECS[0]
    assert simulated(lora, False, True).kept > 2 * simulated(lora, True, True).kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["lora", "prefix", "full", "bottleneck", "reft", "llama_adapter"])
def test_few_blocks_tell_what_all_hold(kind: str, recompute: bool) -> None:
    with torch.device("meta"):
        model = Llama(replace(TINY, num_hidden_layers=9))
    model.requires_grad_(False)
    adapter = attach(model, {"kind": kind})
    (pack,) = packs_of(model, examples(), device="meta")
    step_bytes(model, adapter, pack, recompute=recompute)  # the layout's tiles are made once
    whole = step_bytes(model, adapter, pack, recompute=recompute)
    assert from_few_blocks(model, lambda: step_bytes(model, adapter, pack, recompute=recompute)) == whole
    assert len(model.model.layers) == 9


@pytest.mark.parametrize("blocks", [9, 60])
@pytest.mark.parametrize("recompute", [False, True])
def test_few_blocks_tell_how_gradients_grow(recompute: bool, blocks: int) -> None:
    with torch.device("meta"):
        model = Llama(replace(TINY, num_hidden_layers=blocks))
    model.requires_grad_(False)
    adapter = attach(model, {"kind": "full"})
    (pack,) = packs_of(model, examples(), device="meta")
    count = partial(step_bytes, model, adapter, pack, recompute=recompute, first=True)
    count()
    whole, told = count(), from_few_blocks(model, count)
    assert (told.kept, told.loss, told.end) == (whole.kept, whole.loss, whole.end)
    assert told.peak == pytest.approx(whole.peak, rel=0.02)


def test_a_peak_told_by_few_blocks_is_not_below_what_the_forward_keeps() -> None:
    """With few blocks the peak may be at another moment, such as a wide embedding's gradient, and grow otherwise."""
    with torch.device("meta"):
        model = Llama(replace(TINY, num_hidden_layers=40))

    def count() -> StepBytes:
        blocks = len(model.model.layers)
        return StepBytes(kept=26 * blocks, loss=26 * blocks + 5, peak=200 + 14 * blocks, end=14 * blocks)

    assert from_few_blocks(model, count).peak == 26 * 40 + 5


def test_blocks_that_differ_are_all_counted() -> None:
    with torch.device("meta"):
        model = Llama(replace(TINY, num_hidden_layers=9))
    model.requires_grad_(False)
    assert alike(model)
    attach(model, {"kind": "last_layers", "layers": 2})
    assert not alike(model)
