"""Log-probabilities of given continuations: constrained label scoring, multiple choice.

Every (prompt, continuation) is an example of a `Pack`: what several begin with, a prompt above all, stands in the row
once, and the head acts only on positions that predict a token of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.encode import Example, picture_of
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.errors import GenerationError
from tunesmith.inference.generate import evaluation_mode
from tunesmith.inference.prefill import check_adapters, check_prompt, context_limit
from tunesmith.model.llama import Llama

PACK_TOKENS = 4096  # tokens of one pass
HEAD_ROWS = 512  # positions whose logits exist at once
PAIRS = 1024  # laid out at once: bounds what is held of them


@dataclass(frozen=True, slots=True)
class Scored:
    """The summed log-probability of a continuation, its tokens, and how many of them are the likeliest one there."""

    logprob: float
    tokens: int
    likeliest: int

    @property
    def greedy(self) -> bool:
        """Is every token the likeliest one?"""
        return self.likeliest == self.tokens


def score_continuations(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    adapters: tuple[str, ...] | None = None,
    share_prefix: bool = True,
    pack_tokens: int = PACK_TOKENS,
) -> list[Tensor]:
    """For every prompt the summed log-probability of each of its continuations: float64 (continuations,), on the CPU.

    The rest is as in `score_pairs`.
    """
    if len(prompts) != len(continuations):
        raise GenerationError(
            f"scoring: {len(prompts)} prompts but {len(continuations)} lists of continuations; give one a prompt"
        )
    pairs, names = [], []
    for number, (prompt, options) in enumerate(zip(prompts, continuations, strict=True), start=1):
        check_prompt(model.config, prompt, f"prompt {number}", room=0)
        pairs += [(prompt, tokens) for tokens in options]
        names += [f"prompt {number}, continuation {option}" for option in range(1, len(options) + 1)]
    scored = iter(
        score_pairs(model, pairs, adapters=adapters, share_prefix=share_prefix, pack_tokens=pack_tokens, names=names)
    )
    return [torch.tensor([next(scored).logprob for _ in options], dtype=torch.float64) for options in continuations]


@torch.inference_mode()
def score_pairs(
    model: Llama,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    adapters: tuple[str, ...] | None = None,
    share_prefix: bool = True,
    pack_tokens: int = PACK_TOKENS,
    names: Sequence[str] = (),
) -> list[Scored]:
    """The score of the second of each pair of token ids after the first, in order.

    `adapters`: the attached ones that act (None: all, (): the bare base). `share_prefix=False` computes every pair on
    its own. `names` stand for the pairs in errors. Raises GenerationError for an empty prompt or continuation, or one
    that does not fit into the model's context; AdapterError for an adapter that is not attached.
    """
    check_adapters(model, adapters)
    for i, pair in enumerate(pairs):
        _check(model, *pair, names[i] if names else f"pair {i + 1}", i > 0 and pair[0] is pairs[i - 1][0])
    result: list[Scored] = []
    with evaluation_mode(model):
        needs = model.needs(adapters)
        for first in range(0, len(pairs), PAIRS):
            some = pairs[first : first + PAIRS]
            found: dict[int, Scored] = {}
            for pack in plan_packs(
                [_example(*pair) for pair in some],
                budget=pack_tokens,
                share=share_prefix,
                device=model.device,
                needs=needs,
            ):
                targets = [np.asarray(some[i][1], np.int64) for i in pack.examples]
                found |= zip(pack.examples, _scores(model, pack, targets, adapters), strict=True)
            result += [found[i] for i in range(len(some))]
    return result


def _example(prompt: Sequence[int], continuation: Sequence[int]) -> Example:
    """What the model must read: everything but the last token, which only has to be predicted."""
    ids = np.asarray([*prompt, *continuation[:-1]], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), "", picture=picture_of(prompt))


def _scores(model: Llama, pack: Pack, targets: Sequence[np.ndarray], adapters: tuple[str, ...] | None) -> list[Scored]:
    """The log-probability of each packed example's targets, summed, and how many of them are the likeliest."""
    ctx = model.context(pack.layout, adapters=adapters)
    hidden = model.run(pack.tokens, ctx)
    where = np.concatenate([row[len(row) - len(target) :] for row, target in zip(pack.rows, targets, strict=True)])
    owner = torch.from_numpy(np.repeat(np.arange(len(targets)), [len(target) for target in targets]))
    rows, place = np.unique(where, return_inverse=True)  # a prompt's last position serves all of its continuations
    target = np.concatenate(targets)
    sums, likeliest = torch.zeros(len(targets), dtype=torch.float64), torch.zeros(len(targets), dtype=torch.int64)
    for first in range(0, len(rows), HEAD_ROWS):
        logits = model.logits(hidden[torch.from_numpy(rows[first : first + HEAD_ROWS]).to(hidden.device)], ctx)
        chances = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        here = np.flatnonzero((place >= first) & (place < first + HEAD_ROWS))
        at, wanted = (torch.from_numpy(a[here]).to(chances.device) for a in (place - first, target))
        sums.index_add_(0, owner[here], chances[at, wanted].double().cpu())
        likeliest.index_add_(0, owner[here], (chances.argmax(-1)[at] == wanted).long().cpu())
    counts = map(len, targets)
    return [Scored(*found) for found in zip(sums.tolist(), counts, likeliest.tolist(), strict=True)]


def _check(model: Llama, prompt: Sequence[int], tokens: Sequence[int], name: str, prompt_is_checked: bool) -> None:
    limit, vocab = context_limit(model.config), model.config.vocab_size
    if not prompt_is_checked:
        check_prompt(model.config, prompt, f"{name}: the prompt", room=0)  # the last token is never fed
    if not len(tokens):
        raise GenerationError(f"{name}: holds no token, so it has no probability; give it a text")
    if min(tokens) < 0 or max(tokens) >= vocab:
        raise GenerationError(f"{name}: a token is outside of the vocabulary of {vocab}; use this model's tokenizer")
    if limit is not None and len(prompt) + len(tokens) > limit + 1:
        raise GenerationError(
            f"{name}: {len(prompt)} + {len(tokens)} tokens exceed the model's context of {limit}; shorten the prompt"
        )
