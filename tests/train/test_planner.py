"""The planner: every tensor counted once, closed forms where there are some, what is chosen when memory is short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.adapters import attach
from tunesmith.config import TrainSection
from tunesmith.data.encode import Example
from tunesmith.errors import OutOfMemory
from tunesmith.model.config import ModelConfig
from tunesmith.model.shadow import shapes_of
from tunesmith.model.shapes import shape
from tunesmith.quant.storage import Spec
from tunesmith.train.memory import GIB
from tunesmith.train.order import heaviest_batches, row_order
from tunesmith.train.padded import padded_bytes
from tunesmith.train.planner import SPARE, STEP, Work, choose, plan

SIZES = ModelConfig(
    model_type="llama", vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip


def rows(lengths: list[int], vocab: int = 500) -> list[Example]:
    drawn = np.random.default_rng(0)
    return [Example(drawn.integers(0, vocab, n, dtype=np.int32), np.arange(n) > n // 2, "row") for n in lengths]


def work(
    lengths: list[int],
    spec: dict[str, Any] | None = None,
    config: ModelConfig = SIZES,
    quant: Spec | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Work:
    model = shapes_of(config, dtype, quant)
    adapter = attach(model, spec or {"kind": "lora", "rank": 4})
    return Work(model, adapter, rows(lengths), TrainSection(**settings))


def test_parts_that_have_a_closed_form() -> None:
    found = plan(work([50] * 16), 4096).parts
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160
    assert found["weights"] == 4 * (500 * 64 + 3 * (layer + 2 * 64) + 64)  # the head is the embedding
    per_layer = 4 * (64 + 64) * 2 + 4 * (64 + 32) * 2 + 4 * (64 + 160) * 3
    assert found["adapter"] == found["gradients"] == 4 * 3 * per_layer and found["optimizer"] == 8 * 3 * per_layer
    assert all(size >= 0 for size in found.values())


def test_a_trained_base_is_counted_once() -> None:
    one = work([50] * 16, {"kind": "full"})
    found = plan(one, 256).parts
    assert (
        found["adapter"] == 0 and found["gradients"] == found["weights"] and found["optimizer"] == 2 * found["weights"]
    )
    alone = plan(one, 4096).parts  # one pack: its gradients come as its activations go
    assert alone["gradients"] < found["gradients"] and alone["activations"] > found["gradients"]


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("int8", 8.0)])
def test_quantized_linears_are_counted_as_they_are_held(kind: str, bits: float) -> None:
    big = replace(SIZES, hidden_size=256, head_dim=64, intermediate_size=512)
    dense = plan(work([50] * 16, config=big), 4096).parts["weights"]
    held = plan(work([50] * 16, config=big, quant=Spec(kind, 64)), 4096).parts["weights"]
    linears = 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert (dense - held) / linears == pytest.approx(4 - bits / 8, rel=0.02)


def test_states_of_other_optimizers() -> None:
    full = {"kind": "full"}
    big = replace(SIZES, hidden_size=256, head_dim=64, intermediate_size=512)
    works = {name: work([50], full, big, optimizer=name) for name in ("adamw", "adamw_8bit")}
    states = {name: plan(one, 4096).parts["optimizer"] for name, one in works.items()}
    linears, others = 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512), 256 * (500 + 7)  # these stay in 32 bits
    assert states["adamw"] == 8 * (linears + others)
    assert states["adamw_8bit"] == pytest.approx(2.03 * linears + 8 * others, rel=0.01)  # arXiv:2110.02861
    assert plan(work([50], full, offload="disk"), 4096).parts["optimizer"] == 0


def test_qlora_of_65b_and_its_full_fine_tuning() -> None:
    """arXiv:2305.14314: 65B fits 48 GB; full 16-bit fine-tuning takes more than 780 GB: 12 bytes a parameter."""
    lora = {"kind": "lora", "rank": 64}
    big = work([512] * 16, lora, shape("llama-65b"), Spec("nf4", 64), torch.bfloat16)
    found = plan(replace(big, device="cuda", native=False), 512, True)
    assert found.total < 48 * GIB and found.parts["weights"] + 16 * 799_539_200 == pytest.approx(47.25e9, rel=0.01)
    every = work([512] * 16, {"kind": "full"}, shape("llama-65b"), None, torch.bfloat16)
    parts = plan(replace(every, device="cuda", native=False), 512, True).parts
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 12 * 65_285_660_672 > 780e9


def test_less_memory_is_met_by_smaller_packs_and_then_by_recomputation() -> None:
    one = work([200] * 64, batch_size=64)
    most = choose(one, 100 * GIB)
    assert most.pack_tokens == 4096 and "no more speed" in most.why and most.recompute is False
    middle = plan(one, 1024).total
    found = choose(one, int(middle / SPARE) + 2)
    assert (found.pack_tokens, found.recompute) == (1024, False) and "may be used" in found.why
    assert choose(one, int(middle / SPARE) - 2).pack_tokens == 1024 - STEP
    least, selective, again = (plan(one, STEP, kind).total for kind in (False, "selective", True))
    assert again < selective < least
    assert plan(work([200] * 64, batch_size=64, recompute=True), STEP).total == again  # what `train` names
    found = choose(one, int(again / SPARE) + 2)
    assert (found.pack_tokens, found.recompute) == (STEP, True) and "train.recompute=true" in found.why
    with pytest.raises(OutOfMemory, match=r"a pack of 256 tokens .* GiB"):
        choose(one, again // 2)
    fixed = work([200] * 64, batch_size=64, memory="fixed")
    with pytest.raises(OutOfMemory, match=r"try train\.recompute=true"):
        choose(fixed, int(again / SPARE) + 2)


def test_a_pack_that_was_asked_for_is_kept_or_refused() -> None:
    asked = work([200] * 64, batch_size=64, pack_tokens=700)
    assert choose(asked, 100 * GIB).pack_tokens == 700
    with pytest.raises(OutOfMemory, match=r"train\.pack_tokens: a pack of 700 tokens"):
        choose(asked, GIB // 8)


def test_the_longest_row_bounds_the_pack_from_below() -> None:
    found = choose(work([5000, 20, 20]), 100 * GIB)
    assert found.pack_tokens == 5120 and "longest row has 5000" in found.why


def test_the_batches_that_are_counted_are_the_heaviest() -> None:
    lengths = [10] * 64
    lengths[40], lengths[7] = 500, 499
    settings = TrainSection(batch_size=8, epochs=3)
    batches = heaviest_batches(lengths, settings)
    orders = [row_order(64, settings, epoch) for epoch in range(3)]
    every = [sum(lengths[i] for i in order[at : at + 8]) for order in orders for at in range(0, 64, 8)]
    assert max(sum(lengths[i] for i in batch) for batch in batches) == max(every)
    assert any(40 in batch for batch in batches)
    assert heaviest_batches([], settings) == []


def test_the_plain_formulation_needs_more_and_fused_attention_less_of_it() -> None:
    """Eager attention keeps 6 bytes a probability in half precision: float32 of the softmax, and its cast."""
    one = work([256] * 16, dtype=torch.bfloat16)
    eager, fused = (padded_bytes(one.model, one.adapter, one.examples, 4, fused=kind) for kind in (False, True))
    probabilities, sums = 3 * 4 * 4 * 256 * 256 * 6, 3 * 4 * 256 * 4 * 4
    assert eager.kept - fused.kept == probabilities - sums
    assert fused.peak > plan(one, 1024).parts["activations"]
