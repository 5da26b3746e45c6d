"""The planner's arithmetic, against published counts and values counted by hand; what fits is chosen."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from tunesmith.adapters import attach
from tunesmith.errors import OutOfMemory
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.native import built, select
from tunesmith.train.memory import (
    GIB,
    LINEARS,
    SPARE,
    STEP,
    Job,
    available_memory,
    choose_pack_tokens,
    layer_bytes_per_token,
    parameter_count,
    peak_memory,
    plan,
    resident_memory,
)

SMOLLM2 = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_7B = ModelConfig(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128,
)  # fmt: skip


def test_parameters_of_published_models():
    assert parameter_count(SMOLLM2) == 134_515_008
    assert parameter_count(LLAMA_7B) == 6_738_415_616


@pytest.mark.parametrize(
    "change",
    [{"qkv_bias": True}, {"o_bias": True}, {"mlp_bias": True}, {"qk_norm": True}, {"tie_word_embeddings": False}],
)
def test_parameters_agree_with_the_model_itself(change):
    config = replace(SMOLLM2, num_hidden_layers=2, vocab_size=100, **change)
    with torch.device("meta"):
        model = Llama(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_one_layer_by_hand():
    base = Job(SMOLLM2, trainable=0, pack_tokens=700, longest=100, targets=frozenset(), rank=16)
    bare = 2 * 576 + 576 + 2 * 192 + 2 * 1536  # two norms' inputs, q, k and v, gate and up
    assert layer_bytes_per_token(base) == 2 * (bare + 9 * 100) + 4 * 2  # probabilities; scales of two norms
    assert layer_bytes_per_token(replace(base, longest=None)) == 2 * (bare + 9 * 512) + 4 * 2
    assert layer_bytes_per_token(replace(base, native=False)) == 2 * (bare + 576) + 4 * 11  # output; log-sum-exps
    q_v = replace(base, targets=frozenset({"q_proj", "v_proj"}))
    assert layer_bytes_per_token(q_v) == 2 * (bare + 9 * 100 + 576 + 2 * 16) + 4 * 2
    every = replace(base, targets=frozenset(LINEARS), activation_bytes=4)
    assert layer_bytes_per_token(every) == 4 * (bare + 9 * 100 + 3 * 576 + 1536 + 7 * 16) + 4 * 2


def kept_by_autograd(config: ModelConfig, targets, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes that the forward of the real model keeps for its backward, and its trainable parameters."""
    model = Llama(config).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.requires_grad_(False)
    attach(model, {"kind": "lora", "rank": 4, "target_modules": list(targets)})
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(torch.arange(tokens) % config.vocab_size, Layout.single(tokens))
    assert hidden.grad_fn is not None
    return sum(kept.values()), sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "down_proj"), LINEARS])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_layer_keeps_what_the_formula_says(targets, dtype, qk_norm, kernels):
    if kernels == "native" and built()[0] is None:
        pytest.skip(f"NOT TESTED: {built()[1]}")
    select(kernels)
    config = ModelConfig(
        model_type="llama", vocab_size=100, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, qk_norm=qk_norm,
    )  # fmt: skip
    tokens = 64
    try:
        two, trained_two = kept_by_autograd(config, targets, dtype, tokens)
        three, trained_three = kept_by_autograd(replace(config, num_hidden_layers=3), targets, dtype, tokens)
    finally:
        select("auto")
    job = Job(
        config,
        trained_three - trained_two,
        tokens,
        targets=frozenset(targets),
        rank=4,
        activation_bytes=dtype.itemsize,
        native=kernels == "native",
    )
    copies = job.trainable * dtype.itemsize if dtype.itemsize < 4 else 0
    assert three - two == tokens * layer_bytes_per_token(job) + copies


def test_parts_of_a_plan():
    job = Job(SMOLLM2, trainable=4_884_480, pack_tokens=2048, weight_bytes=4, supervised=0.5)
    found = plan(job)
    assert found.parts["weights"] == 4 * 134_515_008
    assert [found.parts[p] for p in ("adapter", "gradients", "optimizer")] == [
        4 * 4_884_480,
        4 * 4_884_480,
        8 * 4_884_480,
    ]
    assert found.parts["activations"] == 30 * 2048 * layer_bytes_per_token(job) + 2 * 4_884_480
    assert found.parts["logits"] == 128 * 49152 * 10 + 2 * 1024 * 576 * 2
    assert found.total == sum(found.parts.values())
    again = plan(replace(job, recompute=True))
    assert again.parts["activations"] == 2048 * (layer_bytes_per_token(job) + 30 * 576 * 2) + 2 * 4_884_480
    assert {**again.parts, "activations": 0} == {**found.parts, "activations": 0}
    half = plan(replace(job, pack_tokens=1024))
    assert 2 * (half.parts["activations"] - 2 * 4_884_480) == found.parts["activations"] - 2 * 4_884_480


def test_plan_is_printed_beside_what_was_measured():
    found = plan(Job(SMOLLM2, trainable=0, pack_tokens=2048))
    text = "\n".join(found.lines())
    assert f"planned {found.total / GIB:.2f} GiB" in text and "measured" not in text and "activations" in text
    assert f"measured {found.total / GIB:.2f} GiB (100% of it)" in found.lines(found.total)[0]


def test_the_largest_pack_that_fits_is_chosen():
    job = Job(SMOLLM2, trainable=460_800, pack_tokens=0)
    size, why = choose_pack_tokens(job, 100 * GIB, 300)
    assert size == 4096 and "no more speed" in why
    at_1024 = plan(replace(job, pack_tokens=1024, longest=300)).total
    size, why = choose_pack_tokens(job, int(at_1024 / SPARE) + 2, 300)
    assert size == 1024 and "packs of 1024 tokens" in why and "GiB" in why
    assert choose_pack_tokens(job, int(at_1024 / SPARE) - 2**20, 300)[0] == 1024 - STEP
    size, why = choose_pack_tokens(job, 100 * GIB, 5000)
    assert size == 5120 and "longest row has 5000" in why


def test_what_does_not_fit_says_how_much_is_missing_and_the_ways_out():
    job = Job(LLAMA_7B, trainable=4_194_304, pack_tokens=0, weight_bytes=4, activation_bytes=4)
    with pytest.raises(OutOfMemory) as caught:
        choose_pack_tokens(job, 8 * GIB, 512)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and "6,738M" in text and "weights 25.10" in text and "bfloat16" in text
    assert "recompute" not in text and "\n" not in text  # it would not help here
    tight = replace(job, weight_bytes=2, activation_bytes=2)
    enough = plan(replace(tight, pack_tokens=2048, longest=2048, recompute=True)).total
    with pytest.raises(OutOfMemory, match=r"train\.recompute=true"):
        choose_pack_tokens(tight, int(enough / SPARE) + 2, 2048)


def test_memory_of_this_process():
    now, peak = resident_memory()
    assert 0 < now <= peak and peak == pytest.approx(peak_memory("cpu"), rel=0.5)
    assert available_memory("cpu") > 0
    with mmap.mmap(-1, 64 * 2**20) as block:  # fresh pages: an allocator might give again what it still holds
        block.write(b"1" * 64 * 2**20)
        assert peak_memory("cpu") >= peak and resident_memory()[0] >= now + 32 * 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux's high-water mark")
def test_peak_remembers_what_was_freed():
    before = resident_memory()[0]
    block = torch.ones(128 * 2**18)
    del block
    assert resident_memory()[1] >= before + 100 * 2**20
