"""LoRA with norms, embedding and head trained whole (LongLoRA): what trains, counts, files, tied heads, merging."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.exchange import agree, check_ours, check_theirs, our_logits, save, their_logits
from tests.laws.small import TINY, build, disturb
from tests.model.checkpoints import reference
from torch import Tensor

from tunesmith.adapters import Adapter, attach, detach, find_method
from tunesmith.adapters.lora import LoRASettings
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.config import ModelSection, Run, load_run
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.export.merge import merged_weights
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape
from tunesmith.prepare import base_of, check_precision

ONE = {"kind": "lora", "rank": 3, "target_modules": ["q_proj"]}
LONG = {**ONE, "train_norms": True, "train_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORMS = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
NORMS |= {"model.norm.weight"}


@pytest.mark.parametrize(
    ("settings", "tied", "whole"),
    [
        ({}, False, set()),
        ({"train_norms": True}, False, NORMS),
        ({"train_embeddings": True}, False, {EMBEDDING}),
        ({"train_embeddings": True}, True, {EMBEDDING}),
        ({"train_head": True}, False, {HEAD}),
        ({"train_head": True}, True, {EMBEDDING}),
        ({"train_embeddings": True, "train_head": True}, False, {EMBEDDING, HEAD}),
        ({"train_norms": True, "train_embeddings": True, "train_head": True}, True, NORMS | {EMBEDDING}),
    ],
)
def test_what_trains_whole(settings: dict, tied: bool, whole: set[str]) -> None:
    model = build(replace(TINY, tie_word_embeddings=tied))
    adapter = attach(model, {**ONE, **settings})
    assert set(adapter.base) == whole
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".edit." not in name}
    assert trained == whole
    method = find_method("lora")
    assert method.trains_base(adapter.settings) == bool(whole) and method.mergeable(adapter.settings)


def test_norms_within_attention_train_too() -> None:
    adapter = attach(build(replace(TINY, model_type="qwen3", qk_norm=True)), {**ONE, "train_norms": True})
    assert {name.split(".")[-2] for name in adapter.base} == {
        "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"
    }  # fmt: skip


def test_count() -> None:
    """LLaMA-2-7B, rank 8 on q, k, v, o as in LongLoRA: 65 norms and the embedding beside it."""
    with torch.device("meta"):
        model = Llama(shape("llama-2-7b"))
    spec = {"kind": "lora", "rank": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    adapter = attach(model, {**spec, "train_norms": True, "train_embeddings": True})
    assert sum(p.numel() for p in adapter.trainable.values()) == 8_388_608 + 65 * 4096 + 32_000 * 4096


def a_run(tmp_path: Path, **adapter) -> Run:
    config = {"model": "some-model", "data": "some-data", "adapter": {**ONE, **adapter}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return load_run(tmp_path / "run.yaml")[0]


def test_the_base_is_held_in_float32_only_where_it_trains(tmp_path: Path) -> None:
    assert base_of(a_run(tmp_path)).dtype == "auto"
    run = a_run(tmp_path, train_norms=True)
    assert base_of(run).dtype == "float32" and isinstance(base_of(run), ModelSection)
    check_precision(attach(build(dtype=torch.bfloat16), ONE))
    with pytest.raises(ConfigError, match=r"lora trains the base's own weights .*norm.weight.*bfloat16"):
        check_precision(attach(build(dtype=torch.bfloat16), {**ONE, "train_norms": True}))


def test_cannot_be_taken_off_again() -> None:
    model = build()
    with pytest.raises(AdapterError, match="changed base weights"):
        detach(model, attach(model, LONG))


OURS = {
    "norms": {"train_norms": True},
    "LongLoRA": {"train_norms": True, "train_embeddings": True, "rslora": True},
    "embedding": {"train_embeddings": True, "target_modules": "all-linear"},
    "head": {"train_head": True},
    "all": {"train_norms": True, "train_embeddings": True, "train_head": True, "lora_plus_ratio": 2.0},
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-bias"])
def test_ours_in_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    """qwen3-bias is tied and has norms within attention."""
    check_ours({**ONE, **OURS[name]}, tmp_path, family)


def keys(folder: Path) -> set[str]:
    found = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.") for key in found if "lora" not in key}


def test_keys_are_minimal(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "base")
    save(moved(attach(load_model(tmp_path / "base"), {**ONE, "train_embeddings": True})), tmp_path / "a")
    assert keys(tmp_path / "a") == {EMBEDDING}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens"] and "ensure_weight_tying" not in config


def moved(adapter: Adapter) -> Adapter:
    disturb(adapter)
    return adapter


THEIRS = {
    "norms": {"modules_to_save": ["norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "the commonest": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "by path": {"modules_to_save": ["model.embed_tokens", "layers.0.input_layernorm", "norm"]},
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here_and_back(name: str, tmp_path: Path) -> None:
    check_theirs(peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **THEIRS[name]), tmp_path)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "norm"]])
def test_theirs_tied_here_and_back(modules: list[str], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": modules, "ensure_weight_tying": True}
    check_theirs(peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options), tmp_path, "llama-tied")


def theirs(tmp_path: Path, family: str, change: float = 0.1, **options) -> Path:
    """A PEFT adapter with every trained parameter moved, and its base beside it."""
    reference(family).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **options})
    peer = peft.get_peft_model(reference(family), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * (change if "modules_to_save" in name else 0.1))
    peer.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_some_norms_only(tmp_path: Path) -> None:
    """The others are the base's: the same logits, and a file of ours then holds them all."""
    folder = theirs(tmp_path, "llama", modules_to_save=["layers.1.input_layernorm"])
    model = load_model(tmp_path / "base")
    adapter = load_adapter(folder, model)
    peer = peft.PeftModel.from_pretrained(reference("llama"), folder)
    assert agree(our_logits(model), their_logits(peer)) and len(adapter.base) == 7


TIED_FAULTS = {
    "the embedding alone": ({"modules_to_save": ["embed_tokens"]}, "trains embedding and head apart"),
    "the head alone": ({"modules_to_save": ["lm_head"]}, "trains embedding and head apart"),
    "each its own way": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "trains embedding and head apart"),
    "adapted together": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "ensure_weight_tying with an adapted embedding",
    ),
}


@pytest.mark.parametrize("name", TIED_FAULTS)
def test_what_a_tied_base_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    options, said = TIED_FAULTS[name]
    folder = theirs(tmp_path, "llama-tied", **options)
    model = load_model(tmp_path / "base")
    before = our_logits(model)
    with pytest.raises(AdapterError, match=said):
        load_adapter(folder, model)
    assert torch.equal(our_logits(model), before)


def test_two_equal_copies_of_a_tied_weight_are_one(tmp_path: Path) -> None:
    """As PEFT before it could tie them wrote what ours says: it is the same model."""
    folder = theirs(tmp_path, "llama-tied", 0.0, modules_to_save=["embed_tokens", "lm_head"])
    rewrite(folder, lambda key, t: t + 0.1 if key.endswith(("embed_tokens.weight", HEAD)) else t)
    model = load_model(tmp_path / "base")
    adapter = load_adapter(folder, model)
    assert agree(our_logits(model), their_logits(peft.PeftModel.from_pretrained(reference("llama-tied"), folder)))
    assert set(adapter.base) == {EMBEDDING} and model.lm_head.weight is model.model.embed_tokens.weight


def test_our_tied_file_says_the_same_to_a_version_that_cannot_tie(tmp_path: Path) -> None:
    """Without the key that asks for tying, PEFT loads two equal copies: equal logits."""
    reference("llama-tied").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    save(moved(attach(model, LONG)), tmp_path / "a")
    assert keys(tmp_path / "a") >= {EMBEDDING, HEAD}
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("ensure_weight_tying") is True
    path.write_text(json.dumps(config))
    assert agree(
        their_logits(peft.PeftModel.from_pretrained(reference("llama-tied"), tmp_path / "a")), our_logits(model)
    )


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    made: dict[str, Tensor | None] = {key: change(key, tensor) for key, tensor in load_file(path).items()}
    save_file({key: tensor.contiguous() for key, tensor in made.items() if tensor is not None}, path)


FAULTS = {
    "missing": (lambda k, t: None if k.endswith(EMBEDDING) else t, "embed_tokens.weight is missing"),
    "resized": (lambda k, t: t[:90] if k.endswith(EMBEDDING) else t, r"has shape \[90, 64\], expected \[96, 64\]"),
    "NaN": (lambda k, t: t * float("nan") if k.endswith("norm.weight") else t, "holds NaN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_tensor_is_named(name: str, tmp_path: Path) -> None:
    change, said = FAULTS[name]
    folder = theirs(tmp_path, "llama", modules_to_save=["embed_tokens", "norm"])
    rewrite(folder, change)
    with pytest.raises(AdapterError, match=said):
        load_adapter(folder, load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["mlp"], "modules_to_save=.*trains model.layers.0.mlp whole"),
        (["k_proj"], "modules_to_save=.*trains model.layers.0.self_attn.k_proj whole"),
        (["model"], "modules_to_save=.*trains model whole"),
        ([3], "should list module names"),
    ],
)
def test_other_modules_are_refused_by_name(value: list, said: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path, "llama")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": value}))
    with pytest.raises(AdapterError, match=said):
        load_adapter(folder, load_model(tmp_path / "base"))


def test_names_of_other_models_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As PEFT does, which lists of `wte` and `embed_tokens` are written for."""
    folder = theirs(tmp_path, "llama", modules_to_save=["wte", "embed_tokens"])
    model = load_model(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        load_adapter(folder, model)
    assert "modules_to_save: ['wte']: no such module" in caplog.text
    assert agree(our_logits(model), their_logits(peft.PeftModel.from_pretrained(reference("llama"), folder)))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_merged_it_is_a_plain_model(family: str, tmp_path: Path) -> None:
    """Trained weights as they are, deltas folded in; what was tied stays tied."""
    reference(family).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = moved(attach(model, {**LONG, "target_modules": "all-linear"}))
    tensors, _, config = merged_weights(model, adapter, torch.float32)
    assert config.tie_word_embeddings == (family == "llama-tied")
    plain = Llama(config)
    plain.load_state_dict(tensors, strict=False)
    plain.tie_weights()
    assert agree(our_logits(plain), our_logits(model))
    assert not agree(our_logits(load_model(tmp_path / "base")), our_logits(model))


def test_settings_default_to_lora_alone() -> None:
    settings = LoRASettings()
    assert not (settings.train_norms or settings.train_embeddings or settings.train_head)
