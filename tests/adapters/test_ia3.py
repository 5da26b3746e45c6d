"""IA3 against PEFT's: logits, gradients and files; its formula with biases; its count; settings that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.exchange import check_ours, check_parity, check_theirs
from tests.laws.small import TINY, build, disturb, logits_of, sample_row
from tests.model.checkpoints import reference
from torch import nn

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.ia3 import IA3Settings, InputScale, OutputScale
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.errors import AdapterError
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

BIASED = replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
PARITY = {
    "llama": ({}, {}),
    "mistral": ({}, {"kind": "Mistral", "sliding_window": 7}),
    "biases": ({}, {"attention_bias": True, "mlp_bias": True}),
    "others": ({"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}, {}),
    "outputs only": ({"target_modules": ["o_proj", "gate_proj"], "feedforward_modules": []}, {}),
}


def their_key(name: str) -> str:
    return f"{name.rsplit('.', 2)[0]}.ia3_l.default"


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_peft(name: str) -> None:
    settings, options = PARITY[name]
    check_parity({"kind": "ia3", **settings}, peft.IA3Config(task_type="CAUSAL_LM", **settings), their_key, **options)


OURS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|down)_proj"},
    "regex and name": {"target_modules": r"model\.layers\.1\..*(q|down)_proj", "feedforward_modules": ["down_proj"]},
    "some of one name": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["0.mlp.down_proj"]},
    "outputs only": {"target_modules": ["down_proj"], "feedforward_modules": []},
    "head": {"target_modules": ["k_proj", "lm_head"]},
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft_and_back(name: str, tmp_path: Path) -> None:
    check_ours({"kind": "ia3", **OURS[name]}, tmp_path, "llama-biases")


THEIRS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": ["down_proj", "up_proj"]},
    "regex": {"target_modules": r".*\.(q|down)_proj", "feedforward_modules": r".*\.1\.mlp\.down_proj"},
    "an end that is no name": {"target_modules": ["k_proj", "down_proj", "proj"], "feedforward_modules": ["proj"]},
    "names of other models too": {"target_modules": ["k_proj", "w2"], "feedforward_modules": []},
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here_and_back(name: str, tmp_path: Path) -> None:
    check_theirs(peft.IA3Config(task_type="CAUSAL_LM", **THEIRS[name]), tmp_path, "llama-biases")


def test_file_is_pefts(tmp_path: Path) -> None:
    check_ours({"kind": "ia3"}, tmp_path)
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "ours/adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.2"
    assert shapes[f"{prefix}.self_attn.k_proj.ia3_l"] == [32, 1] and shapes[f"{prefix}.mlp.down_proj.ia3_l"] == [1, 96]
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["peft_type"] == "IA3" and config["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feedforward_modules": ["k_proj", "down_proj"]}, r"k_proj.ia3_l has shape \[32, 1\], expected \[1, 64\]"),
        ({"feedforward_modules": "(.*)*x"}, "could take for ever"),
        ({"feedforward_modules": None}, "feedforward_modules='None' should list"),
        ({"target_modules": ["k_proj"]}, "unexpected"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules="),
    ],
)
def test_a_file_that_says_something_else_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    check_theirs(peft.IA3Config(task_type="CAUSAL_LM"), tmp_path)
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


def test_a_missing_vector_is_named(tmp_path: Path) -> None:
    check_theirs(peft.IA3Config(task_type="CAUSAL_LM"), tmp_path)
    path = tmp_path / "theirs/adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"layers.1.mlp.down_proj.ia3_l is missing"):
        load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))


def test_formula_takes_the_bias_with_it() -> None:
    """l * (W x + b) at an output, W (l * x) + b at an input, as torch.nn.Linear computes them."""
    model = build(BIASED)
    disturb(attach(model, {"kind": "ia3"}))
    ctx = model.context(sample_row()[1])
    block = model.model.layers[0]
    for linear, seam in ((block.self_attn.k_proj, "edit"), (block.mlp.down_proj, "input")):
        x = torch.randn(5, linear.in_features, dtype=torch.float64)
        scale = getattr(linear, seam)["default"].scale
        plain = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
        plain.load_state_dict({"weight": linear.weight, "bias": linear.bias})
        expected = plain(x) * scale if seam == "edit" else plain(x * scale)
        assert torch.allclose(linear(x, ctx), expected, atol=1e-13) and not torch.allclose(expected, plain(x))
        weight, bias = getattr(linear, seam)["default"].fold(linear.weight, linear.bias)
        assert torch.allclose(nn.functional.linear(x, weight, bias), expected, atol=1e-13)


def test_a_biased_base_stays_as_it_was_at_the_start() -> None:
    model = build(BIASED, torch.float32)
    before = logits_of(model, *sample_row())
    attach(model, {"kind": "ia3", "target_modules": "all-linear"})
    assert torch.equal(before, logits_of(model, *sample_row()))


@pytest.mark.parametrize("make", [OutputScale, InputScale])
def test_a_small_step_is_not_lost_in_bfloat16(make: type) -> None:
    """1 + 0.001 is 1 in bfloat16; the product keeps it where it can."""
    delta, host = make(4), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        delta.scale.add_(0.002)
        value = torch.full((3, 4), 1.99, dtype=torch.bfloat16)
        assert not torch.equal(delta(value, host, None, None), value)
        assert torch.equal(value * delta.scale.to(value.dtype), value)


@pytest.mark.parametrize(("name", "count"), [("llama-7b", 614_400), ("smollm2-135m", 30 * (2 * 192 + 1536))])
def test_count(name: str, count: int) -> None:
    """2 kv_dim + intermediate_size a layer; PEFT prints 614,400 for LLaMA-7B."""
    with torch.device("meta"):
        placed = list(find_method("ia3").place(Llama(shape(name)), IA3Settings()))
    assert sum(p.numel() for place in placed for p in place.delta.parameters()) == count


def test_count_is_pefts() -> None:
    model = peft.get_peft_model(reference("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 3 * (2 * 32 + 96)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
            "feedforward_modules: 'down_proj' names no module.*; the targets are k_proj",
        ),
        ({"target_modules": ["k_prj"]}, "did you mean 'k_proj'"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        attach(build(), {"kind": "ia3", **spec})
