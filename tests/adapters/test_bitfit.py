"""BitFit: the biases of torch's own Linear, counts, and folding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tests.export.small_run import VOCAB, logits, make_base, train_like
from tests.laws.small import TINY, build, disturb, logits_of, relative, sample_row
from torch import nn

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.bitfit import BitFitSettings
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.export.merge import merge_adapter, merged_weights
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape
from tunesmith.tokenizer import load_tokenizer

BIASED = replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)


def test_it_is_the_bias_of_a_linear() -> None:
    """A base without biases and this, or the same base with those biases: one model."""
    model = build()
    adapter = attach(model, {"kind": "bitfit"})
    disturb(adapter)
    other = build(BIASED)
    other.load_state_dict(build().state_dict(), strict=False)
    own = dict(other.named_parameters())
    for place, delta in adapter.deltas.items():
        own.pop(f"{place.removesuffix('.edit')}.bias").copy_(delta.bias.detach())
    assert not [name for name in own if name.endswith("bias")], "a bias of LLaMA's own form is not trained"
    assert relative(logits_of(model, *sample_row()), logits_of(other, *sample_row())) < 1e-13


def test_on_a_base_with_biases_their_change_is_trained() -> None:
    model, moved = build(BIASED), build(BIASED)
    adapter = attach(model, {"kind": "bitfit", "target_modules": ["q_proj", "down_proj"]})
    disturb(adapter)
    for place, delta in adapter.deltas.items():
        moved.get_submodule(place.removesuffix(".edit")).bias.add_(delta.bias.detach())
    assert relative(logits_of(model, *sample_row()), logits_of(moved, *sample_row())) < 1e-13
    layer = model.model.layers[0].self_attn.q_proj
    weight, bias = layer.edit["default"].fold(layer.weight, layer.bias)
    assert torch.equal(weight, layer.weight) and torch.equal(bias, moved.model.layers[0].self_attn.q_proj.bias)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"], ["up_proj", "o_proj"]])
def test_merged_it_is_a_llama_with_biases(targets: str | list[str], tmp_path: Path) -> None:
    """transformers loads the folder with the logits of base + adapter; linears without a bias of theirs get zeros."""
    folder, tokens = make_base(tmp_path / "base"), torch.arange(5, 60) * 7 % VOCAB
    model = load_model(folder)
    adapter = train_like(model, {"kind": "bitfit", "target_modules": targets})
    live = logits(model, tokens)
    merge_adapter(model, adapter, load_tokenizer(folder), tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert peer.config.attention_bias and peer.config.mlp_bias == (targets != ["v_proj"])
    with torch.no_grad():
        theirs = peer(tokens[None]).logits[0]
    assert relative(theirs, live) < 1e-5 < relative(theirs, logits(load_model(folder), tokens))


def test_a_bias_that_the_family_cannot_have(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    model = load_model(folder)
    adapter = train_like(model, {"kind": "bitfit", "target_modules": ["lm_head"]})
    with pytest.raises(CannotMerge, match=r"lm_head.bias: bitfit adds a bias, which a llama model cannot have there"):
        merge_adapter(model, adapter, load_tokenizer(folder), tmp_path / "out")
    mistral = build(replace(TINY, model_type="mistral"))
    adapter = attach(mistral, {"kind": "bitfit", "target_modules": ["q_proj"]})
    with pytest.raises(CannotMerge, match="which a mistral model cannot have"):
        merged_weights(mistral, adapter, torch.float32)


def test_norms_get_one_too() -> None:
    model = build()
    adapter = attach(model, {"kind": "bitfit", "norms": True})
    disturb(adapter)
    norm = model.model.layers[1].input_layernorm
    x = torch.randn(3, 24, dtype=torch.float64)
    plain = nn.RMSNorm(24, eps=1e-5, dtype=torch.float64)
    plain.load_state_dict({"weight": norm.weight})
    out = norm(x, model.context(sample_row()[1]))
    assert torch.allclose(out, plain(x) + norm.edit["default"].bias, atol=1e-12)
    with pytest.raises(CannotMerge, match="no bias to fold into"):
        norm.edit["default"].fold(norm.weight, None)
    method = find_method("bitfit")
    assert method.mergeable(BitFitSettings()) and not method.mergeable(BitFitSettings(norms=True))


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 32 * 42_496), ({"norms": True}, 32 * 42_496 + 65 * 4096), ({"target_modules": ["lm_head"]}, 32_000)],
)
def test_counts_on_llama_7b(settings: dict, count: int) -> None:
    """LLaMA has no biases: these are added. 42,496 outputs a layer, 65 norms."""
    with torch.device("meta"):
        model = Llama(shape("llama-7b"))
        placed = list(find_method("bitfit").place(model, BitFitSettings(**settings)))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert sum(p.numel() for place in placed for p in place.delta.parameters()) == count


def test_a_target_that_is_none() -> None:
    with pytest.raises(AdapterError, match="did you mean 'q_proj'"):
        attach(build(), {"kind": "bitfit", "target_modules": ["q_prj"]})
