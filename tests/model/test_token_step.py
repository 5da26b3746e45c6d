"""A block's native call for one new token a sequence: the block's own result, and never where an edit acts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws.small import TINY, VOCAB, build, disturb
from tests.laws.variants import VARIANTS

from tunesmith.adapters import attach, kinds
from tunesmith.config.attention import AttentionSettings
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.model import native
from tunesmith.model.cache import Cache
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import quantize
from tunesmith.model.sparse import pattern_of
from tunesmith.model.token_step import TokenStep
from tunesmith.quant.ggml import KINDS, Ggml
from tunesmith.quant.storage import Spec

pytestmark = pytest.mark.skipif(native.built()[0] is None, reason=f"NOT TESTED: {native.built()[1]}")
SMALL = replace(TINY, hidden_size=64, intermediate_size=96, head_dim=16)
CONFIGS: dict[str, ModelConfig] = {
    "llama": SMALL,
    "biases": replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk-norm": replace(SMALL, qk_norm=True),
    "window": replace(SMALL, sliding_window=4, window_layers=(1,)),
    "one head a key": replace(SMALL, num_key_value_heads=4),
}
LENGTHS = (5, 3, 9, 1, 2, 7, 4, 6)


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    yield
    native.select("auto")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every block that was given one token a sequence: did the native call do it?"""
    found: list[bool] = []
    call = TokenStep.__call__

    def counted(self: TokenStep, h: torch.Tensor, ctx: Any) -> torch.Tensor | None:
        out = call(self, h, ctx)
        if ctx.cache.single:
            found.append(out is not None)
        return out

    monkeypatch.setattr(TokenStep, "__call__", counted)
    return found


def steps(model: Llama, sequences: int = 3, kernels: str = "auto", count: int = 3, **acting: Any) -> torch.Tensor:
    """Hidden states of `count` steps after ragged prompts, (count, sequences, hidden_size)."""
    native.select(kernels)
    draw, lengths = torch.Generator().manual_seed(0), LENGTHS[:sequences]
    cache = Cache(model.config, sequences, 4, model.dtype)  # it grows meanwhile
    found = []
    with torch.no_grad():
        for each in (lengths, *[(1,) * sequences] * count):
            tokens = torch.randint(0, VOCAB, (sum(each),), generator=draw)
            ends = np.concatenate([np.arange(n, 0, -1) for n in each]) if each is lengths else None
            found.append(model(tokens, Layout.of(each, answer_ends=ends), cache=cache, **acting))
    return torch.stack(found[1:])


def assert_alike(model: Llama, tolerance: float = 1e-5, **given: Any) -> None:
    found, expected = steps(model, **given), steps(model, kernels="torch", **given)
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_the_block(config: str, sequences: int, calls: list[bool]) -> None:
    assert_alike(build(CONFIGS[config], torch.float32).eval(), sequences=sequences)
    half = len(calls) // 2
    assert calls[:half] == [True] * 3 * SMALL.num_hidden_layers and not any(calls[half:])


@pytest.mark.parametrize("config", CONFIGS)
def test_in_bfloat16_it_is_nearer_to_the_truth(config: str, calls: list[bool]) -> None:
    model = build(CONFIGS[config], torch.bfloat16).eval()
    exact = steps(copy.deepcopy(model).double())
    calls.clear()
    errors = [(steps(model, kernels=kernels).double() - exact).abs().mean() for kernels in ("auto", "torch")]
    assert errors[0] <= 1.05 * errors[1] and sum(calls) == len(calls) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [Spec("nf4", 64, False), Spec("nf4"), Spec("fp4", 32), Spec("nf3", 32), Spec("int8")],
    ids=lambda spec: f"{spec.kind}-{spec.double_quant}",
)
def test_it_reads_every_storage(spec: Spec, dtype: torch.dtype, calls: list[bool]) -> None:
    model = build(CONFIGS["biases"], dtype).eval()
    quantize(model, spec)
    assert_alike(model, 1e-5 if dtype == torch.float32 else 0.05, sequences=3)
    assert sum(calls) == len(calls) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_the_blocks_of_gguf_files(kind: str, calls: list[bool]) -> None:
    model = build(SMALL, torch.float32).eval()
    draw = torch.Generator().manual_seed(3)
    for block in model.model.layers:
        for linear in (block.self_attn.q_proj, block.mlp.up_proj, block.mlp.down_proj):
            storage = Ggml(kind, (linear.out_features, linear.in_features))
            packed = torch.randint(0, 256, (linear.weight.numel() // 32, storage.width), generator=draw)
            scales = torch.rand(len(packed), storage.head // 2, generator=draw).half() / 64
            packed = packed.to(torch.uint8)
            packed[:, : storage.head] = scales.view(torch.uint8)
            linear.hold(packed.view(linear.out_features, -1), storage)
    assert_alike(model)
    assert sum(calls) == len(calls) / 2


def cases() -> list[Any]:
    """Each method with its defaults and its variants."""
    settings = {"ia3": {}, "mixed": {"parts": [{"kind": "lora", "rank": 2}, {"kind": "bitfit"}]}}
    given = [(kind, settings.get(kind, {})) for kind in kinds()]
    given += [(kind, some) for kind, every in VARIANTS.items() for some in every]
    return [pytest.param({"kind": kind, **some}, id=f"{kind}-{number}") for number, (kind, some) in enumerate(given)]


@pytest.mark.parametrize("spec", cases())
def test_with_any_method_it_is_the_block_or_leaves_it_to_torch(spec: dict[str, Any], calls: list[bool]) -> None:
    model = build(SMALL, torch.float32).eval()
    try:
        adapter = attach(model, spec)
    except (AdapterError, ConfigError) as error:
        pytest.skip(f"not for this model: {error}")
    disturb(adapter)
    model.eval()
    assert_alike(model, 1e-4)
    assert any(calls) or spec not in ({"kind": "full"}, {"kind": "lora"})
    calls.clear()
    if not set(adapter.trainable) & {name for name, _ in model.named_parameters() if "layers" in name}:
        assert_alike(model, 1e-4, adapters=())
        assert any(calls)  # an adapter that does not act is not in the way


def test_lora_is_added_within_the_call(calls: list[bool]) -> None:
    model = build(CONFIGS["biases"], torch.float32).eval()
    disturb(attach(model, {"kind": "lora", "rank": 3, "dropout": 0.5}))
    plain = steps(model, adapters=())
    assert (steps(model.eval()) - plain).abs().max() > 1e-2
    calls.clear()
    assert_alike(model)
    assert sum(calls) == len(calls) / 2
    model.train()
    steps(model)
    assert not all(calls)  # dropout acts


def test_two_adapters_on_one_linear_go_through_the_seam(calls: list[bool]) -> None:
    model = build(SMALL, torch.float32).eval()
    for name in ("a", "b"):
        disturb(attach(model, {"kind": "lora", "rank": 2}, name=name))
    model.eval()
    for acting, taken in ((("a", "b"), False), (("a",), True), (("b",), True), (None, False), ((), True)):
        calls.clear()
        assert_alike(model, adapters=acting)
        assert any(calls) == taken


def test_what_it_was_told_is_told_again_when_it_changes(calls: list[bool]) -> None:
    """Weights written in place are seen; weights put elsewhere, held otherwise or trained further are told anew."""
    model = build(SMALL, torch.float32).eval()
    first = steps(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    assert_alike(model)
    assert not torch.allclose(steps(model), first)
    model.model.layers[1].self_attn.q_proj.weight.data = torch.randn(64, 64) / 8
    assert_alike(model)
    model.model.layers[0].input_layernorm.weight = torch.nn.Parameter(torch.rand(64))
    assert_alike(model)
    quantize(model, Spec("nf4", 32))
    assert_alike(model)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.model.layers[0].post_attention_layernorm.weight.mul_(2)
    assert_alike(again)
    assert_alike(model)
    assert sum(calls) > 0 and not torch.allclose(steps(again), steps(model))


@pytest.mark.parametrize(
    "why", ["gradients", "pattern", "nine sequences", "narrow heads", "llm-int8", "several tokens"]
)
def test_it_does_not_do_what_it_cannot(why: str, calls: list[bool]) -> None:
    model = build(TINY if why == "narrow heads" else SMALL, torch.float32).eval()
    if why == "pattern":
        model.pattern = pattern_of(AttentionSettings(pattern="local", window=2))
    if why == "llm-int8":
        quantize(model, Spec("llm-int8"))
    if why == "gradients":
        cache = Cache(model.config, 1, 9, model.dtype)
        for length in (3, 1):
            model(torch.arange(length), Layout.of([length], [-1]), cache=cache)
    elif why == "several tokens":
        cache = Cache(model.config, 2, 9, model.dtype)
        with torch.no_grad():
            for lengths in ([3, 4], [1, 2]):
                model(torch.arange(sum(lengths)), Layout.of(lengths, [-1, -1]), cache=cache)
        assert not calls
        return
    else:
        sequences = 9 if why == "nine sequences" else 2
        native.select("auto")
        cache = Cache(model.config, sequences, 9, model.dtype)
        with torch.no_grad():
            for length in (3, 1):
                layout = Layout.of([length] * sequences, [-1] * sequences)
                model(torch.arange(length * sequences) % VOCAB, layout, cache=cache)
    assert calls and not any(calls)
