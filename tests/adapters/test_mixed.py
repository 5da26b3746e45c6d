"""Mixed methods: what two adapters attached one after the other compute, trained and saved as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.laws.small import build, disturb, logits_of, relative, sample_row
from tests.tiny import words, write_base

from tunesmith.adapters import attach, find_method, kinds, outside
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.bitfit import BiasDelta
from tunesmith.adapters.lora import LoRADelta
from tunesmith.adapters.mixed import Chain, MixedSettings
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.config import validate_section
from tunesmith.errors import AdapterError, CannotMerge, ConfigError
from tunesmith.export.merge import merged_weights
from tunesmith.model.llama import Llama
from tunesmith.train.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("single_thread")
LORA = {"kind": "lora", "rank": 2, "target_modules": ["q_proj", "down_proj"]}
IA3 = {"kind": "ia3"}
NECK = {"kind": "bottleneck"}
SCALE = {"kind": "ia3", "target_modules": ["q_proj"]}  # of an output that LoRA edits too: their order matters
BIAS = {"kind": "bitfit", "target_modules": ["q_proj", "o_proj"]}


def mixed(*parts: dict) -> dict:
    return {"kind": "mixed", "parts": list(parts)}


@pytest.mark.parametrize(
    "parts",
    [
        (LORA, BIAS),
        (IA3, LORA, NECK),
        (NECK, {**LORA, "init": "pissa"}),
        ({"kind": "prefix"}, LORA),
        (SCALE, LORA),
        (LORA, SCALE),
    ],
    ids=lambda parts: "+".join(part["kind"] for part in parts),
)
def test_it_computes_what_its_parts_do_one_after_the_other(parts) -> None:
    """The same parts attached as adapters of their own, with the same values: equal, bit by bit."""
    whole, apart = build(), build()
    one = attach(whole, mixed(*parts))
    disturb(one)
    for number, part in enumerate(parts):
        own = attach(apart, part, name=f"n{number}", seed=9)
        state = {
            f"{before}.{key.split('.', 1)[1]}": value
            for name, value in one.state().items()
            for before, _, key in [name.partition(".parts.")]
            if key.split(".")[0] == part["kind"]
        }
        own.load_state(state, "test")
    bare = logits_of(build(), *sample_row())
    assert torch.equal(logits_of(whole, *sample_row()), logits_of(apart, *sample_row()))
    assert relative(bare, logits_of(apart, *sample_row())) > 1e-3


def test_the_order_of_parts_matters_where_they_do_not_commute() -> None:
    found = []
    for parts in ((SCALE, LORA), (LORA, SCALE)):
        model = build()
        adapter = attach(model, mixed(*parts))
        with torch.no_grad():
            for name, parameter in adapter.trainable.items():
                parameter.fill_(0.5 if name.endswith("scale") else 0.1)
        found.append(logits_of(model, *sample_row()))
    assert relative(*found) > 1e-3


def test_a_part_gets_the_ids_of_its_text() -> None:
    model = build()
    prompt = {"kind": "prompt", "virtual_tokens": 2, "init_text": "ab"}
    adapter = attach(model, mixed(prompt, LORA), encode=lambda text: [ord(letter) % 61 for letter in text])
    first = adapter.settings.parts[0]
    assert list(first["init_ids"]) == [ord("a") % 61, ord("b") % 61] and "init_ids" not in adapter.settings.parts[1]


def test_names_are_stable_and_every_inner_delta_knows_the_adapter() -> None:
    model = build()
    adapter = attach(model, mixed(LORA, {**LORA, "target_modules": ["v_proj"]}, {**BIAS, "name": "shift"}), name="both")
    q, v = "model.layers.0.self_attn.q_proj.edit", "model.layers.0.self_attn.v_proj.edit"
    named = {name for name in adapter.trainable if ".layers.0.self_attn." in name}
    assert named == {
        *(f"{q}.parts.lora.{x}" for x in "AB"), f"{q}.parts.shift.bias", *(f"{v}.parts.lora_2.{x}" for x in "AB"),
        "model.layers.0.self_attn.o_proj.edit.parts.shift.bias",
    }  # fmt: skip
    chain = adapter.deltas[q]
    assert isinstance(chain, Chain) and chain.adapter == "both"
    assert [(type(d), d.adapter) for d in chain.deltas.values()] == [(LoRADelta, "both"), (BiasDelta, "both")]


def test_each_part_keeps_its_own_rate() -> None:
    """The optimizer's rates are each method's default, times train.learning_rate over LoRA's."""
    model = build()
    spec = mixed({**LORA, "lora_plus_ratio": 4.0}, BIAS, {"kind": "norms"})
    adapter = attach(model, spec)
    default = {kind: find_method(kind).learning_rate for kind in ("mixed", "lora", "bitfit", "norms")}
    assert default["mixed"] == default["lora"] != default["bitfit"]
    for rate in (default["mixed"], 2 * default["mixed"]):
        scales = {name: adapter.method.lr_scale(name, adapter.settings) for name in adapter.trainable}
        optimizer = build_optimizer(adapter.trainable, learning_rate=rate, lr_scale=scales)
        found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        assert found.keys() == adapter.trainable.keys()
        for name, got in found.items():
            kind = "lora" if ".lora." in name else "bitfit" if ".bitfit." in name else "norms"
            expected = default[kind] * (4 if name.endswith("lora.B") else 1) * rate / default["mixed"]
            assert got == pytest.approx(expected, rel=1e-12), name


def test_what_it_says_of_itself_is_what_its_parts_say() -> None:
    method = find_method("mixed")

    def settings(*parts: dict) -> MixedSettings:
        return validate_section(method.settings, mixed(*parts), "adapter")

    plain, dropping = settings(LORA, IA3), settings({**LORA, "dropout": 0.2}, {**LORA, "dropout": 0.1})
    assert method.identity_at_init(plain) and method.mergeable(plain) and not method.trains_base(plain)
    assert (plain.dropout, dropping.dropout, plain.rank, dropping.rank) == (0.0, 0.2, 2, 4)
    random = settings(LORA, {**NECK, "init": "bert"})
    assert not method.identity_at_init(random) and not method.mergeable(random)
    assert method.trains_base(settings(LORA, {"kind": "norms"}))
    default = validate_section(method.settings, {}, "adapter")
    assert [part.name for part in default.members] == ["lora", "bitfit"]


def test_a_saved_one_has_every_setting_and_loads_again(tmp_path) -> None:
    model = build(dtype=torch.float32)
    adapter = attach(model, mixed(LORA, NECK))
    disturb(adapter)
    save_adapter(tmp_path, adapter, base="b", identity={})
    assert not (tmp_path / "adapter_config.json").exists()
    settings = json.loads((tmp_path / "tunesmith.json").read_text())["settings"]
    assert [(part["kind"], part["name"]) for part in settings["parts"]] == [("lora", "lora")] + [("bottleneck",) * 2]
    assert settings["parts"][0]["dropout"] == 0.0 and settings["parts"][0]["target_modules"] == ["q_proj", "down_proj"]
    fresh = build(dtype=torch.float32)
    assert load_adapter(tmp_path, fresh).settings == adapter.settings
    assert torch.equal(logits_of(fresh, *sample_row()), logits_of(model, *sample_row()))
    assert load_file(tmp_path / "adapter.safetensors").keys() == adapter.state().keys()


def test_edits_of_input_and_output_of_one_linear_merge() -> None:
    """IA3 scales down_proj's input and LoRA edits its output: (W + s B A) diag(l), whichever part comes first."""
    row = sample_row()
    for parts in ((IA3, LORA), (LORA, IA3)):
        model = build()
        adapter = attach(model, mixed(*parts))
        disturb(adapter)
        path = "model.layers.0.mlp.down_proj"
        tensors, _, _ = merged_weights(model, adapter, torch.float64)
        A, B = (adapter.trainable[f"{path}.edit.parts.lora.{x}"] for x in "AB")
        scale = adapter.trainable[f"{path}.input.parts.ia3.scale"]
        expected = (model.get_parameter(f"{path}.weight") + 2 * B @ A) * scale  # alpha is twice the rank
        assert relative(tensors[f"{path}.weight"], expected) < 1e-14
        plain = build()
        plain.load_state_dict(tensors, strict=False)
        assert relative(logits_of(plain, *row), logits_of(model, *row)) < 1e-12


class Weighed(Delta):
    """value * |W| / (1 + |W|): what a part does that looks at the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, value, host, ctx, given):
        return value * self.gain * self._factor(host.weight)

    def fold(self, weight, bias):
        return weight * self.gain.detach() * self._factor(weight), bias

    def _factor(self, weight):
        return weight.norm() / (1 + weight.norm())


def test_parts_that_do_not_fold_one_after_the_other_refuse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, dtype=torch.float64)
    lora = LoRADelta(torch.randn(2, 5), torch.randn(6, 2), 1.0, 0.0, None)
    alone = Chain({"w": Weighed()}, "edit").fold(weight, None)[0]
    assert relative(alone, weight * weight.norm() / (1 + weight.norm())) < 1e-12
    first = Chain({"w": Weighed(), "lora": lora}, "edit").fold(weight, None)[0]  # sees the base's own weight: exact
    assert relative(first, alone + (lora.B @ lora.A).detach()) < 1e-6
    with pytest.raises(CannotMerge, match="lora and w on one Linear: one of them looks at its weight"):
        Chain({"lora": lora, "w": Weighed()}, "edit").fold(weight, None)
    with pytest.raises(CannotMerge, match="edit the same value, which is no Linear's"):
        Chain({"a": BiasDelta(6), "b": BiasDelta(6)}).fold(weight, None)


def test_dora_behind_another_part_refuses_too() -> None:
    if "dora" not in kinds():
        pytest.skip("NOT TESTED: there is no DoRA")
    for parts, exact in (((LORA, {"kind": "dora", "rank": 2}), False), (({"kind": "dora", "rank": 2}, BIAS), True)):
        model = build()
        adapter = attach(model, mixed(*parts))
        disturb(adapter)
        chain = adapter.deltas["model.layers.0.self_attn.q_proj.edit"]
        weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        if exact:
            chain.fold(weight, None)
        else:
            with pytest.raises(CannotMerge, match="one of them looks at its weight"):
                chain.fold(weight, None)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "at least two methods"),
        ([LORA], "at least two methods"),
        ([LORA, mixed(LORA, IA3)], r"parts\[1\]: a mixed method within a mixed one"),
        ([LORA, {"kind": "lroa"}], "no method 'lroa'; did you mean 'lora'"),
        ([LORA, {**LORA, "rnk": 2}], r"adapter.parts\[1\].rnk: unknown key; did you mean 'rank'"),
        ([LORA, {**IA3, "name": "lora"}], r"parts\[1\].name: 'lora' is taken"),
        ([LORA, {**IA3, "name": "a.b"}], r"parts\[1\].name: 'a.b': use letters"),
        ([LORA, {**IA3, "name": "keys"}], r"parts\[1\].name: 'keys': use letters"),
        ("lora", "adapter.parts"),
        ([LORA, "ia3"], "adapter.parts"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(parts, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        attach(build(), {"kind": "mixed", "parts": parts})
    assert "\n" not in str(caught.value)


def test_two_parts_that_train_the_base_are_refused() -> None:
    with pytest.raises(AdapterError, match="norms and last_layers both train the base's own weights"):
        attach(build(), mixed({"kind": "norms"}, {"kind": "last_layers"}))


class Toy:
    """A method whose delta puts tokens into the row, or acts on all deltas together."""

    settings, learning_rate = MixedSettings, 1e-3

    def __init__(self, kind: str, **attributes: int) -> None:
        self.kind, self.attributes, self.seen = kind, attributes, []

    def identity_at_init(self, settings) -> bool:
        return True

    def mergeable(self, settings) -> bool:
        return False

    def place(self, model: Llama, settings) -> Iterator[Placement]:
        delta = BiasDelta(model.config.hidden_size)
        for name, value in self.attributes.items():
            setattr(delta, name, value)
        yield Placement("model", "embed", delta)

    def unfreeze(self, model: Llama, settings) -> Iterator[str]:
        return iter(())

    def lr_scale(self, name: str, settings) -> float:
        return 1.0


class Stepping(Toy):
    """Says what it was shown."""

    def begin(self, adapter: Adapter, steps: int) -> None:
        self.seen.append((steps, sorted(adapter.deltas), [type(d) for d in adapter.deltas.values()]))

    def after_step(self, adapter: Adapter) -> None:
        self.seen.append((adapter.steps, adapter.name, sorted(adapter.trainable)))


@pytest.fixture
def toys(monkeypatch) -> dict[str, Toy]:
    """Toy methods that are there for a test."""
    made = [Toy("soft", virtual_tokens=3), Toy("hard", virtual_tokens=2), Toy("near", answer_ends=2)]
    made += [Toy("in_a", infix_tokens=1), Toy("in_b", infix_tokens=2, answer_ends=1), Stepping("stepping")]
    monkeypatch.setattr(outside, "_opened", {Path(f"/{toy.kind}.py"): toy for toy in made})
    return {toy.kind: toy for toy in made}


def test_tokens_of_two_parts_cannot_be_told_apart(toys) -> None:
    for first, second, where in (("soft", "hard", "example"), ("in_a", "in_b", "answer")):
        with pytest.raises(AdapterError, match=f"{first} and {second} both put tokens before every {where}"):
            attach(build(), mixed({"kind": first}, {"kind": second}))
    model = build()
    attach(model, mixed({"kind": "soft"}, {"kind": "in_b"}, {"kind": "near"}))
    chain = model.model.embed["default"]
    assert (chain.virtual_tokens, chain.infix_tokens, chain.answer_ends) == (3, 2, 2)
    assert (model.needs().infix, model.needs().ends) == (2, 2)


def test_a_part_that_steps_sees_its_own_deltas(toys) -> None:
    model = build()
    adapter = attach(model, mixed(LORA, {"kind": "stepping"}), name="x")
    adapter.begin(7)
    adapter.after_step()
    assert toys["stepping"].seen == [(7, ["model.embed"], [BiasDelta]), (7, "x", ["model.embed.bias"])]


def test_it_is_trained_from_the_command_line(command, in_process, tiny_base, tiny_reviews, tmp_path) -> None:
    chosen = words(
        tiny_base, tiny_reviews, tmp_path, adapter__rank=None, evaluate__samples=0, train__epochs=2,
        train__learning_rate=None, adapter__kind="mixed", adapter__parts=[{**LORA, "dropout": 0.1}, NECK],
    )  # fmt: skip
    code, out, err = command("train", *chosen)
    assert code == 0, err
    assert "prefixes are not shared" in err  # a part has dropout
    assert json.loads((Path(out.strip()) / "verify.json").read_text())["ok"]
    code, _, err = command("generate", out.strip(), "--prompt", "A joy.", "--max-new-tokens", 2)
    assert code == 0, err


def test_norms_beside_lora_hold_the_base_in_float32(command, in_process, tiny_reviews, tmp_path) -> None:
    base = write_base(tmp_path / "base")
    chosen = words(
        base, tiny_reviews, tmp_path, adapter__rank=None, evaluate__samples=0, model__dtype=None,
        adapter__kind="mixed", adapter__parts=[LORA, {"kind": "norms"}],
    )  # fmt: skip
    code, out, err = command("train", *chosen)
    assert code == 0, err
    assert "dtype: float32" in (Path(out.strip()) / "config.yaml").read_text()
