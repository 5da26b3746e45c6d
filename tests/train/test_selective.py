"""Selective recomputation: gradients bit for bit those of keeping everything, less kept, no base product run twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.laws.small import TINY, build, disturb, examples, packs_of
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.adapters import attach
from tunesmith.errors import ModelError
from tunesmith.model import matmul
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.native import built, select
from tunesmith.model.quantize import quantize
from tunesmith.quant.storage import Spec
from tunesmith.train.loss import pack_loss
from tunesmith.train.simulate import step_bytes

SPECS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "lora-dropout": {"kind": "lora", "rank": 4, "dropout": 0.3},
    "dora": {"kind": "dora", "rank": 4},
    "ia3": {"kind": "ia3"},
    "bottleneck": {"kind": "bottleneck", "width": 3},
    "reft": {"kind": "reft", "rank": 2},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "llama_adapter": {"kind": "llama_adapter", "layers": 2},
    "full": {"kind": "full"},
}
CONFIGS: dict[str, ModelConfig] = {
    "llama": TINY,
    "biases": replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk-norm": replace(TINY, qk_norm=True),
}


@pytest.fixture(params=["64-torch", "32-torch", "32-native", "32-native-onednn"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    width, kernels, *onednn = request.param.split("-")
    monkeypatch.setattr(matmul, "narrow_products", lambda: bool(onednn))
    if kernels == "native" and built()[0] is None:
        pytest.skip("NOT TESTED: no C++ compiler here")
    select(kernels)
    yield {"64": torch.float64, "32": torch.float32}[width]
    select("auto")


def gradients(
    model: Llama, spec: dict[str, Any], recompute: bool | str, dropout: float = 0.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one pack."""
    adapter = attach(model, spec)
    disturb(adapter)
    model.train()
    (pack,) = packs_of(model, examples(), share=not (dropout or spec.get("dropout")))
    torch.manual_seed(5)
    ctx = model.context(pack.layout, dropout=dropout)
    loss = pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, recompute, pack.read))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in adapter.trainable.items() if p.grad is not None}


def assert_same_bits(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys() and expected[1]
    wrong = [name for name, grad in expected[1].items() if not torch.equal(found[1][name], grad)]
    assert not wrong


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_are_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    expected = gradients(build(dtype=dtype), SPECS[kind], False)
    assert_same_bits(gradients(build(dtype=dtype), SPECS[kind], "selective"), expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_so_they_are_with_biases_norms_and_dropout_of_attention(kind: str, config: str) -> None:
    expected = gradients(build(CONFIGS[config], torch.float32), SPECS[kind], False, dropout=0.2)
    assert_same_bits(gradients(build(CONFIGS[config], torch.float32), SPECS[kind], "selective", dropout=0.2), expected)


@pytest.mark.parametrize("quant", ["nf4", "int8", "llm-int8"])
def test_so_they_are_on_a_quantized_base(quant: str) -> None:
    def quantized() -> Llama:
        model = build(dtype=torch.float32)
        quantize(model, Spec(quant, block_size=8))
        return model

    assert_same_bits(gradients(quantized(), SPECS["lora"], "selective"), gradients(quantized(), SPECS["lora"], False))


class Products(TorchDispatchMode):
    """Counts products by the sizes of what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.found[tuple(args[1].shape)] += 1
        return func(*args, **(kwargs or {}))


def test_the_base_products_of_the_forward_are_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """W x of gate and up, (hidden, intermediate) as W^T: twice a block in the forward, and again under `True` alone."""
    monkeypatch.setattr(matmul, "narrow_products", lambda: False)  # what is counted is torch's own product
    shape, counts = (TINY.hidden_size, TINY.intermediate_size), {}
    for recompute in (False, True, "selective"):
        with Products() as products:
            gradients(build(dtype=torch.float32), SPECS["lora"], recompute)
        counts[recompute] = products.found[shape]
    once = 2 * TINY.num_hidden_layers
    # the backward of down_proj has a product of that shape too, in every way
    assert counts["selective"] == counts[False] == counts[True] - once


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "llama_adapter", "full"])
def test_it_keeps_less_than_nothing_recomputed_and_more_than_all(kind: str, native: bool) -> None:
    with torch.device("meta"):
        model = Llama(TINY)
    model.requires_grad_(False)
    adapter = attach(model, SPECS[kind])
    (pack,) = packs_of(model, examples(), device="meta")
    none, selective, full = (
        step_bytes(model, adapter, pack, recompute=way, native=native).kept for way in (False, "selective", True)
    )
    # behind a prefix a block without recomputation keeps q, k, v, gate, up and norms: no more than its products
    assert full < selective < (1.1 if kind == "prefix" and native else 1) * none


def test_what_is_kept_is_the_input_and_the_products_outputs() -> None:
    """A token and block: h, q, k, v, o, gate and up, and nothing of down_proj, whose product no gradient needs."""
    kept = {}
    for layers in (2, 4):
        with torch.device("meta"):
            model = Llama(replace(TINY, num_hidden_layers=layers))
        model.requires_grad_(False)
        adapter = attach(model, {"kind": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []})
        (pack,) = packs_of(model, examples(), device="meta")
        kept[layers] = step_bytes(model, adapter, pack, recompute="selective", native=False).kept
    tokens, (d, f, k) = pack.layout.tokens, (TINY.hidden_size, TINY.intermediate_size, 2 * TINY.head_dim)
    values = d + (d + 2 * k + d + 2 * f)
    assert kept[4] - kept[2] == 2 * 4 * values * tokens


def test_a_graph_may_be_gone_through_twice_and_other_words_are_refused() -> None:
    model = build(dtype=torch.float64).train()
    adapter = attach(model, SPECS["lora"])
    disturb(adapter)
    (pack,) = packs_of(model, examples())
    ctx = model.context(pack.layout)
    loss = model.run(pack.tokens, ctx, "selective").square().sum()
    trained = list(adapter.trainable.values())
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, trained), strict=True))
    with pytest.raises(ModelError, match="selective"):
        model.run(pack.tokens, ctx, "selektive")
