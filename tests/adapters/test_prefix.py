"""Prefix tuning against PEFT: logits, gradients and files, with its network too; where it starts; counts; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.adapters.exchange import SIZES, agree, check_ours, check_theirs, our_logits, save, their_logits
from tests.laws.peers import padded_step, twin_models, wide_norms
from tests.laws.small import build, disturb, examples, logits_of, packs_of, relative, run_packs
from tests.model.checkpoints import reference
from torch import Tensor

from tunesmith.adapters import Adapter, attach
from tunesmith.adapters.peft_format import exported, load_adapter
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.export.counts import count
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

V, WIDTH = 4, 6
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "no grouping": ("Llama", {"num_key_value_heads": 4}),
    "wide heads": ("Llama", {"head_dim": 10}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}
CONFIG = {"task_type": "CAUSAL_LM", "num_virtual_tokens": V}


def compare(family: str, spec: dict, config: Any, put: Any, gather: Any) -> None:
    """One pack of ours equals a padded batch of theirs: logits, loss, and gradient, ours gathered as theirs lies.

    `put` gives their parameters our values, and returns them.
    """
    kind, options = FAMILIES[family]
    with wide_norms():
        ours, theirs = twin_models(getattr(tf, f"{kind}Config")(**{**SIZES, **options}), torch.float64)
        model = peft.get_peft_model(theirs, config).double()
        adapter = attach(ours, {"kind": "prefix", "virtual_tokens": V, **spec})
        disturb(adapter, std=0.3)
        with torch.no_grad():
            trained = put(model.prompt_encoder["default"], adapter)
        some = examples()
        (pack,) = packs_of(ours, some)
        loss, _ = run_packs(ours, [pack], adapter)
        logits = logits_of(ours, pack.tokens, pack.layout)
        their_rows, their_loss, their_gradient = padded_step(model, some, trained)
    for example, rows in zip(pack.examples, pack.rows, strict=True):
        assert relative(logits[torch.from_numpy(rows)], their_rows[example]) < 1e-8
    assert abs(loss - their_loss) <= 1e-10 * their_loss and their_gradient.norm() > 0
    gradient = {name: parameter.grad for name, parameter in adapter.trainable.items()}
    assert relative(torch.cat([part.flatten() for part in gather(gradient)]), their_gradient) < 1e-8


def flat(named: dict[str, Tensor]) -> Tensor:
    """(V, 2 layers kv_dim), as PEFT lays keys and values out."""
    layers = range(len(named) // 2)
    places = [f"model.layers.{layer}.self_attn.past" for layer in layers]
    return torch.cat([named[f"{place}.{part}"].flatten(1) for place in places for part in ("key", "value")], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_peft(family: str) -> None:
    def put(encoder: Any, adapter: Adapter) -> dict[str, Tensor]:
        encoder.embedding.weight.copy_(flat(adapter.trainable))
        return {"rows": encoder.embedding.weight}

    compare(family, {}, peft.PrefixTuningConfig(**CONFIG), put, lambda gradient: [flat(gradient)])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_network_learns_as_pefts_does(family: str) -> None:
    """Embedding, Linear, tanh, Linear there; a trunk and a part of the last Linear in each layer here."""
    places = [f"model.layers.{layer}.self_attn.past" for layer in range(3)]

    def gather(named: dict[str, Tensor]) -> list[Tensor]:
        first = [named[f"{places[0]}.trunk.{part}"] for part in ("rows", "down", "bias")]
        return [*first, *(torch.cat([named[f"{place}.{part}"] for place in places]) for part in ("up", "bias"))]

    def put(encoder: Any, adapter: Adapter) -> dict[str, Tensor]:
        first, last = encoder.transform[0], encoder.transform[2]
        theirs = [encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias]
        for parameter, value in zip(theirs, gather(adapter.trainable), strict=True):
            parameter.copy_(value)
        return {str(i): parameter for i, parameter in enumerate(theirs)}

    config = peft.PrefixTuningConfig(**CONFIG, prefix_projection=True, encoder_hidden_size=WIDTH)
    compare(family, {"reparam": WIDTH}, config, put, gather)


@pytest.mark.parametrize("settings", [{"virtual_tokens": 7}, {"init": "normal"}, {"init_ids": [3, 1, 4]}])
def test_ours_in_peft_and_back(settings: dict, tmp_path: Path) -> None:
    check_ours({"kind": "prefix", **settings}, tmp_path)
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    expected = (settings.get("virtual_tokens", 20), 2 * 3 * 32)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {"prompt_embeddings": expected}


@pytest.mark.parametrize("projection", [False, True])
def test_theirs_here_and_back(projection: bool, tmp_path: Path) -> None:
    """With a projection too: PEFT saves what its network made."""
    check_theirs(peft.PrefixTuningConfig(**CONFIG, prefix_projection=projection), tmp_path)


def test_a_network_is_dropped_when_saved(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, {"kind": "prefix", "virtual_tokens": V, "reparam": WIDTH})
    disturb(adapter, std=0.3)
    assert len(adapter.trainable) == 3 + 2 * 3 and len(adapter.state()) == 9, "the trunk is there once"
    save(adapter, tmp_path / "ours")
    assert list(load_file(tmp_path / "ours/adapter_model.safetensors")) == ["prompt_embeddings"]
    again = load_model(tmp_path / "base")
    plain = load_adapter(tmp_path / "ours", again)
    assert plain.settings.reparam is None and torch.equal(our_logits(again), our_logits(model))
    assert agree(their_logits(peft.PeftModel.from_pretrained(reference("llama"), tmp_path / "ours")), our_logits(model))
    assert torch.equal(exported(plain)[1]["prompt_embeddings"], exported(adapter)[1]["prompt_embeddings"])


def test_it_starts_at_what_real_tokens_leave_in_a_cache(tiny_base: Path) -> None:
    """With the tokens of a text and untrained, an example computes what transformers' does behind that text."""
    text = "is this review good or bad?"
    tokenizer, model = load_tokenizer(tiny_base), load_model(tiny_base)
    ids = tokenizer.encode(text)
    spec = {"kind": "prefix", "virtual_tokens": len(ids), "init_text": text}
    adapter = attach(model, spec, encode=tokenizer.encode)
    assert adapter.settings.init_ids == tuple(ids)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tokens = torch.arange(3, 60)
    with torch.no_grad():
        expected = theirs(torch.cat([torch.tensor(ids), tokens])[None]).logits[0, len(ids) :]
    assert agree(our_logits(model), expected)
    normal = attach(load_model(tiny_base), {"kind": "prefix", "virtual_tokens": 900, "init": "normal"})
    assert flat(normal.trainable).std().item() == pytest.approx(0.02, rel=0.02)


def test_nothing_else_sees_the_virtual_tokens() -> None:
    """What stands at their embeddings, and what the layers make of it, has no effect and no gradient."""
    model = build()
    adapter = attach(model, {"kind": "prefix", "virtual_tokens": 3})
    disturb(adapter)
    (pack,) = packs_of(model, examples())
    before = logits_of(model, pack.tokens, pack.layout)

    class Noise(torch.nn.Module):
        def forward(self, value: Tensor, host: Any, ctx: Any, given: Tensor) -> Tensor:
            return torch.cat([torch.randn_like(value[:3]), value[3:]])

    model.model.embed["noise"] = Noise()
    assert torch.allclose(logits_of(model, pack.tokens, pack.layout), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_virtual_tokens": 6}, r"prompt_embeddings has shape \[4, 192\], expected \[6, 192\]"),
        ({"num_attention_heads": 4}, "num_attention_heads='4'.*this model has 2"),
        ({"token_dim": 64}, "token_dim='64'.*this model has 32"),
        ({"num_layers": 2}, "num_layers='2'.*this model has 3"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules='2' changes what"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    check_theirs(peft.PrefixTuningConfig(**CONFIG), tmp_path)
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        ("llama-7b", {"virtual_tokens": 8}, 2_097_152),  # 2 L V kv_dim
        ("llama-3-8b", {"virtual_tokens": 8}, 2 * 32 * 8 * 1024),  # of grouped keys, only as many as there are
        # PEFT's: an embedding of kv_dim, a Linear to the hidden width, a Linear to 2 L kv_dim
        ("llama-7b", {"virtual_tokens": 8, "reparam": 512}, 8 * 4096 + 513 * 2 * 32 * 4096 + 4097 * 512),
    ],
)
def test_count(model: str, settings: dict, expected: int) -> None:
    found = count(model, "prefix", settings)
    assert found["trainable_parameters"] == expected == sum(part["parameters"] for part in found["modules"].values())
    assert found["file_bytes"] == 4 * count(model, "prefix", {"virtual_tokens": 8})["trainable_parameters"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"virtual_tokens": 0}, "virtual_tokens"),
        ({"reparam": 4, "init": "normal"}, "with reparam they start at random"),
        ({"reparam": 4, "init_text": "good"}, "with reparam they start at random"),
        ({"init_text": "good"}, "only a tokenizer makes ids of it"),
        ({"init_ids": [61]}, "should be tokens of a vocabulary of 61"),
        ({"infix_tokens": 3}, "infix_tokens"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {"kind": "prefix", **spec})
