"""DoRA against its formula and PEFT's: the magnitude, what is held constant, files both ways, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.exchange import agree, check_merged, check_ours, check_theirs, our_logits, save, their_logits
from tests.laws.small import TINY, build, disturb, logits_of, relative, sample_row
from tests.model.checkpoints import reference

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.dora import DoRASettings
from tunesmith.adapters.peft_format import load_adapter, read_info
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

PATH = "model.layers.0.mlp.down_proj"
PLACE = f"{PATH}.edit"
ONE = {"kind": "dora", "rank": 3, "alpha": 5, "target_modules": ["down_proj"]}


def test_formula() -> None:
    """y = diag(m / ||V||) V x with V = W + s B A, the norm over each row: equation 5 of the paper."""
    model = build()
    adapter = attach(model, ONE)
    disturb(adapter)
    delta, linear = adapter.deltas[PLACE], model.get_submodule(PATH)
    x = torch.randn(4, 40, dtype=torch.float64)
    v = linear.weight + 5 / 3 * delta.B @ delta.A
    rows = torch.stack([m * row / row.pow(2).sum().sqrt() for m, row in zip(delta.magnitude, v, strict=True)])
    assert torch.allclose(linear(x, model.context(sample_row()[1])), x @ rows.T, atol=1e-13)
    assert torch.allclose(delta.fold(linear.weight, None)[0], rows, atol=1e-14)


def test_magnitude_starts_as_the_norm_of_each_row() -> None:
    model = build()
    delta = attach(model, ONE).deltas[PLACE]
    assert torch.allclose(delta.magnitude, model.get_submodule(PATH).weight.pow(2).sum(1).sqrt(), atol=1e-14)
    assert not delta.B.any() and delta.A.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_base_to_the_bit_on_any_base(dtype: torch.dtype) -> None:
    """Rows of zeros included, which have no direction."""
    model = build(replace(TINY, tie_word_embeddings=False), dtype)
    with torch.no_grad():
        model.lm_head.weight[5] = 0
        model.get_submodule(PATH).weight[3] = 0
    before = logits_of(model, *sample_row())
    adapter = attach(model, {"kind": "dora", "target_modules": "(lm_head|.*_proj)"})
    assert {p.dtype for p in adapter.trainable.values()} == {torch.float32}
    assert torch.equal(logits_of(model, *sample_row()), before)
    disturb(adapter)
    assert logits_of(model, *sample_row()).isfinite().all()


def test_a_small_change_of_magnitude_is_not_rounded_away_in_bfloat16() -> None:
    """1 + 2^-10 is 1 in bfloat16, the change that it makes of a value is not."""
    model = build(dtype=torch.bfloat16)
    delta = attach(model, ONE).deltas[PLACE]
    with torch.no_grad():
        delta.magnitude.mul_(1 + 2**-10)
    x, y = torch.ones(1, 40, dtype=torch.bfloat16), torch.full((1, 24), 255.0, dtype=torch.bfloat16)
    excess = delta.magnitude / delta.norms(model.get_submodule(PATH).weight) - 1
    assert torch.allclose(excess, torch.full_like(excess, 2**-10), rtol=1e-2)
    assert torch.equal(y * (1 + excess).to(torch.bfloat16), y), "the plain product would have lost it"
    with torch.no_grad():
        moved = delta(y.float(), model.get_submodule(PATH), None, x.float())
    assert torch.allclose(moved, y.float() * (1 + 2**-10), rtol=1e-6)


def test_the_norm_is_held_constant() -> None:
    """Its gradient in A and B is that of c (W + s B A) x with c fixed, and not the whole one."""
    model = build()
    adapter = attach(model, ONE)
    disturb(adapter)
    delta, linear = adapter.deltas[PLACE], model.get_submodule(PATH)
    x = torch.randn(4, 40, dtype=torch.float64)
    weights = torch.randn(4, 24, dtype=torch.float64)

    def gradients(norm: torch.Tensor) -> torch.Tensor:
        v = linear.weight + 5 / 3 * delta.B @ delta.A
        y = x @ (delta.magnitude / norm(v))[:, None].mul(v).T
        return torch.cat([g.flatten() for g in torch.autograd.grad((y * weights).sum(), list(delta.parameters()))])

    ours = (linear(x, model.context(sample_row()[1])) * weights).sum()
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(ours, list(delta.parameters()))])
    assert relative(ours, gradients(lambda v: v.detach().norm(dim=1))) < 1e-12
    assert relative(ours, gradients(lambda v: v.norm(dim=1))) > 1e-3


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    model = build(dtype=torch.float32).train()
    adapter = attach(model, {**ONE, "dropout": 0.5})
    delta, linear = adapter.deltas[PLACE], model.get_submodule(PATH)
    x, ctx = torch.randn(6, 40), model.context(sample_row()[1])
    plain = linear(x, model.context(sample_row()[1], adapters=()))
    assert torch.equal(linear(x, ctx), plain), "B is 0: dropout has nothing to act on"
    disturb(adapter)
    assert not torch.equal(linear(x, ctx), linear(x, ctx))
    assert torch.equal(delta.eval()(plain, linear, ctx, x), delta(plain, linear, ctx, x))


OURS = {
    "all-linear": {},
    "list": {"target_modules": ["q_proj", "self_attn.v_proj"], "dropout": 0.1},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|down)_proj"},
    "patterns": {"alpha": 5, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 3}, "rslora": True},
    "layers": {"layers_to_transform": [0, 2], "init": "gaussian"},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "norms": {"target_modules": ["o_proj"], "train_norms": True},
}
THEIRS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    "head": {"target_modules": ["lm_head"]},
    "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("family", ["llama", "llama-biases"])
def test_ours_in_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    check_ours({"kind": "dora", "rank": 4, **OURS[name]}, tmp_path, family)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["use_dora"] is True


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_here_and_back(name: str, tmp_path: Path) -> None:
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, use_dora=True, **THEIRS[name])
    check_theirs(options, tmp_path)
    assert read_info(tmp_path / "theirs").kind == "dora"


@pytest.mark.parametrize("use_dora", [True, False])
def test_the_file_says_which_of_the_two_it_is(use_dora: bool, tmp_path: Path) -> None:
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=use_dora)
    peft.get_peft_model(reference("llama"), options).save_pretrained(tmp_path)
    assert read_info(tmp_path).kind == ("dora" if use_dora else "lora")


def test_merged_as_peft_merges(tmp_path: Path) -> None:
    check_merged(peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"), 21, tmp_path)


def saved(tmp_path: Path, **settings) -> Path:
    """A DoRA of ours, disturbed and saved, and its base beside it."""
    reference("llama").save_pretrained(tmp_path / "base")
    adapter = attach(load_model(tmp_path / "base"), {**ONE, **settings})
    disturb(adapter)
    return save(adapter, tmp_path / "a")


def test_the_magnitude_counts(tmp_path: Path) -> None:
    """Read without its magnitudes, as a plain LoRA, the file would compute something else: PEFT agrees with ours."""
    folder = saved(tmp_path)
    model = load_model(tmp_path / "base")
    load_adapter(folder, model)
    peer = peft.PeftModel.from_pretrained(reference("llama"), folder)
    assert agree(their_logits(peer), our_logits(model))
    for name, p in peer.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1.1)
    assert not agree(their_logits(peer), our_logits(model))


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"use_dora": False}, {}, "use_dora"),
        ({}, {"drop": "lora_magnitude_vector"}, "lora_magnitude_vector is missing"),
        ({}, {"cut": "lora_magnitude_vector"}, r"has shape \[63\], expected \[64\]"),
        ({"target_modules": ["embed_tokens"]}, {}, "embed_tokens is not supported"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights="),
    ],
)
def test_files_that_are_refused(config: dict, tensors: dict, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    if not config.get("use_dora", True):
        (folder / "tunesmith.json").unlink()  # or it says that this is a DoRA
        said = "lora_magnitude_vector is unexpected"
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    file, weights = folder / "adapter_model.safetensors", load_file(folder / "adapter_model.safetensors")
    for act, end in tensors.items():
        key = next(key for key in weights if key.endswith(end))
        weights = {k: v for k, v in weights.items() if k != key} | (
            {key: weights[key][:-1].clone()} if act == "cut" else {}
        )
    save_file(weights, file)
    model = load_model(tmp_path / "base")
    with pytest.raises(AdapterError, match=said):
        load_adapter(folder, model)
    assert not [key for key in model.state_dict() if "edit" in key]


def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(AdapterError, match="use_dora=False, but it is saved as a DoRA"):
        load_adapter(folder, load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"target_modules": ["embed_tokens"]}, "no form for embed_tokens"),
        ({"init": "pissa"}, "init"),
        ({"target_modules": ["lm_head"], "train_head": True}, "trained whole"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {**ONE, **spec})


def test_count() -> None:
    """LoRA's, and one magnitude an output: 32 layers of 4 x 4096 + 2 x 11008 + 4096 in LLaMA-7B."""
    method = find_method("dora")
    with torch.device("meta"):
        placements = list(method.place(Llama(shape("llama-7b")), DoRASettings(rank=64)))
    count = sum(p.numel() for placed in placements for p in placed.delta.parameters())
    assert count == 159_907_840 + 32 * (5 * 4096 + 2 * 11008)
