"""Virtual tokens, routes and prompt ends: what a context says of a batch, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.laws.small import build, logits_of, sample_row
from torch import Tensor, nn

from tunesmith.adapters.base import Delta
from tunesmith.data.encode import Example
from tunesmith.data.pack import answer_ends, plan_packs, with_infix
from tunesmith.errors import ModelError
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.virtual import VIRTUAL, Needs


class Soft(Delta):
    """`virtual_tokens` trained embeddings before every example."""

    def __init__(self, name: str, size: int, width: int) -> None:
        super().__init__()
        self.adapter, self.virtual_tokens = name, size
        draw = torch.Generator().manual_seed(size)
        self.P = nn.Parameter(torch.randn(size, width, generator=draw, dtype=torch.float64))

    def forward(self, value: Tensor, host: nn.Module, ctx, given: Tensor) -> Tensor:
        if self.adapter not in ctx.virtual:
            return value
        rows = ctx.virtual[self.adapter]
        assert bool((given[rows] == VIRTUAL).all())
        return value.index_copy(0, rows.flatten(), self.P.repeat(len(rows), 1))


def soft(model: Llama, name: str, size: int) -> Soft:
    delta = Soft(name, size, model.config.hidden_size)
    model.model.embed[name] = delta
    return delta


def by_hand(model: Llama, prompts: list[Soft], tokens: Tensor) -> Tensor:
    """Logits of one example behind trained embeddings: the embeddings are given to the blocks by hand."""
    h = torch.cat([*(p.P for p in prompts), model.model.embed_tokens(tokens)])
    ctx = model.context(Layout.single(len(h)), adapters=())
    with torch.no_grad():
        for block in model.model.layers:
            h = block(h, ctx)
        return model.logits(model.model.norm(h, ctx), ctx)[-len(tokens) :]


def test_virtual_tokens_are_tokens_before_every_example() -> None:
    model = build()
    prompt = soft(model, "a", 3)
    tokens, layout = sample_row()
    ctx = model.context(layout)
    assert ctx.extra == 3 and ctx.layout.parents == (-1, 0, 1, 1, 0), "one root for all examples"
    assert ctx.own_positions().tolist()[:10] == [-1] * 3 + list(range(7))
    ours = logits_of(model, tokens, layout)
    assert ours.shape[0] == layout.tokens
    for segment in range(4):
        rows = torch.from_numpy(layout.rows_of(segment))
        assert torch.allclose(ours[rows], by_hand(model, [prompt], tokens[rows]), rtol=0, atol=1e-12)


def test_two_prompts_stand_in_the_order_of_attachment_and_routes_choose_among_them() -> None:
    model = build()
    a, b = soft(model, "a", 3), soft(model, "b", 2)
    tokens, layout = sample_row()
    routes = [("a", "b"), ("a", "b"), ("a", "b"), ("b",)]
    with torch.no_grad():
        ctx = model.context(layout, routes=routes)
        ours = model.logits(model.run(tokens, ctx), ctx)
    assert ctx.extra == 7 and ctx.virtual["b"].shape == (2, 2) and ctx.virtual["a"].shape == (1, 3)
    for segment, prompts in ((1, [a, b]), (2, [a, b]), (3, [b])):
        rows = torch.from_numpy(layout.rows_of(segment))
        assert torch.allclose(ours[rows], by_hand(model, prompts, tokens[rows]), rtol=0, atol=1e-12)


def test_virtual_tokens_own_cache_slots_and_survive_truncation() -> None:
    model = build()
    prompt = soft(model, "a", 3)
    tokens, _ = sample_row()
    expected = by_hand(model, [prompt], tokens[:9])
    cache = Cache(model.config, 1, 4, torch.float64)
    with torch.no_grad():
        for part in (tokens[:4], tokens[4:6], tokens[6:7]):
            ctx = model.context(Layout.single(len(part)), cache)
            last = model.logits(model.run(part, ctx), ctx)
        assert cache.lengths == [10] and cache.virtual == [3] and ctx.extra == 0
        assert torch.allclose(last[-1], expected[6], rtol=0, atol=1e-12)
        cache.truncate(0, 0)
        assert cache.lengths == [3], "the virtual tokens stay"
        ctx = model.context(Layout.single(9), cache)
        assert torch.allclose(model.logits(model.run(tokens[:9], ctx), ctx), expected, rtol=0, atol=1e-12)


def test_what_is_shared_must_be_routed_alike() -> None:
    model = build()
    _, layout = sample_row()
    with pytest.raises(ModelError, match="segment 2 uses"):
        model.context(layout, routes=[("a",), ("a",), (), ()])
    with pytest.raises(ModelError, match="give one a segment"):
        model.context(layout, routes=[()])


def test_logits_of_some_rows_need_to_know_which() -> None:
    model = build()
    soft(model, "a", 2)
    tokens, layout = sample_row()
    ctx = model.context(layout, routes=[("a",), ("a",), ("a",), ()])
    with torch.no_grad():
        hidden = model.run(tokens, ctx)
        some = torch.tensor([30, 2, 9])
        with pytest.raises(ModelError, match=r"ctx.at\(rows\)"):
            model.logits(hidden[some], ctx)
        at = ctx.at(some)
        assert sorted(some[at.routes["a"]].tolist()) == [2, 9] and at.rows.tolist() == [32, 4, 11]


def test_a_batch_that_does_not_say_where_prompts_end_is_refused_where_it_matters() -> None:
    model = build()
    soft(model, "a", 1).answer_ends = 2
    with pytest.raises(ModelError, match="answer_ends"):
        model.context(Layout.of([3, 4]))
    model.context(Layout.of([3, 4]), adapters=())


def test_answer_ends_and_infix_tokens_by_hand() -> None:
    told = [False, False, False, True, True, False, False, True]
    example = Example(np.arange(10, 18, dtype=np.int32), np.array(told), "x")
    assert answer_ends(example, 9).tolist() == [3, 2, 1, -1, -1, 2, 1, -1]
    assert answer_ends(example, 2).tolist() == [0, 2, 1, -1, -1, 2, 1, -1]
    assert with_infix(example, 2).ids.tolist() == [10, 11, 12, -1, -2, 13, 14, 15, 16, -1, -2, 17]
    assert with_infix(example, 2).supervised.tolist() == [*told[:3], False, False, *told[3:7], False, False, True]
    prompt = Example(np.arange(3, dtype=np.int32), np.zeros(3, bool), "x")
    assert answer_ends(prompt, 2).tolist() == [0, 2, 1] and with_infix(prompt, 1).ids.tolist() == [0, 1, 2, -1]


def test_what_is_edited_differently_is_not_shared() -> None:
    base = list(range(20))
    long = Example(np.array([*base, 30, 31, 32], np.int32), np.arange(23) >= 22, "x")
    short = Example(np.array([*base, 40], np.int32), np.arange(21) >= 20, "x")
    (plain,) = plan_packs([long, short], budget=100)
    (marked,) = plan_packs([long, short], budget=100, needs=Needs(ends=3))
    assert plain.layout.lengths[0] == 20 and marked.layout.lengths[0] == 17
    assert marked.layout.answer_ends[marked.rows[1]].tolist() == [0] * 17 + [3, 2, 1, -1]
    assert marked.layout.answer_ends[marked.rows[0]].tolist() == [0] * 19 + [3, 2, 1, -1]
