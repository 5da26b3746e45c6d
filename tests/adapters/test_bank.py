"""A bank computes what its members do attached one by one, and a batch pays for those that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, VOCAB, build, disturb, logits_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.adapters import attach
from tunesmith.adapters.bank import Bank, BankDelta
from tunesmith.adapters.base import Adapter
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.errors import AdapterError, ModelError
from tunesmith.inference import GenerationSettings, generate
from tunesmith.inference.prefill import attached_adapters, check_adapters
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama

SPECS = {
    "a": {"rank": 3},
    "b": {"rank": 5, "target_modules": ["q_proj", "down_proj"], "rslora": True},
    "c": {"rank": 2, "target_modules": "(lm_head|.*v_proj)", "alpha": 3},
    "d": {"rank": 4, "init": "pissa", "rank_pattern": {"o_proj": 1}},
    "e": {"rank": 1, "layers_to_transform": [1]},
}
ROUTES = [("a",), (), ("b",), ("c",), ("a",), ("d",), ("e",)]


def lora(model: Llama, name: str, **settings: object) -> Adapter:
    """A LoRA adapter that does something; its numbers depend on its name alone."""
    adapter = attach(model, {"kind": "lora", **settings}, name=name, seed=sum(map(ord, name)))
    disturb(adapter, seed=sum(map(ord, name)), std=0.3)
    return adapter


def with_bank(names: Sequence[str] = tuple(SPECS), model: Llama | None = None) -> tuple[Llama, Bank]:
    model = model or build()
    bank = Bank(model)
    for name in names:
        bank.add(lora(model, name, **SPECS[name]))
    return model, bank


def with_each(names: Sequence[str] = tuple(SPECS)) -> Llama:
    model = build()
    for name in names:
        lora(model, name, **SPECS[name])
    return model


def row(lengths: Sequence[int]) -> tuple[Tensor, Layout]:
    layout = Layout.of(lengths)
    return torch.randint(0, VOCAB, (layout.tokens,), generator=torch.Generator().manual_seed(2)), layout


@torch.no_grad()
def routed(model: Llama, tokens: Tensor, layout: Layout, routes: Sequence[tuple[str, ...]], at: Tensor | None = None):
    ctx = model.context(layout, routes=routes)
    hidden = model.run(tokens, ctx)
    return model.logits(hidden, ctx) if at is None else model.logits(hidden[at], ctx.at(at))


@pytest.mark.parametrize("lengths", [[9, 8, 12, 5, 3, 20, 6], [1] * 7, [1, 1, 30, 1, 1, 1, 1]], ids=str)
def test_a_bank_computes_what_its_members_do_one_by_one(lengths) -> None:
    """Every segment, and every member by itself, equals the adapter attached as usual: other ranks, targets, heads."""
    (model, _), apart = with_bank(), with_each()
    tokens, layout = row(lengths)
    mixed, theirs = (routed(m, tokens, layout, ROUTES) for m in (model, apart))
    assert (mixed - theirs).abs().max() < 1e-10
    assert (mixed - logits_of(model, tokens, layout, ())).abs().amax(-1).gt(1e-3).sum() == sum(lengths) - lengths[1]
    for name in SPECS:
        alone = logits_of(model, tokens, layout, (name,))
        assert (alone - logits_of(apart, tokens, layout, (name,))).abs().max() < 1e-10
    assert torch.equal(logits_of(model, tokens, layout, ()), logits_of(build(), tokens, layout))
    assert torch.equal(logits_of(model, tokens, layout), logits_of(build(), tokens, layout)), "unnamed, none acts"


def test_logits_of_some_rows_follow_their_members() -> None:
    (model, _), apart = with_bank(), with_each()
    tokens, layout = row([4, 7, 5, 3, 6, 2, 8])
    at = torch.tensor([30, 3, 10, 11, 16, 2])
    whole = routed(apart, tokens, layout, ROUTES)
    assert (routed(model, tokens, layout, ROUTES, at) - whole[at]).abs().max() < 1e-10
    none = torch.tensor([4, 5])  # of the segment that no member acts on
    assert (routed(model, tokens, layout, ROUTES, none) - whole[none]).abs().max() < 1e-10


def test_members_act_beside_other_adapters_and_behind_virtual_tokens() -> None:
    models = with_bank()[0], with_each()
    for model in models:
        disturb(attach(model, {"kind": "prompt", "virtual_tokens": 3}, name="soft"))
        disturb(attach(model, {"kind": "bottleneck"}, name="neck"))
    tokens, layout = row([6, 5, 7, 4])
    routes = [("a", "soft"), ("neck", "soft"), ("b", "neck"), ("soft", "c")]
    ours, theirs = (routed(model, tokens, layout, routes) for model in models)
    assert (ours - theirs).abs().max() < 1e-10


def test_generation_with_a_bank_is_that_of_each_alone() -> None:
    model, _ = with_bank(model=build(dtype=torch.float32))
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=draw).tolist() for n in (5, 9, 3, 12, 5, 7, 8)]
    settings = GenerationSettings(max_new_tokens=12)
    mixed = generate(model, prompts, settings, eos_ids=(), routes=ROUTES)
    solo = [generate(model, [p], settings, eos_ids=(), adapters=n)[0] for p, n in zip(prompts, ROUTES, strict=True)]
    assert [g.ids for g in mixed] == [g.ids for g in solo]
    assert (
        len({g.ids for g in generate(model, [prompts[0]] * 6, settings, eos_ids=(), routes=ROUTES[:4] + ROUTES[5:])})
        > 3
    )


@pytest.mark.parametrize("lengths", [[40, 30, 20], [1, 1, 1]], ids=["prompts", "steps"])
def test_the_cost_does_not_grow_with_members_that_a_batch_does_not_use(lengths) -> None:
    """Multiplications and bytes gathered with 3 members in use: of 3 in the bank, of 40, and of attached adapters."""
    counts, gathered = {}, {}
    for members in (3, 40):
        model = build()
        bank = Bank(model)
        for number in range(members):
            bank.add(lora(model, f"m{number}", rank=4))
        delta = bank._deltas["model.layers.0.self_attn.q_proj"]
        assert len(delta.A) >= members
        tokens, layout = row(lengths)
        with FlopCounterMode(display=False) as counter:
            routed(model, tokens, layout, [("m0",), ("m2",), ("m1",)])
        counts[members] = counter.get_total_flops()
        saved: list[int] = []
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            routed(model, tokens, layout, [("m0",), ("m2",), ("m1",)])
        saved = [event.cpu_memory_usage for event in profile.key_averages() if event.cpu_memory_usage > 0]
        gathered[members] = sum(saved)
    apart = build()
    for number in range(3):
        lora(apart, f"m{number}", rank=4)
    with FlopCounterMode(display=False) as counter:
        routed(apart, *row(lengths), [("m0",), ("m2",), ("m1",)])
    assert counts[3] == counts[40] == counter.get_total_flops()
    assert gathered[40] <= 1.01 * gathered[3]


def test_a_larger_rank_costs_those_that_have_it() -> None:
    """Sliced (prompts), a member of rank 1 beside one of rank 16 costs rank 1."""
    flops = {}
    for other in (1, 16):
        model = build()
        bank = Bank(model)
        bank.add(lora(model, "small", rank=1))
        bank.add(lora(model, "large", rank=other))
        with FlopCounterMode(display=False) as counter:
            routed(model, *row([20]), [("small",)])
        flops[other] = counter.get_total_flops()
    assert flops[1] == flops[16]


def test_members_come_and_go() -> None:
    model, bank = with_bank(("a", "b"))
    tokens, layout = row([5, 6, 7])
    first = logits_of(model, tokens, layout, ("a",))
    assert bank.members == ["a", "b"] == attached_adapters(model)
    bank.add(lora(model, "c", **SPECS["c"]))
    assert torch.equal(logits_of(model, tokens, layout, ("a",)), first)
    bank.remove("b")
    with pytest.raises(AdapterError, match="'b' is not attached"):
        check_adapters(model, ("b",))
    bank.add(lora(model, "d", **SPECS["d"]))  # it takes the place of b, whose modules are others
    assert bank.members == ["a", "c", "d"] and max(bank._members.members.values()) == 2
    apart = with_each(("a", "c", "d"))
    routes = [("d",), ("a",), ("c",)]
    assert (routed(model, tokens, layout, routes) - routed(apart, tokens, layout, routes)).abs().max() < 1e-10
    bank.close()
    assert attached_adapters(model) == []
    assert torch.equal(logits_of(model, tokens, layout), logits_of(build(), tokens, layout))
    assert not any(isinstance(module, BankDelta) for module in model.modules())


def test_members_are_loaded_from_folders(tmp_path) -> None:
    source, model = build(dtype=torch.float32), build(dtype=torch.float32)
    for name in ("a", "d"):
        save_adapter(tmp_path / name, lora(source, name, **SPECS[name]), base="b", identity={"sha256": "x"})
    bank = Bank(model, "shelf")
    for name in ("a", "d"):
        bank.load(name, tmp_path / name)
    tokens, layout = row([5, 6])
    routes = [("d",), ("a",)]
    ours, theirs = (routed(m, tokens, layout, routes) for m in (model, source))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    with pytest.raises(AdapterError, match="another base"):
        bank.load("again", tmp_path / "a", identity={"sha256": "y"})
    assert bank.members == ["a", "d"] == attached_adapters(model)


def test_what_a_bank_cannot_hold_is_refused(tmp_path) -> None:
    model, bank = with_bank(("a",))
    neck = attach(model, {"kind": "bottleneck"}, name="neck")
    with pytest.raises(AdapterError, match=r"'neck' \(bottleneck\): a bank holds LoRA's A and B"):
        bank.add(neck)
    with pytest.raises(AdapterError, match=r"'dora' \(dora\): a bank holds"):
        bank.add(attach(model, {"kind": "dora"}, name="dora"))
    with pytest.raises(AdapterError, match="trains? .*base's own weights|trained the base's own weights"):
        bank.add(attach(model, {"kind": "lora", "train_norms": True}, name="long"))
    with pytest.raises(AdapterError, match="a member 'a' already"):
        bank.add(lora(model, "a", rank=2))
    with pytest.raises(AdapterError, match="no member 'aa'; did you mean 'a'"):
        bank.remove("aa")
    for name in ("neck", "a", "bank"):
        with pytest.raises(AdapterError, match=f"{name!r}: an adapter has this name"):
            Bank(model, name)
    with pytest.raises(AdapterError, match="bank name 'x y'"):
        Bank(model, "x y")
    save_adapter(tmp_path / "n", neck, base="b", identity={})
    with pytest.raises(AdapterError, match="a bank holds LoRA"):
        bank.load("n", tmp_path / "n")
    assert "n" not in attached_adapters(model)
    with pytest.raises(ModelError, match="are members of one bank, 'bank'"):
        routed(with_bank(("a", "b"))[0], *row([4]), [("a", "b")])
    with pytest.raises(AdapterError, match="'bank' is not attached"):
        check_adapters(model, ("bank",))


def test_a_wrong_member_would_show() -> None:
    """Two members' places exchanged: the comparison above bites."""
    (model, bank), apart = with_bank(), with_each()
    places = bank._members.members
    places["a"], places["b"] = places["b"], places["a"]
    tokens, layout = row([9, 8, 12, 5, 3, 20, 6])
    off = (routed(model, tokens, layout, ROUTES) - routed(apart, tokens, layout, ROUTES)).abs().amax(-1)
    wrong = [i for i, names in enumerate(ROUTES) if names in (("a",), ("b",))]
    for i, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        assert (off[start : start + length].max() > 1e-3) == (i in wrong)


@pytest.mark.parametrize("lengths", [[9, 8, 12], [1, 1, 1]], ids=["prompts", "steps"])
def test_a_block_with_a_bank_compiles_as_one_graph(lengths) -> None:
    torch._dynamo.reset()
    model = build(replace(TINY, num_hidden_layers=1), torch.float32)
    bank = Bank(model)
    for name in "ab":
        bank.add(lora(model, name, **SPECS[name]))
    tokens, layout = row(lengths)
    ctx = model.context(layout, routes=[("b",), (), ("a",)])
    with torch.no_grad():
        h = model.embedded(tokens, ctx)
        block = model.model.layers[0]
        eager, compiled = block(h, ctx), torch.compile(block, fullgraph=True, backend="aot_eager")(h, ctx)
    assert (eager - compiled).abs().max() <= 1e-5 * eager.abs().max()
