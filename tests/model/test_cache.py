"""Generation through the cache equals the full forward, however the tokens arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, VOCAB, build, logits_of
from torch import Tensor

from tunesmith.errors import GenerationError
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama

PLAIN = replace(TINY, num_hidden_layers=3)
WINDOW = replace(PLAIN, sliding_window=5, window_layers=(0, 2))
CONFIGS = {"plain": PLAIN, "window": WINDOW}


def draw(n: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


class Talk:
    """Sequences fed to a cache piece by piece, each piece's logits held against a full forward over the whole text."""

    def __init__(self, model: Llama, batch: int, capacity: int = 4) -> None:
        self.model, self.cache = model, Cache(model.config, batch, capacity, model.dtype)
        self.texts = [torch.zeros(0, dtype=torch.long) for _ in range(batch)]

    def feed(self, tokens: Tensor, layout: Layout) -> Tensor:
        with torch.no_grad():
            hidden = self.model(tokens, layout, cache=self.cache)
            return self.model.logits(hidden, self.model.context(layout))

    def prompt(self, tokens: Tensor, layout: Layout) -> None:
        logits = self.feed(tokens, layout)
        leaves = [i for i in range(len(layout.lengths)) if i not in layout.parents]
        for i, leaf in enumerate(leaves):
            rows = torch.from_numpy(layout.rows_of(leaf))
            self.texts[i] = tokens[rows]
            self.check(i, logits[rows])

    def go_on(self, *pieces: Tensor) -> None:
        layout = Layout.of([len(p) for p in pieces])
        logits = self.feed(torch.cat(pieces), layout)
        for i, (piece, start) in enumerate(zip(pieces, layout.starts, strict=True)):
            self.texts[i] = torch.cat([self.texts[i], piece])
            self.check(i, logits[start : start + len(piece)])
        assert self.cache.lengths == [len(t) for t in self.texts]

    def check(self, i: int, logits: Tensor) -> None:
        full = logits_of(self.model, self.texts[i], Layout.single(len(self.texts[i])))
        assert torch.allclose(logits, full[len(full) - len(logits) :], atol=1e-11), f"sequence {i}"


@pytest.mark.parametrize("config", CONFIGS)
def test_cache_is_the_full_forward(config: str) -> None:
    talk = Talk(build(CONFIGS[config]), 3)
    talk.prompt(draw(30, 1), Layout.of([6, 3, 9, 8, 4], [-1, 0, 0, -1, 2]))  # two behind a shared prefix, one alone
    for step in range(4):  # unequal lengths: a ragged step
        talk.go_on(*(draw(1, 10 * step + i) for i in range(3)))
    talk.go_on(draw(3, 50), draw(1, 51), draw(7, 52))  # several tokens each
    talk.go_on(draw(2, 53), draw(0, 54), draw(1, 55))  # one says nothing
    talk.go_on(*(draw(1, 60 + i) for i in range(3)))

    talk.cache.keep([2, 0, 2, 1])  # beams: reordered, one twice
    talk.texts = [talk.texts[i] for i in (2, 0, 2, 1)]
    talk.go_on(*(draw(1, 70 + i) for i in range(4)))
    for row, length in enumerate([4, 11, 7, 1]):
        talk.cache.truncate(row, length)
        talk.texts[row] = talk.texts[row][:length]
    talk.go_on(*(draw(2, 80 + i) for i in range(4)))
    talk.cache.keep([1])
    talk.texts = [talk.texts[1]]
    talk.go_on(draw(1, 90))


@pytest.mark.parametrize("config", CONFIGS)
def test_equal_lengths_need_no_mask(config: str) -> None:
    talk = Talk(build(CONFIGS[config]), 2, capacity=64)
    talk.prompt(draw(8, 1), Layout.of([4, 4]))
    for step in range(5):
        talk.go_on(draw(1, step), draw(1, step + 20))
    assert talk.cache.capacity == 64


def test_prompts_of_one_token() -> None:
    talk = Talk(build(PLAIN), 2)
    talk.prompt(draw(2, 1), Layout.of([1, 1]))
    talk.go_on(draw(1, 2), draw(1, 3))


def test_prompts_in_several_rows_of_a_tree_with_an_empty_leaf() -> None:
    talk = Talk(build(PLAIN), 2)
    talk.prompt(draw(9, 1), Layout.of([6, 0, 3], [-1, 0, 0]))  # one prompt is the other's beginning
    talk.go_on(draw(1, 2), draw(1, 3))


def test_nothing_of_the_caller_is_kept_in_the_model() -> None:
    model = build(PLAIN)
    tokens, layout = draw(9, 1), Layout.of([9])
    before = logits_of(model, tokens, layout)
    talk = Talk(model, 1)
    talk.prompt(draw(5, 2), Layout.single(5))
    assert torch.equal(before, logits_of(model, tokens, layout))


def test_misfits_are_refused() -> None:
    model = build(PLAIN)
    with pytest.raises(GenerationError, match="made for 2 sequences, given 1"):
        model(draw(3, 1), Layout.single(3), cache=Cache(PLAIN, 2, 4, model.dtype))
    talk = Talk(model, 2)
    talk.prompt(draw(4, 1), Layout.of([2, 2]))
    with pytest.raises(GenerationError, match="cannot be continued by 3"):
        talk.feed(draw(3, 1), Layout.of([1, 1, 1]))
    with pytest.raises(GenerationError, match="cannot be continued"):
        talk.feed(draw(3, 1), Layout.of([2, 1], [-1, 0]))
