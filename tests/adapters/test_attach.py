"""Attaching, detaching and loading: names, exact keys, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.laws.small import TINY, build, disturb, logits_of, relative, run_packs, sample_row, snapshot
from torch import nn

from tunesmith.adapters import Placement, attach, detach, find_method, kinds
from tunesmith.adapters.base import Adapter, Delta, install
from tunesmith.config import validate_section
from tunesmith.errors import AdapterError, CannotMerge, ConfigError
from tunesmith.model.llama import Llama

LORA = {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]}


def test_methods_are_found_by_listing_the_folder() -> None:
    assert kinds() == sorted(kinds()) and {"lora", "full"} <= set(kinds())
    for kind in kinds():
        method = find_method(kind)
        assert method.kind == kind and method.learning_rate > 0
        start = validate_section(method.settings, {}, "adapter")
        assert isinstance(method.identity_at_init(start), bool) and isinstance(method.mergeable(start), bool)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no method 'lroa'; did you mean 'lora'\?.*full"):
        attach(build(), {"kind": "lroa"})


def test_names_of_the_base_stay() -> None:
    model = build()
    before = {k: v.data_ptr() for k, v in model.named_parameters()}
    adapter = attach(model, LORA)
    after = {k: v.data_ptr() for k, v in model.named_parameters()}
    assert before.items() <= after.items()
    assert all(".default." in k for k in after.keys() - before.keys()) and len(after) == len(before) + 4
    assert set(adapter.trainable) == {f"model.layers.{i}.self_attn.q_proj.edit.{n}" for i in (0, 1) for n in "AB"}


def test_detach_gives_the_base_back() -> None:
    model = build()
    row = sample_row()
    bare, before = logits_of(model, *row), snapshot(model)
    adapter = attach(model, LORA)
    disturb(adapter)
    assert not torch.equal(logits_of(model, *row), bare)
    detach(model, adapter)
    assert torch.equal(logits_of(model, *row), bare) and snapshot(model).keys() == before.keys()
    assert not adapter.trainable
    attach(model, LORA)


def test_detach_leaves_others() -> None:
    model = build()
    first, second = attach(model, LORA, name="a"), attach(model, LORA, name="b")
    disturb(second)
    alone = logits_of(model, *sample_row(), adapters=("b",))
    detach(model, first)
    assert torch.equal(logits_of(model, *sample_row()), alone)


def test_full_cannot_be_taken_off() -> None:
    model = build()
    with pytest.raises(AdapterError, match="changed base weights: load the base model again"):
        detach(model, attach(model, {"kind": "full"}))


def test_full_trains_the_base_and_no_other_adapter() -> None:
    model = build()
    base = set(dict(model.named_parameters()))
    attach(model, LORA, name="a")
    full = attach(model, {"kind": "full"}, name="b")
    assert set(full.trainable) == base, "a tied head is named once, and another adapter's parameters are its own"


@pytest.mark.parametrize("name", ["a b", "a.b", "", "keys", "items", "forward", "1st"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(AdapterError, match="adapter name"):
        attach(build(), LORA, name=name)


def test_a_name_is_used_once() -> None:
    model = build()
    attach(model, LORA)
    with pytest.raises(AdapterError, match="'default' is already attached"):
        attach(model, {**LORA, "target_modules": ["v_proj"]})


class Broken:
    """A method whose placements are given to it."""

    kind, settings, learning_rate = "broken", dict, 1.0

    def __init__(self, *places: tuple[str, str]) -> None:
        self.places = places

    def place(self, model: Llama, settings: object) -> Iterator[Placement]:
        return (Placement(path, seam, Delta()) for path, seam in self.places)

    def unfreeze(self, model: Llama, settings: object) -> Iterator[str]:
        return iter(())


GOOD = ("model.layers.0", "after_mlp")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ((), "select nothing to train"),
        ((GOOD, ("model.layers.0", "mlp")), "no seam"),
        ((GOOD, ("model.layers.9", "after_mlp")), "no seam"),
        ((GOOD, GOOD), "two deltas"),
    ],
)
def test_a_refusal_changes_nothing(places, said: str) -> None:
    model = build()
    before = set(snapshot(model)), [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=said):
        install(model, Broken(*places), None, "default", 0)
    assert before == (set(snapshot(model)), [name for name, _ in model.named_modules()])


def test_load_state_is_exact() -> None:
    model = build()
    adapter = attach(model, LORA)
    state = {k: v.clone() + 1 for k, v in adapter.state().items()}
    key = next(iter(state))
    kept = {k: v.clone() for k, v in adapter.state().items()}
    for bad, said in (
        ({k: v for k, v in state.items() if k != key}, f"{key}: missing"),
        ({**state, "stray": torch.zeros(1)}, "stray: unexpected"),
        ({**state, key: torch.zeros(5, 5)}, rf"{key}: shape \(5, 5\), expected \(2, 24\)"),
        ({}, "missing"),
    ):
        with pytest.raises(AdapterError, match=f"adapter.bin: .*{said}"):
            adapter.load_state(bad, "adapter.bin")
        assert all(torch.equal(v, kept[k]) for k, v in adapter.state().items()), "a refused state was partly loaded"
    adapter.load_state(state, "adapter.bin")
    assert all(torch.equal(v, state[k]) for k, v in adapter.state().items())


def test_penalty_and_after_step_reach_every_delta() -> None:
    class Counting(Delta):
        def __init__(self, cost: float | None) -> None:
            super().__init__()
            self.cost, self.steps = cost, 0

        def penalty(self) -> torch.Tensor | None:
            return None if self.cost is None else torch.tensor(self.cost)

        def after_step(self) -> None:
            self.steps += 1

    deltas = {"a": Counting(2.0), "b": Counting(None), "c": Counting(0.5)}
    adapter = Adapter("x", find_method("lora"), None, dict(deltas))
    adapter.after_step()
    assert adapter.penalty() == 2.5 and [d.steps for d in deltas.values()] == [1, 1, 1]
    assert Adapter("x", find_method("lora"), None, {"b": Counting(None)}).penalty() is None


def test_a_plain_delta_says_that_it_cannot_be_folded() -> None:
    with pytest.raises(CannotMerge, match="Delta cannot be folded"):
        Delta().fold(torch.zeros(1, 1), None)


def test_no_gradient_below_the_lowest_adapter() -> None:
    """With LoRA in the last layer alone, nothing of the layers below is kept for the backward."""
    from tests.laws.small import examples

    from tunesmith.data.pack import plan_packs

    model = build()
    adapter = attach(model, {**LORA, "layers_to_transform": [1]})
    disturb(adapter)
    seen = {}

    class Spy(nn.Module):
        def forward(self, value: torch.Tensor, *_: object) -> torch.Tensor:
            seen[len(seen)] = value.requires_grad
            return value

    model.model.layers[0].resid["spy"], model.model.layers[1].resid["spy"] = Spy(), Spy()
    run_packs(model, plan_packs(examples(), budget=10_000), adapter)
    assert seen == {0: False, 1: True}


def test_routes_choose_the_adapter_of_a_segment() -> None:
    """In one row, each segment with its own adapter: as if it had been run with that adapter alone."""
    from dataclasses import replace

    model = build()
    first, second = attach(model, LORA, name="a"), attach(model, LORA, name="b")
    disturb(first, seed=1), disturb(second, seed=2)
    tokens, layout = sample_row()
    routes = {"a": torch.arange(23), "b": torch.arange(23, layout.tokens)}
    ctx = replace(model.context(layout), routes=routes)
    with torch.no_grad():
        mixed = model.logits(model.run(tokens, ctx), ctx)
    for name, rows in routes.items():
        assert relative(mixed[rows], logits_of(model, tokens, layout, (name,))[rows]) < 1e-12
    assert TINY.num_hidden_layers == 2
