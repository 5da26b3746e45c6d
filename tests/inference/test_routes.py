"""One batch, several adapters: every prompt is answered as it is alone with its own, token for token."""

from __future__ import annotations

import pytest
import torch
from tests.laws.small import VOCAB, build, disturb

from tunesmith.adapters import attach, kinds
from tunesmith.errors import AdapterError, GenerationError
from tunesmith.inference import Generation, GenerationSettings, generate
from tunesmith.inference.prefill import pack_prompts, prefill
from tunesmith.model.llama import Llama
from tunesmith.model.virtual import Needs

SPECS = {
    "low": {"kind": "lora", "rank": 3},
    "neck": {"kind": "bottleneck"},
    "gate": {"kind": "llama_adapter"},
    "soft": {"kind": "prompt"},
    "pre": {"kind": "prefix"},
    "rep": {"kind": "reft"},
}
ROUTES = [("low",), ("neck",), (), ("gate",), ("low",), ("low", "gate"), (), ("soft",), ("pre",), ("soft",), ("rep",)]


@pytest.fixture(scope="module")
def model() -> Llama:
    """A small model in float32 with adapters of several kinds, all moved away from their start."""
    made = build(dtype=torch.float32)
    for number, (name, spec) in enumerate(SPECS.items()):
        if spec["kind"] in kinds():
            disturb(attach(made, spec, name=name, seed=number), seed=number, std=0.5)
    return made


def batch(routes: list[tuple[str, ...]]) -> list[list[int]]:
    """A ragged prompt for each route; most begin alike, so that sharing across adapters would show."""
    draw = torch.Generator().manual_seed(5)
    begin = torch.randint(0, VOCAB, (12,), generator=draw).tolist()
    tails = [torch.randint(0, VOCAB, (3 + 5 * (i % 4),), generator=draw).tolist() for i in range(len(routes))]
    return [tail if i == 3 else begin + tail for i, tail in enumerate(tails)]


def possible(model: Llama) -> list[tuple[str, ...]]:
    """The routes whose methods are there."""
    return [names for names in ROUTES if all(SPECS[name]["kind"] in kinds() for name in names)]


def alone(model: Llama, prompts, routes, settings: GenerationSettings, **more) -> list[Generation]:
    """Each prompt in a batch of its own."""
    found: list[Generation] = []
    for i, (prompt, names) in enumerate(zip(prompts, routes, strict=True)):
        own = {key: [value[i]] if key == "seeds" else value for key, value in more.items()}
        found += generate(model, [prompt], settings, adapters=names, **own)
    return found


def test_greedy_answers_are_those_of_each_alone(model) -> None:
    routes = possible(model)
    prompts = batch(routes)
    settings = GenerationSettings(max_new_tokens=24)
    solo = alone(model, prompts, routes, settings, eos_ids=())
    eos = {solo[0].ids[3], solo[2].ids[9]}  # some end early and leave the batch
    assert len(set(routes)) >= 5 and len({g.ids for g in solo}) == len(solo)
    for ends in ((), eos):
        expected = alone(model, prompts, routes, settings, eos_ids=ends)
        mixed = generate(model, prompts, settings, eos_ids=ends, routes=routes)
        assert [g.ids for g in mixed] == [g.ids for g in expected]
    assert len({len(g.ids) for g in expected}) > 1


def test_a_wrong_route_would_show(model) -> None:
    """The same batch with two prompts' adapters exchanged says something else: the test above bites."""
    routes = possible(model)
    prompts = batch(routes)
    settings = GenerationSettings(max_new_tokens=24)
    right = generate(model, prompts, settings, eos_ids=(), routes=routes)
    wrong = generate(model, prompts, settings, eos_ids=(), routes=[routes[1], routes[0], *routes[2:]])
    assert [a.ids == b.ids for a, b in zip(right, wrong, strict=True)] == [False, False, *[True] * (len(routes) - 2)]


@pytest.mark.parametrize("values", [{"beams": 3, "n": 2}, {"temperature": 1.0, "n": 2}, {"repetition_penalty": 1.5}])
def test_beams_samples_and_penalties_too(model, values) -> None:
    routes = possible(model)
    prompts = batch(routes)
    settings = GenerationSettings(max_new_tokens=8, **values)
    seeds = list(range(len(prompts)))
    expected = alone(model, prompts, routes, settings, eos_ids=(), seeds=seeds)
    mixed = generate(model, prompts, settings, eos_ids=(), routes=routes, seeds=seeds)
    assert [g.ids for g in mixed] == [g.ids for g in expected]


def test_groups_that_do_not_fit_together_keep_their_routes(model) -> None:
    routes = possible(model)
    prompts = batch(routes)
    settings = GenerationSettings(max_new_tokens=6)
    whole = generate(model, prompts, settings, eos_ids=(), routes=routes)
    parts = generate(model, prompts, settings, eos_ids=(), routes=routes, cache_bytes=40_000)
    assert [g.ids for g in parts] == [g.ids for g in whole]


def test_logits_after_the_prompts_are_those_of_each_alone(model) -> None:
    routes = possible(model)
    prompts = batch(routes)
    with torch.no_grad():
        _, mixed = prefill(model, prompts, 4, routes)
        for row, (prompt, names) in enumerate(zip(prompts, routes, strict=True)):
            _, own = prefill(model, [prompt], 4, [names])
            assert (mixed[row] - own[0]).abs().max() <= 1e-5 * own.abs().max()


def test_only_prompts_with_the_same_adapters_share() -> None:
    begin = list(range(1, 21))
    prompts = [[*begin, 30 + i] for i in range(4)]
    together, one = pack_prompts(prompts, True)
    apart, two = pack_prompts(prompts, True, needs=[Needs(), Needs()], groups=[0, 1, 0, 1])
    assert len(together) == 20 + 4 and one.parents == (-1, 0, 0, 0, 0)
    assert len(apart) == 2 * 20 + 4 and two.parents == (-1, -1, 0, 1, 0, 1)
    assert len(pack_prompts(prompts, True, needs=[Needs()] * 4, groups=[0, 1, 2, 3])[0]) == 4 * 21


def test_each_prompt_gets_what_its_own_adapters_need() -> None:
    prompts = [[1, 2, 3], [4, 5, 6]]
    ids, layout = pack_prompts(prompts, True, needs=[Needs(ends=2), Needs(infix=2)], groups=[0, 1])
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, -1, -2]
    assert layout.answer_ends is not None and layout.answer_ends.tolist() == [0, 2, 1, 0, 0, 0, 0, 0]


def test_what_cannot_be_is_refused(model) -> None:
    prompts = batch([()] * 2)
    with pytest.raises(GenerationError, match="1 routes for 2 prompts; give one a prompt"):
        generate(model, prompts, eos_ids=(), routes=[()])
    with pytest.raises(GenerationError, match="give one of the two"):
        generate(model, prompts, eos_ids=(), routes=[(), ()], adapters=())
    with pytest.raises(AdapterError, match="'lov' is not attached; did you mean 'low'"):
        generate(model, prompts, eos_ids=(), routes=[(), ("lov",)])
