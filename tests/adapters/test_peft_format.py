"""Adapter folders: what PEFT writes computes the same here, and what we write there; faults are named.

PEFT and transformers are the independent reference; logits agree to 1e-5 of the largest, tensors bit for bit.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.checkpoints import reference

from tunesmith.adapters import attach
from tunesmith.adapters.peft_format import check_base, load_adapter, read_info, save_adapter
from tunesmith.errors import AdapterError
from tunesmith.files import atomic_folder
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_model, model_identity

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(3, 60)
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small random LLaMA, written by transformers."""
    folder = tmp_path_factory.mktemp("base")
    reference("llama").save_pretrained(folder)
    return folder


def ours(model) -> torch.Tensor:
    layout = Layout.single(len(TOKENS))
    with torch.no_grad():
        ctx = model.context(layout)
        return model.logits(model.run(TOKENS, ctx), ctx)


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0]


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def disturb(parameters) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=draw) * 0.05)


def trained(base: Path, folder: Path, **settings) -> torch.Tensor:
    """Save a disturbed adapter into `folder`; returns the live logits."""
    model = load_model(base)
    adapter = attach(model, {"kind": "lora", "rank": 4, **settings})
    disturb(adapter.trainable.values())
    with atomic_folder(folder) as target:
        save_adapter(target, adapter, base=str(base), identity=model_identity(base), notes={"data sha256": "abc"})
    return ours(model)


def from_peft(folder: Path, **settings) -> tuple[torch.Tensor, peft.PeftModel]:
    """Save a PEFT adapter into `folder`; returns its logits and the model."""
    model = peft.get_peft_model(
        reference("llama"), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    )
    disturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return theirs(model), model


OURS = {
    "all-linear": {},
    "list": {"target_modules": ["q_proj", "self_attn.v_proj"], "dropout": 0.1},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|down)_proj"},
    "regex and layers": {"target_modules": r".*self_attn.*", "layers_to_transform": [1]},
    "layers": {"layers_to_transform": [0, 2]},
    "patterns": {"alpha": 5, "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"up_proj": 3}},
    "rslora": {"rslora": True, "alpha": 3.5, "rank_pattern": {"k_proj": 9}},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "pissa": {"init": "pissa", "rank_pattern": {"q_proj": 6}},
    "pissa and rslora": {"init": "pissa", "rslora": True, "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_in_peft_and_here_with_equal_logits(name, base, tmp_path):
    live = trained(base, tmp_path / "a", **OURS[name])
    assert not agree(live, ours(load_model(base)))
    loaded = peft.PeftModel.from_pretrained(reference("llama"), tmp_path / "a")
    assert agree(theirs(loaded), live)
    model = load_model(base)
    load_adapter(tmp_path / "a", model, identity=model_identity(base))
    assert agree(ours(model), live) if "pissa" in name else torch.equal(ours(model), live)
    loaded.save_pretrained(tmp_path / "b")  # and back: not a bit lost
    mine, back = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    back = {key: value for key, value in back.items() if "base_layer" not in key}
    assert mine.keys() == back.keys() and all(torch.equal(mine[key], back[key]) for key in mine)
    again = load_model(base)
    load_adapter(tmp_path / "b", again)
    assert torch.equal(ours(again), ours(model))


THEIRS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 2},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"0.*k_proj": 1},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "names of other models too": {"target_modules": ["q_proj", "query_key_value"]},
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_loads_here_and_goes_back(name, base, tmp_path):
    expected, _ = from_peft(tmp_path / "a", **THEIRS[name])
    model = load_model(base)
    adapter = load_adapter(tmp_path / "a", model)
    assert agree(ours(model), expected)
    info = read_info(tmp_path / "a")
    assert (info.kind, info.peft, info.identity, info.template) == ("lora", True, None, None)
    (tmp_path / "b").mkdir()
    save_adapter(tmp_path / "b", adapter, base="m", identity={})
    assert agree(theirs(peft.PeftModel.from_pretrained(reference("llama"), tmp_path / "b")), expected)
    mine, back = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert all(torch.equal(mine[key], back[key]) for key in back)


def test_the_folder_says_what_it_is(base, tmp_path):
    trained(base, tmp_path / "a")
    info = read_info(tmp_path / "a")
    assert (info.kind, info.base, info.settings["rank"]) == ("lora", str(base), 4)
    assert info.identity == json.loads(json.dumps(model_identity(base)))
    assert (info.tensors, info.notes) == (42, {"data sha256": "abc"})
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model:" in card and "| data sha256 | abc |" in card and f"{info.parameters:,}" in card
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert f"{PREFIX}.0.self_attn.q_proj.lora_A.weight" in keys and not any("default" in key for key in keys)


def test_full_is_saved_natively(base, tmp_path):
    model = load_model(base)
    adapter = attach(model, {"kind": "full"})
    disturb(adapter.trainable.values())
    with atomic_folder(tmp_path / "a") as target:
        save_adapter(target, adapter, base=str(base), identity=model_identity(base))
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    fresh = load_model(base)
    assert load_adapter(tmp_path / "a", fresh).kind == "full" and read_info(tmp_path / "a").kind == "full"
    assert torch.equal(ours(fresh), ours(model))
    weights = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "norm" not in key}, weights)
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(tmp_path / "a", load_model(base))


OLD_KEYS = {
    "adapter's name": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "prefix twice": lambda key: f"base_model.model.{key}",
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "in parallel": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("name", OLD_KEYS)
def test_keys_as_older_versions_and_wrappers_wrote_them(name, base, tmp_path):
    live = trained(base, tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: {OLD_KEYS[name](key): value for key, value in tensors.items()})
    model = load_model(base)
    load_adapter(tmp_path / "a", model)
    assert torch.equal(ours(model), live)


def test_alpaca_lora_config(base, tmp_path):
    """The keys that PEFT 0.2 wrote, as the alpaca-lora adapters have them."""
    live = trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"], alpha=16)
    config = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "tunesmith.json").unlink()
    model = load_model(base)
    load_adapter(tmp_path / "a", model)
    assert torch.equal(ours(model), live)


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_first(change):
    """Change the first lora_A of the file."""
    key = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    return lambda tensors: {**tensors, key: change(tensors[key].clone())}


def filtered_twice(tensors):
    """What get_peft_model_state_dict makes of a state dict that it has been through before: nothing."""
    return {key: value for key, value in tensors.items() if ".default." in key}


TENSOR_FAULTS = {
    "filtered twice": (filtered_twice, "empty adapter of .* bytes.*filtered twice"),
    "unmatched keys": (lambda t: {f"x.{k}": v for k, v in t.items()}, "none of its 42 keys belongs.*'x.base_model"),
    "missing": (lambda t: dict(list(t.items())[1:]), "lora_A.weight is missing"),
    "unexpected": (lambda t: t | {"base_model.model.score.weight": torch.ones(2)}, "score.weight is unexpected"),
    "rank": (change_first(lambda a: a[:3].contiguous()), r"has shape \[3, 64\], expected \[4, 64\]"),
    "NaN": (change_first(lambda a: a.fill_(float("nan"))), "q_proj.lora_A.weight holds NaN"),
    "infinity": (change_first(lambda a: a * float("inf")), "holds NaN or infinity"),
    "integers": (change_first(lambda a: a.int()), "torch.int32, not a floating-point"),
    "twice": (lambda t: t | {f"module.{k}": v.clone() for k, v in t.items()}, "mean the same"),
    "DoRA": (lambda t: t | {f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}, "unexpected"),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_a_bad_tensor_is_named_and_the_model_left_alone(name, base, tmp_path):
    change, message = TENSOR_FAULTS[name]
    trained(base, tmp_path / "a")
    edit_tensors(tmp_path / "a", change)
    model = load_model(base)
    before = ours(model)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tmp_path / "a", model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert torch.equal(ours(model), before)
    assert not [key for key in model.state_dict() if "edit" in key]


CONFIG_FAULTS = {
    "use_dora": True, "modules_to_save": ["q_proj"], "bias": "lora_only", "lora_bias": True, "fan_in_fan_out": True,
    "layer_replication": [[0, 2], [1, 3]], "trainable_token_indices": [1, 2], "alora_invocation_tokens": [5],
    "target_parameters": ["mlp.experts"], "exclude_modules": ["k_proj"], "use_qalora": True, "kasa_config": {"beta": 1},
    "init_lora_weights": "pissa", "some_future_switch": 1, "merge_weights": True, "layers_pattern": "h",
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_what_changes_the_arithmetic_is_refused_by_name(key, base, tmp_path):
    trained(base, tmp_path / "a")
    edit_config(tmp_path / "a", **{key: CONFIG_FAULTS[key]})
    with pytest.raises(AdapterError, match=f"adapter_config.json: {key}="):
        load_adapter(tmp_path / "a", load_model(base))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r='0' should be a positive integer"),
        ({"r": 10**12}, "should be a positive integer"),
        ({"r": 1000000}, r"expected \[1000000, 64\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha='nan'"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": None}, "target_modules='None' should list"),
        ({"target_modules": ["qproj"]}, "none of qproj is a linear module"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": "(.*)*q_proj"}, "could take for ever"),
        ({"target_modules": r".*\.nothing"}, "matches no module"),
        ({"rank_pattern": {"(a|a)*b": 3}}, "rank_pattern: .* could take for ever"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj"),
        ({"rank_pattern": ["q_proj"]}, "should map module names"),
        ({"layers_to_transform": [7]}, "no layer 7"),
        ({"layers_to_transform": ["a"]}, "should list layer numbers"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": "lora"}, "did you mean 'LORA'"),
    ],
)
def test_a_bad_setting_is_named(values, message, base, tmp_path):
    from_peft(tmp_path / "a", target_modules=["q_proj"])
    edit_config(tmp_path / "a", **values)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a", load_model(base))


def test_a_config_full_of_patterns_does_not_hang(base, tmp_path):
    from_peft(tmp_path / "a", target_modules=["q_proj"])
    began = time.perf_counter()
    for target, patterns in ((".*.*.*.*.*x", {}), (["q_proj"], {f"{'.*' * 3}{i}": 1 for i in range(1999)}),
                             (["q_proj"], {f"nothing{i}": 1 for i in range(1999)})):  # fmt: skip
        edit_config(tmp_path / "a", target_modules=target, rank_pattern=patterns)
        with pytest.raises(AdapterError):
            load_adapter(tmp_path / "a", load_model(base))
    assert time.perf_counter() - began < 6


def test_a_pickle_is_refused_with_the_script_that_converts_it(base, tmp_path):
    trained(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "a" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.bin: a pickle") as caught:
        load_adapter(tmp_path / "a", load_model(base))
    command = re.search(r"python (tools/\w+\.py) (\S+) --out", str(caught.value))
    assert command is not None and (ROOT / command[1]).is_file() and command[2] == str(tmp_path / "a")
    for name in ("lit_model.pth.lora", "lit-llama-lora-finetuned.pth", "intkey_layer_1.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"")
        with pytest.raises(AdapterError, match=f"{name}: a pickle"):
            read_info(folder)


def test_damaged_and_missing_files(base, tmp_path):
    with pytest.raises(AdapterError, match="no such adapter folder"):
        read_info(tmp_path / "none")
    with pytest.raises(AdapterError, match="no adapter_config.json and no tunesmith.json"):
        read_info(base)
    trained(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-5])
    with pytest.raises(AdapterError, match="adapter_model.safetensors: damaged"):
        read_info(tmp_path / "a")
    weights.unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors: missing"):
        read_info(tmp_path / "a")
    weights.write_bytes(data)
    for content in ("{", "[]", "[" * 100000, '{"format": 99}'):
        (tmp_path / "a" / "tunesmith.json").write_text(content)
        with pytest.raises(AdapterError, match="tunesmith.json"):
            read_info(tmp_path / "a")


def test_nothing_named_by_the_file_is_opened_or_imported(base, tmp_path):
    live = trained(base, tmp_path / "a")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    edit_config(tmp_path / "a", base_model_name_or_path="/nonexistent/evil", auto_mapping={"parent_library": "evil"})
    model = load_model(base)
    load_adapter(tmp_path / "a", model)
    assert torch.equal(ours(model), live) and "evil" not in sys.modules


def test_another_base_is_named(base, tmp_path):
    trained(base, tmp_path / "a")
    info = read_info(tmp_path / "a")
    check_base(info, model_identity(base))
    other = reference("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(0.1)
    other.save_pretrained(tmp_path / "same-sizes")
    reference("llama-all-heads").save_pretrained(tmp_path / "other")
    for name, message in (
        ("same-sizes", "same sizes, other weights"),
        ("other", "num_key_value_heads 2 there, 4 here"),
    ):
        with pytest.raises(AdapterError, match=f"adapter is for another base: it was trained on .*{message}"):
            identity = model_identity(tmp_path / name)
            load_adapter(tmp_path / "a", load_model(tmp_path / name), identity=identity)
    with pytest.raises(AdapterError, match=r"has shape \[32, 4\], expected \[64, 4\]"):
        load_adapter(tmp_path / "a", load_model(tmp_path / "other"))


def test_an_adapter_that_changes_nothing_is_said(base, tmp_path, caplog):
    trained(base, tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    with caplog.at_level(logging.WARNING):
        load_adapter(tmp_path / "a", load_model(base))
    assert "changes nothing: every lora_B is zero" in caplog.text


def test_what_is_not_finite_is_not_saved(base, tmp_path):
    model = load_model(base)
    adapter = attach(model, {"kind": "lora"})
    with torch.no_grad():
        next(iter(adapter.trainable.values()))[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight holds NaN or infinity \(1 of 42"):
        save_adapter(tmp_path, adapter, base="m", identity={})
    assert not list(tmp_path.iterdir())
