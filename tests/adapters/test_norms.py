"""Norm tuning against PEFT's LN_TUNING: logits, gradients and files; counts; what is refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.exchange import check_ours, check_parity, check_theirs
from tests.laws.small import build
from tests.model.checkpoints import reference

from tunesmith.adapters import attach, detach, find_method
from tunesmith.adapters.norms import NormsSettings
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.errors import AdapterError
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

PARITY = {
    "llama": ({}, ["input_layernorm", "post_attention_layernorm", "norm"], {}),
    "some": ({"target_modules": ["norm", "1.input_layernorm"]}, ["norm", "1.input_layernorm"], {}),
    "qwen3": ({"target_modules": ["q_norm", "norm"]}, ["q_norm", "norm"], {"kind": "Qwen3", "head_dim": 8}),
}


def their_key(name: str) -> str:
    return f"{name.removesuffix('.weight')}.ln_tuning_layers.default.weight"


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_peft(name: str) -> None:
    settings, theirs, options = PARITY[name]
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=theirs)
    check_parity({"kind": "norms", **settings}, config, their_key, **options)


OURS = {
    "all": ({}, "llama"),
    "of Qwen3": ({}, "qwen3"),
    "names": ({"target_modules": ["norm", "2.input_layernorm"]}, "llama"),
    "regex": ({"target_modules": r".*\.[02]\..*layernorm"}, "llama"),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft_and_back(name: str, tmp_path: Path) -> None:
    settings, family = OURS[name]
    check_ours({"kind": "norms", **settings}, tmp_path, family)


THEIRS = {"default": None, "names": ["norm", "ln_f"], "regex": r".*post_attention_layernorm"}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here_and_back(name: str, tmp_path: Path) -> None:
    check_theirs(peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=THEIRS[name]), tmp_path)


def test_file_is_pefts(tmp_path: Path) -> None:
    check_ours({"kind": "norms"}, tmp_path)
    keys = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert len(keys) == 7 and keys["base_model.model.model.norm.ln_tuning_layers.weight"].shape == (64,)


def test_a_file_that_tunes_more_than_norms_is_refused(tmp_path: Path) -> None:
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "embed_tokens"])
    peft.get_peft_model(reference("llama"), config).save_pretrained(tmp_path / "theirs")
    reference("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="embed_tokens.ln_tuning_layers.weight is unexpected"):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("llama-7b", {}, 65 * 4096),
        ("smollm2-135m", {}, 61 * 576),
        ("llama-7b", {"target_modules": ("norm",)}, 4096),
        ("qwen3-0.6b", {}, 57 * 1024 + 2 * 28 * 128),
    ],
)
def test_counts(name: str, settings: dict, count: int) -> None:
    with torch.device("meta"):
        model = Llama(shape(name))
    names = list(find_method("norms").unfreeze(model, NormsSettings(**settings)))
    assert sum(model.get_parameter(key).numel() for key in names) == count


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (["layernorm"], "'layernorm' names no module"),
        (["input_layernrm"], "did you mean 'input_layernorm'"),
        (".*rms", "matches no module"),
        ("(norm", "no regular expression"),
    ],
)
def test_names_that_are_none(target, said: str) -> None:
    model = build()
    with pytest.raises(AdapterError, match=said):
        attach(model, {"kind": "norms", "target_modules": target})
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_it_changes_the_base_and_says_so() -> None:
    model = build()
    adapter = attach(model, {"kind": "norms"})
    assert set(adapter.trainable) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapter.method.trains_base
    with pytest.raises(AdapterError, match="changed base weights"):
        detach(model, adapter)
