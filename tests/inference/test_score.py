"""Scores of continuations equal a plain pass of transformers over every (prompt, continuation) by itself."""

from __future__ import annotations

import pytest
import torch

from tunesmith.errors import AdapterError, GenerationError
from tunesmith.inference import score_continuations, score_pairs

OPTIONS = [
    [[5], [6]],  # labels of one token
    [[5, 7, 9], [5, 7, 9, 11], [8]],  # one begins another
    [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8, 9, 11], [4]],
    [[3]],
    [],
    [[5], [5]],
]


def theirs(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> float:
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))


@pytest.mark.parametrize("pack_tokens", [1, 40, 4096])
@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_transformers(twins, prompts: list[list[int]], share: bool, pack_tokens: int) -> None:
    scores = score_continuations(twins.ours, prompts, OPTIONS, share_prefix=share, pack_tokens=pack_tokens)
    assert [len(s) for s in scores] == [len(o) for o in OPTIONS]
    for prompt, options, got in zip(prompts, OPTIONS, scores, strict=True):
        expected = torch.tensor([theirs(twins.theirs, prompt, tokens) for tokens in options], dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # norms are float32 in both


def test_greedy_is_what_the_argmax_of_transformers_says(twins, prompts: list[list[int]]) -> None:
    pairs = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(3):
            row.append(int(twins.theirs(torch.tensor([row])).logits[0, -1].argmax()))
        likeliest = row[len(prompt) :]
        pairs += [(prompt, likeliest), (prompt, [*likeliest[:2], (likeliest[2] + 1) % 97]), (prompt, [96, *likeliest])]
    found = score_pairs(twins.ours, pairs)
    assert [score.greedy for score in found] == [True, False, False] * len(prompts)
    for score, (prompt, tokens) in zip(found, pairs, strict=True):
        assert score.logprob == pytest.approx(theirs(twins.theirs, prompt, tokens), rel=1e-6, abs=1e-6)


def test_many_pairs_are_laid_out_in_parts(twins, prompts: list[list[int]], monkeypatch) -> None:
    pairs = [(prompt, option) for prompt in prompts for option in ([5, 6], [7])]
    whole = score_pairs(twins.ours, pairs)
    monkeypatch.setattr("tunesmith.inference.score.PAIRS", 5)
    assert [s.logprob for s in score_pairs(twins.ours, pairs)] == pytest.approx([s.logprob for s in whole], rel=1e-9)


def test_shared_tokens_are_computed_once_and_the_head_only_where_needed(twins, prompts: list[list[int]]) -> None:
    fed, read = [], []
    run, logits = twins.ours.run, twins.ours.logits
    twins.ours.run = lambda tokens, ctx: (fed.append(len(tokens)), run(tokens, ctx))[1]
    twins.ours.logits = lambda hidden, ctx: (read.append(len(hidden)), logits(hidden, ctx))[1]
    try:
        score_continuations(twins.ours, prompts[3:] + prompts[5:], [[[1], [2], [3]]] * 4)
    finally:
        del twins.ours.run, twins.ours.logits
    assert sum(read) == 3  # two of the four prompts are equal; three labels need one position
    assert sum(fed) == 11 + 20 + 7 + 20  # the common beginning, its two ends, and the prompt without it


def test_many_positions_go_through_the_head_in_chunks(twins, prompts, monkeypatch) -> None:
    whole = score_continuations(twins.ours, prompts, OPTIONS)
    monkeypatch.setattr("tunesmith.inference.score.HEAD_ROWS", 3)
    chunked = score_continuations(twins.ours, prompts, OPTIONS)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_bad_requests_are_named(twins_maker) -> None:
    model = twins_maker(max_position_embeddings=16).ours
    with pytest.raises(GenerationError, match="2 prompts but 1 lists"):
        score_continuations(model, [[1], [2]], [[[1]]])
    with pytest.raises(GenerationError, match="prompt 1, continuation 2: holds no token"):
        score_continuations(model, [[1]], [[[1], []]])
    with pytest.raises(GenerationError, match="prompt 1: holds no token"):
        score_continuations(model, [[]], [[[1]]])
    with pytest.raises(GenerationError, match="continuation 1: a token is outside of the vocabulary of 97"):
        score_continuations(model, [[1]], [[[97]]])
    with pytest.raises(GenerationError, match=r"15 \+ 3 tokens exceed the model's context of 16"):
        score_continuations(model, [[1] * 15], [[[1, 2, 3]]])
    score_continuations(model, [[1] * 15], [[[1, 2]]])
    with pytest.raises(AdapterError, match="'x' is not attached"):
        score_continuations(model, [[1]], [[[1]]], adapters=("x",))
