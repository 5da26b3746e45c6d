"""LLaMA-Adapter v1 and v2: PEFT's adaption prompts, formulas by hand, counts, starts, what cannot be exchanged."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.adaption_prompt import layer as peft_layer
from safetensors.torch import load_file, save_file
from tests.adapters.exchange import agree, check_ours, check_parity, check_theirs, move, save, their_logits
from tests.laws.small import TINY, build, disturb, logits_of, relative, sample_row
from tests.model.checkpoints import reference
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import Adapter, attach, find_method
from tunesmith.adapters.llama_adapter import LlamaAdapterSettings, adapted_layers
from tunesmith.adapters.peft_format import load_adapter, read_info
from tunesmith.errors import AdapterError, CannotExchange, CannotMerge, ConfigError
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

BIASED = replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
QWEN3 = replace(TINY, model_type="qwen3", qk_norm=True, head_dim=8)
PLACE = "model.layers.1.self_attn.mix"
KINDS = ("llama_adapter", "llama_adapter_v2")


def scalar(**settings: object) -> dict[str, object]:
    return {"kind": "llama_adapter", "gate": "scalar", **settings}


def adaption(**settings: object) -> peft.AdaptionPromptConfig:
    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **{"adapter_len": 5, "adapter_layers": 2, **settings})


def their_key(name: str) -> str:
    path, _, key = name.rpartition(".mix.")
    return f"{path}.adaption_{key}"


@pytest.fixture
def wide_softmax() -> Iterator[None]:
    """PEFT takes its softmax in float32, whatever the model's dtype: in float64 tests, it shall not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_layer, "F", SimpleNamespace(softmax=lambda x, dim, dtype: x.softmax(dim)))
        yield


PARITY = {
    "grouped": {},
    "one KV head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "mistral": {"kind": "Mistral", "sliding_window": 7},
}


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_peft(name: str, wide_softmax: None) -> None:
    check_parity(scalar(layers=2, prompt_length=5), adaption(), their_key, **PARITY[name])


@pytest.mark.parametrize("family", ["llama", "llama-all-heads", "mistral-full"])
def test_files_go_both_ways(family: str, tmp_path: Path) -> None:
    check_ours(scalar(layers=2, prompt_length=5), tmp_path / "a", family)
    check_theirs(adaption(adapter_layers=3), tmp_path / "b", family)


def test_file_is_pefts(tmp_path: Path) -> None:
    check_ours(scalar(layers=1, prompt_length=5), tmp_path)
    file = load_file(tmp_path / "ours/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.self_attn.adaption"
    assert {key: list(tensor.shape) for key, tensor in file.items()} == {
        f"{prefix}_prompt": [1, 5, 64],
        f"{prefix}_gate": [1],
    }
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (config["peft_type"], config["adapter_len"], config["adapter_layers"]) == ("ADAPTION_PROMPT", 5, 1)


FAULTS = {
    "gates of each head": ("llama", {"gate": "head"}, "one gate a layer and no gate: head"),
    "gates under tanh": ("llama", {"gate": "tanh"}, "one gate a layer and no gate: tanh"),
    "another family": ("qwen2", {}, "knows llama and mistral models, and this is a qwen2 model"),
    "a bias of o_proj": ("llama-biases", {}, "adds the bias of o_proj, which this model has, a second time"),
    "wide heads": ("llama-head-dim", {}, "for the width of a head, which is 32 in this model"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_peft_cannot_say_is_refused_and_saved_in_our_format(name: str, tmp_path: Path) -> None:
    family, settings, said = FAULTS[name]
    reference(family).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, {**scalar(layers=2), **settings})
    disturb(adapter)
    with pytest.raises(CannotExchange, match=said):
        adapter.method.to_peft(adapter)
    folder = save(adapter, tmp_path / "ours")
    assert not (folder / "adapter_config.json").exists() and not read_info(folder).peft
    fresh = load_model(tmp_path / "base")
    load_adapter(folder, fresh)
    row = torch.arange(3, 60), Layout.single(57)
    assert torch.equal(logits_of(fresh, *row), logits_of(model, *row))


@pytest.mark.parametrize("name", ["another family", "a bias of o_proj", "wide heads"])
def test_a_file_of_peft_is_refused_where_it_means_something_else(name: str, tmp_path: Path) -> None:
    check_theirs(adaption(), tmp_path)
    family, _, said = FAULTS[name]
    reference(family).save_pretrained(tmp_path / "other")
    with pytest.raises(CannotExchange, match=f"adapter_config.json: .*{said}"):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "other"))


def test_peft_really_differs_there() -> None:
    """With gates at zero PEFT is not the base where o_proj has a bias; it knows no Qwen2, and stops at wide heads."""
    base = reference("llama-biases")
    before = their_logits(base)
    peer = peft.get_peft_model(base, adaption())
    assert not agree(their_logits(peer), before)
    with pytest.raises(ValueError, match="qwen2"):
        peft.get_peft_model(reference("qwen2"), adaption())
    wide = peft.get_peft_model(reference("llama-head-dim"), adaption())
    move(wide)
    with pytest.raises(RuntimeError):
        their_logits(wide)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter_len": 6}, r"adaption_prompt has shape \[1, 5, 64\], expected \[1, 6, 64\]"),
        ({"adapter_layers": 4}, "4 of the top layers, and this model has 3"),
        ({"adapter_layers": 1}, "unexpected"),
        ({"adapter_layers": None}, "adapter_layers='None' should be a positive integer"),
        ({"target_modules": "mlp"}, "target_modules='mlp'"),
        ({"gate_kind": "tanh"}, "gate_kind="),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    check_theirs(adaption(), tmp_path)
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


def test_a_missing_gate_is_named(tmp_path: Path) -> None:
    check_theirs(adaption(), tmp_path)
    path = tmp_path / "theirs/adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.adaption_gate"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.adaption_gate is missing"):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


def by_hand(model: Llama, adapter: Adapter, value: Tensor, q: Tensor, gates: Tensor) -> Tensor:
    """y of the paper for the second layer, with torch's own attention; (heads, tokens, head_dim)."""
    host, prompt = model.model.layers[1].self_attn, adapter.deltas[PLACE].prompt
    k = functional.linear(prompt, host.k_proj.weight, host.k_proj.bias).view(-1, host.kv_heads, host.head_dim)
    v = functional.linear(prompt, host.v_proj.weight, host.v_proj.bias).view(-1, host.kv_heads, host.head_dim)
    if host.k_norm is not None:
        k = functional.rms_norm(k, (host.head_dim,), host.k_norm.weight, host.k_norm.eps)
    k, v = (t.repeat_interleave(host.heads // host.kv_heads, dim=1).transpose(0, 1) for t in (k, v))
    seen = functional.scaled_dot_product_attention(q.transpose(0, 1), k, v)
    return value.transpose(0, 1) + gates[:, None, None] * seen


@pytest.mark.parametrize("config", [TINY, BIASED, QWEN3], ids=["llama", "biases", "qwen3"])
@pytest.mark.parametrize("gate", ["head", "tanh", "scalar"])
def test_formula_by_hand(config: object, gate: str) -> None:
    model = build(config)
    adapter = attach(model, {"kind": "llama_adapter", "gate": gate, "prompt_length": 3})
    disturb(adapter, std=0.7)
    delta, host = adapter.deltas[PLACE], model.model.layers[1].self_attn
    assert delta.gate.shape == ((1,) if gate == "scalar" else (4,))
    gates = (torch.tanh(delta.gate) if gate == "tanh" else delta.gate).expand(4)
    draw = torch.Generator().manual_seed(0)
    value, q = (torch.randn(6, 4, host.head_dim, dtype=torch.float64, generator=draw) for _ in range(2))
    ctx = model.context(Layout.single(6))
    expected = by_hand(model, adapter, value, q, gates).transpose(0, 1)
    assert torch.allclose(delta(value, host, ctx, q), expected, atol=1e-13)


def test_the_prompt_passes_its_own_edits_and_no_other_adapters() -> None:
    """v2's scale acts on the prompt's values; a LoRA beside it does not."""
    model = build()
    adapter = attach(model, {"kind": "llama_adapter_v2"}, name="v2")
    disturb(adapter)
    delta, host = adapter.deltas[PLACE], model.model.layers[1].self_attn
    own = adapter.deltas["model.layers.1.self_attn.v_proj.edit"]
    value, q = torch.zeros(5, 4, 6, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64)
    ctx = model.context(Layout.single(5))
    alone = delta(value, host, ctx, q)
    other = attach(model, {"kind": "lora", "target_modules": ["k_proj", "v_proj"]}, name="other")
    disturb(other)
    assert torch.equal(delta(value, host, ctx, q), alone) and alone.any()
    with torch.no_grad():
        own.scale.mul_(2)
    assert torch.allclose(delta(value, host, ctx, q), 2 * alone, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [TINY, BIASED, QWEN3], ids=["llama", "biases", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_start_is_the_base_to_the_bit(kind: str, config: object, dtype: torch.dtype) -> None:
    """Where a linear has a bias, of the base with its seams in use: an edited linear adds it in a step of its own."""
    model = build(config, dtype)
    before = logits_of(model, *sample_row())
    attach(model, {"kind": kind, "layers": 2})
    if config is BIASED:
        off = logits_of(model, *sample_row(), adapters=())
        assert relative(off, before) < 10 * torch.finfo(dtype).eps
        before = off
    assert torch.equal(before, logits_of(model, *sample_row()))


def test_at_the_start_the_gate_has_a_gradient_and_the_prompt_has_none() -> None:
    model = build()
    adapter = attach(model, {"kind": "llama_adapter"})
    tokens, layout = sample_row()
    model(tokens, layout).square().sum().backward()
    delta = adapter.deltas[PLACE]
    assert not delta.prompt.grad.any() and delta.gate.grad.all()


def test_random_init_opens_the_gate() -> None:
    """The paper's ablation: g = 1, prompts of N(0, 1) as ever."""
    model = build()
    adapter = attach(model, {"kind": "llama_adapter", "init": "random", "prompt_length": 500})
    delta = adapter.deltas[PLACE]
    assert torch.equal(delta.gate, torch.ones(4)) and not adapter.method.identity_at_init(adapter.settings)
    assert abs(delta.prompt.std().item() - 1) < 0.02 and abs(delta.prompt.mean().item()) < 0.03
    assert relative(logits_of(model, *sample_row()), logits_of(build(), *sample_row())) > 1e-2


def test_cached_generation_is_the_full_forward() -> None:
    model = build()
    disturb(attach(model, {"kind": "llama_adapter_v2", "layers": 2}), std=0.5)
    tokens, _ = sample_row()
    full, cache = logits_of(model, tokens, Layout.single(len(tokens))), Cache(model.config, 1, 64, model.dtype)
    for piece in tokens.split([20, 1, 1, len(tokens) - 22]):
        with torch.no_grad():
            layout = Layout.single(len(piece))
            out = model.logits(model(piece, layout, cache=cache), model.context(layout))
        (end,) = cache.lengths
        assert torch.allclose(out, full[end - len(piece) : end], atol=1e-11)


COUNTS = [  # of the papers' formula; the first is what the v1 paper reports as 1.2 million
    ("llama-7b", "llama_adapter", {}, 1_229_760),
    ("llama-7b", "llama_adapter", {"gate": "tanh"}, 1_229_760),
    ("llama-7b", "llama_adapter", {"gate": "scalar"}, 1_228_830),
    ("llama-7b", "llama_adapter_v2", {}, 4_279_744),
    ("smollm2-135m", "llama_adapter", {}, 161_532),
    ("smollm2-135m", "llama_adapter", {"gate": "scalar"}, 161_308),
]


@pytest.mark.parametrize(("name", "kind", "settings", "count"), COUNTS)
def test_counts(name: str, kind: str, settings: dict, count: int) -> None:
    with torch.device("meta"):
        adapter = attach(Llama(shape(name)).requires_grad_(False), {"kind": kind, **settings})
    assert sum(p.numel() for p in adapter.trainable.values()) == count


def test_layers_are_the_top_ones() -> None:
    assert adapted_layers(shape("llama-7b"), None) == range(2, 32)
    assert adapted_layers(shape("smollm2-135m"), None) == range(2, 30)
    assert adapted_layers(TINY, None) == range(1, 2) and adapted_layers(TINY, 2) == range(2)
    assert set(attach(build(), {"kind": "llama_adapter", "layers": 1}).deltas) == {PLACE}
    with pytest.raises(AdapterError, match="3 of the top layers, and this model has 2"):
        attach(build(), {"kind": "llama_adapter", "layers": 3})


def test_bytes_of_a_file(tmp_path: Path) -> None:
    """Four a parameter behind the header; LLaMA-7B's 1,229,760 parameters so make 4.92 MB."""
    model = build(dtype=torch.float32)
    adapter = attach(model, {"kind": "llama_adapter", "layers": 2})
    with torch.no_grad():
        adapter.deltas[PLACE].gate.add_(1)
    data = (save(adapter, tmp_path / "a") / "adapter.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - header == 4 * 2 * (10 * 24 + 4)
    assert round(4 * 30 * (10 * 4096 + 32) / 1e6, 2) == 4.92


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"init": "random", "gate": "tanh"}, "which tanh never reaches"),
        ({"prompt_length": 0}, "prompt_length"),
        ({"gate": "layer"}, "gate"),
        ({"layer": 3}, "did you mean 'layers'"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_cannot_be_meant(kind: str, spec: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach(build(), {"kind": kind, **spec})


def test_it_says_why_it_cannot_be_merged() -> None:
    model = build()
    for kind in KINDS:
        adapter = attach(model, {"kind": kind}, name=kind)
        assert not adapter.method.mergeable(adapter.settings)
        with pytest.raises(CannotMerge, match="an attention of its own"):
            adapter.deltas[PLACE].fold(torch.zeros(2, 2), None)


def test_v2_scales_and_shifts_every_linear_with_its_bias() -> None:
    """y = s (W x + b0 + b): a torch Linear with W' = diag(s) W and b' = s (b0 + b), which is what it folds into."""
    for config in (TINY, BIASED):
        model = build(config)
        adapter = attach(model, {"kind": "llama_adapter_v2"})
        disturb(adapter)
        ctx = model.context(sample_row()[1])
        for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"):
            linear, delta = model.get_submodule(path), adapter.deltas[f"{path}.edit"]
            x = torch.randn(5, linear.in_features, dtype=torch.float64)
            plain = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
            plain.load_state_dict(
                {"weight": linear.weight, "bias": torch.zeros_like(delta.bias) if linear.bias is None else linear.bias}
            )
            expected = delta.scale * (plain(x) + delta.bias)
            assert torch.allclose(linear(x, ctx), expected, atol=1e-13)
            weight, bias = delta.fold(linear.weight, linear.bias)
            assert torch.allclose(functional.linear(x, weight, bias), expected, atol=1e-13)


def test_v2_trains_what_the_paper_says() -> None:
    model = build()
    adapter = attach(model, {"kind": "llama_adapter_v2"})
    assert set(adapter.base) == {name for name, _ in build().named_parameters() if name.endswith("norm.weight")}
    edited = {place.removesuffix(".edit") for place in adapter.deltas if place.endswith(".edit")}
    layers = [f"model.layers.{i}.{m}" for i in (0, 1) for m in LINEARS]
    assert edited == {"lm_head", *layers} and adapter.method.trains_base
    trained = sum(p.numel() for p in adapter.trainable.values())
    assert trained == 10 * 24 + 4 + 5 * 24 + 2 * (2 * (24 + 12 + 12 + 24 + 40 + 40 + 24) + 61)


LINEARS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def test_v2_saved_and_loaded(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    adapter = attach(model, {"kind": "llama_adapter_v2", "gate": "scalar"})
    disturb(adapter)
    folder = save(adapter, tmp_path / "a")
    assert not (folder / "adapter_config.json").exists()
    fresh = build(dtype=torch.float32)
    load_adapter(folder, fresh)
    assert torch.equal(logits_of(fresh, *sample_row()), logits_of(model, *sample_row()))


def test_defaults_are_the_papers() -> None:
    for kind in KINDS:
        settings = find_method(kind).settings()
        assert isinstance(settings, LlamaAdapterSettings)
        assert (settings.layers, settings.prompt_length, settings.gate, settings.init) == (None, 10, "head", "zero")
