"""A combination is what its parts do together with their weights, and what PEFT's own combination is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.export.small_run import make_base, train_like
from tests.laws.small import build, disturb, logits_of, relative, sample_row

from tunesmith import api
from tunesmith.adapters import attach
from tunesmith.adapters.base import Adapter
from tunesmith.adapters.combine import combine, weighted
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.errors import AdapterError, VerificationError
from tunesmith.export import combine as files
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model, model_identity

pytestmark = pytest.mark.usefixtures("single_thread")
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
LORAS = [
    {"rank": 3, "alpha": 5},
    {"rank": 2, "rslora": True, "target_modules": ["q_proj", "down_proj", "lm_head"], "rank_pattern": {"q_proj": 4}},
    {"rank": 2, "init": "pissa", "target_modules": ["v_proj"]},
]


def three(model: Llama, kind: str, settings) -> dict[str, Adapter]:
    found = {}
    for number, (name, own) in enumerate(zip("abc", settings, strict=True)):
        found[name] = attach(model, {"kind": kind, **own}, name=name, seed=number)
        disturb(found[name], seed=number, std=0.2)
    return found


def total_change(
    model: Llama, adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """The weighted sum of W' - W of every Linear, from what each part folds into."""
    changes: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for place, delta in adapters[name].deltas.items():
            path = "model.embed_tokens" if place == "model.embed" else place.rpartition(".")[0]
            W = model.get_parameter(f"{path}.weight")
            changes[path] = changes.get(path, 0) + weight * (delta.fold(W, None)[0] - W)
    return changes


@pytest.mark.parametrize(
    "settings",
    [LORAS, [{"rank": 2}] * 3, [{"rank": 2, "target_modules": ["embed_tokens", "q_proj"]}, {"rank": 1}, {"rank": 3}]],
    ids=["unequal", "equal", "embedding"],
)
def test_lora_adds_up_to_the_weighted_sum_of_the_parts(settings) -> None:
    model = build()
    adapters = three(model, "lora", settings)
    combined = combine(model, adapters, WEIGHTS, "abc")
    expected = total_change(model, adapters, WEIGHTS)
    found = total_change(model, {"abc": combined}, {"abc": 1.0})
    assert found.keys() == expected.keys()
    assert all(relative(found[path], expected[path]) < 1e-12 for path in expected)
    row = sample_row()
    alone = logits_of(model, *row, adapters=("abc",))
    with weighted(adapters, WEIGHTS):
        together = logits_of(model, *row, adapters=tuple(WEIGHTS))
    assert relative(alone, together) < 1e-12
    assert relative(alone, logits_of(model, *row, adapters=tuple(WEIGHTS))) > 1e-3, "weights matter, and are put back"
    assert {name: adapter.method.kind for name, adapter in adapters.items()} == dict.fromkeys("abc", "lora")


def test_bitfit_adds_up_and_where_a_part_has_no_bias_it_adds_none() -> None:
    model = build()
    settings = [{"target_modules": ["q_proj"]}, {"norms": True}, {"target_modules": ["q_proj", "up_proj"]}]
    adapters = three(model, "bitfit", settings)
    combined = combine(model, adapters, WEIGHTS, "abc")
    for key, bias in combined.trainable.items():
        own = [weight * adapters[n].trainable[key] for n, weight in WEIGHTS.items() if key in adapters[n].trainable]
        assert torch.allclose(bias, torch.stack(own).sum(0), rtol=0, atol=1e-15)
    with weighted(adapters, WEIGHTS):
        together = logits_of(model, *sample_row(), adapters=tuple(WEIGHTS))
    assert relative(logits_of(model, *sample_row(), adapters=("abc",)), together) < 1e-12


def test_parity_with_peft(tmp_path) -> None:
    """The same files through PEFT's add_weighted_adapter (cat), and our own file in PEFT: the same logits."""
    import peft
    import transformers

    base = make_base(tmp_path / "base")
    ours = load_model(base)
    for number, (name, settings) in enumerate(zip("ab", LORAS[:2], strict=True)):
        adapter = attach(ours, {"kind": "lora", **settings}, name=name, seed=number)
        disturb(adapter, seed=number, std=0.2)
        folder = tmp_path / name
        folder.mkdir()
        save_adapter(folder, adapter, base=str(base), identity={})
    fresh = load_model(base)
    parts = {name: load_adapter(tmp_path / name, fresh, name) for name in "ab"}
    combined = combine(fresh, parts, {"a": 0.7, "b": 0.4}, "ab")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", adapter_name="a"
    )
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    tokens, layout = sample_row(vocab=700)
    first = tokens[: layout.lengths[0]]
    with torch.no_grad():
        expected = theirs(input_ids=first[None]).logits[0]
    mine = logits_of(fresh, tokens, layout, ("ab",))[: len(first)]
    assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
    bare = logits_of(fresh, tokens, layout, ())[: len(first)]
    assert (bare - expected).abs().max() > 1e-2 * expected.abs().max()
    (tmp_path / "ab").mkdir()
    save_adapter(tmp_path / "ab", combined, base=str(base), identity={})
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ab")
    with torch.no_grad():
        assert (again(input_ids=first[None]).logits[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"kind": "ia3"}, {"kind": "ia3"}, r"'a' \(ia3\) does not change the model linearly"),
        ({"kind": "reft"}, {"kind": "reft"}, "does not change the model linearly"),
        ({"kind": "prefix"}, {"kind": "prefix"}, "does not change the model linearly"),
        ({"kind": "dora"}, {"kind": "dora"}, "does not change the model linearly"),
        ({"kind": "lora"}, {"kind": "bitfit"}, "bitfit and lora are different methods"),
        ({"kind": "lora", "train_norms": True}, {"kind": "lora"}, "'a' .* trained the base's own weights"),
        ({"kind": "norms"}, {"kind": "norms"}, "trained the base's own weights"),
    ],
)
def test_methods_that_do_not_add_up_are_refused_with_the_reason(first, second, said: str) -> None:
    model = build()
    adapters = {"a": attach(model, first, name="a"), "b": attach(model, second, name="b")}
    before = {name for name, _ in model.named_modules()}
    with pytest.raises(AdapterError, match=f"combine: .*{said}"):
        combine(model, adapters, {"a": 0.5, "b": 0.5}, "ab")
    assert before == {name for name, _ in model.named_modules()}, "a refusal changes nothing"


def test_what_is_given_wrongly_is_refused() -> None:
    model = build()
    adapters = {"first": attach(model, {"kind": "lora"}, name="first")}
    for weights, said in (
        ({}, "nothing to combine"),
        ({"frist": 1.0}, "no adapter 'frist'; did you mean 'first'"),
        ({"first": float("nan")}, "the weight of 'first' is nan"),
    ):
        with pytest.raises(AdapterError, match=said):
            combine(model, adapters, weights, "new")
    with pytest.raises(AdapterError, match="'first' is already attached"):
        combine(model, adapters, {"first": 2.0}, "first")


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """A base and two LoRA adapters trained on it, as folders."""
    base = make_base(tmp_path / "base")
    found = {"base": base}
    for name, settings in (("one", {"rank": 2}), ("two", {"rank": 3, "target_modules": ["q_proj", "up_proj"]})):
        model = load_model(base)
        adapter = train_like(model, {"kind": "lora", **settings}, by=0.1 if name == "one" else 0.2)
        found[name] = tmp_path / name
        found[name].mkdir()
        save_adapter(found[name], adapter, base=str(base), identity=model_identity(base))
    return found


def test_folders_are_combined_from_the_command_line(folders, command, tmp_path) -> None:
    """As PEFT's files, checked in a fresh process."""
    one, two, out = folders["one"], folders["two"], tmp_path / "both"
    code, stdout, err = command("combine", f"{one}=0.7", f"{two}=0.3", "-o", out, "--json")
    assert code == 0, err
    report = json.loads(stdout)
    assert report["method"] == "lora" and report["format"] == "PEFT" and report["off_by"] <= 1e-5
    assert report["parts"] == {str(one): 0.7, str(two): 0.3}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2 and set(config["rank_pattern"].values()) == {5}  # q_proj and up_proj have both
    parts = [load_file(folder / "adapter_model.safetensors") for folder in (one, two, out)]
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    (A1, B1), (A2, B2), (A, B) = ((p[key.format("A")], p[key.format("B")]) for p in parts)
    assert relative(B @ A, 0.7 * 2 * B1 @ A1 + 0.3 * 2 * B2 @ A2) < 1e-6  # alpha is twice the rank
    assert command("verify", out)[0] == 0
    assert command("generate", out, "--prompt", "x", "--max-new-tokens", 2)[0] == 0
    assert json.loads((out / "tunesmith.json").read_text())["notes"]["combined"] == {str(one): 0.7, str(two): 0.3}


def test_what_computes_something_else_is_not_kept(folders, tmp_path, monkeypatch) -> None:
    """A combination that is wrong is caught by its logits."""
    exact = files.combine
    monkeypatch.setattr(
        files,
        "combine",
        lambda model, adapters, weights, name: exact(model, adapters, {**weights, "part1": 0.69}, name),
    )
    monkeypatch.setattr(files, "replay_in_child", files.replay)
    with pytest.raises(VerificationError, match="from those of its parts, and it was not kept"):
        api.combine({str(folders["one"]): 0.7, str(folders["two"]): 0.3}, out=tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{one}", "-o", "{out}"), "write the adapter's folder and its weight as FOLDER=WEIGHT"),
        (("{one}=x", "-o", "{out}"), "as FOLDER=WEIGHT"),
        (("{one}=1", "{one}=2", "-o", "{out}"), "is given twice"),
        (("{one}=nan", "-o", "{out}"), "give a finite number"),
        (("{one}=1", "{out}=1", "-o", "{out}/new"), "no such adapter folder"),
        (("{one}=1", "{two}=1", "-o", "{base}"), "is there already"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(folders, command, tmp_path, words, said: str) -> None:
    given = {**folders, "out": tmp_path / "out"}
    code, _, err = command("combine", *[word.format(**given) for word in words])
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
