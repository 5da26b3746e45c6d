"""Log-probabilities of given continuations: constrained label scoring, multiple choice.

Every (prompt, continuation) is an example of a `Pack`: what several begin with, a prompt above all, stands in the row
once, and the head acts only on positions that predict a token of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.errors import GenerationError
from tunesmith.inference.generate import evaluation_mode
from tunesmith.inference.prefill import check_adapters, check_prompt, context_limit
from tunesmith.model.llama import Llama

PACK_TOKENS = 4096  # tokens of one pass
HEAD_ROWS = 512  # positions whose logits exist at once


@torch.inference_mode()
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

    `adapters`: the attached ones that act (None: all, (): the bare base). `share_prefix=False` computes every pair on
    its own. Raises GenerationError for an empty prompt or continuation, or one that does not fit into the model's
    context.
    """
    check_adapters(model, adapters)
    _check(model, prompts, continuations)
    result = [torch.zeros(len(options), dtype=torch.float64) for options in continuations]
    pairs = [(i, j) for i, options in enumerate(continuations) for j in range(len(options))]
    examples = [_example(prompts[i], continuations[i][j]) for i, j in pairs]
    with evaluation_mode(model):
        needs = model.needs(adapters)
        for pack in plan_packs(examples, budget=pack_tokens, share=share_prefix, device=model.device, needs=needs):
            targets = [np.asarray(continuations[i][j], np.int64) for i, j in (pairs[e] for e in pack.examples)]
            for example, chance in zip(pack.examples, _sums(model, pack, targets, adapters), strict=True):
                i, j = pairs[example]
                result[i][j] = chance
    return result


def _example(prompt: Sequence[int], continuation: Sequence[int]) -> Example:
    """What the model must read: everything but the last token, which only has to be predicted."""
    ids = np.asarray([*prompt, *continuation[:-1]], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), "")


def _sums(model: Llama, pack: Pack, targets: Sequence[np.ndarray], adapters: tuple[str, ...] | None) -> list[float]:
    """The log-probability of each packed example's targets, summed."""
    ctx = model.context(pack.layout, adapters=adapters)
    hidden = model.run(pack.tokens, ctx)
    where = np.concatenate([row[len(row) - len(target) :] for row, target in zip(pack.rows, targets, strict=True)])
    owner = torch.from_numpy(np.repeat(np.arange(len(targets)), [len(target) for target in targets]))
    rows, place = np.unique(where, return_inverse=True)  # a prompt's last position serves all of its continuations
    target = np.concatenate(targets)
    sums = torch.zeros(len(targets), dtype=torch.float64)
    for first in range(0, len(rows), HEAD_ROWS):
        logits = model.logits(hidden[torch.from_numpy(rows[first : first + HEAD_ROWS]).to(hidden.device)], ctx)
        chances = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        here = np.flatnonzero((place >= first) & (place < first + HEAD_ROWS))
        at, wanted = (torch.from_numpy(a[here]).to(chances.device) for a in (place - first, target))
        sums.index_add_(0, owner[here], chances[at, wanted].double().cpu())
    return sums.tolist()


def _check(model: Llama, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]) -> None:
    if len(prompts) != len(continuations):
        raise GenerationError(
            f"scoring: {len(prompts)} prompts but {len(continuations)} lists of continuations; give one a prompt"
        )
    limit, vocab = context_limit(model.config), model.config.vocab_size
    for number, (prompt, options) in enumerate(zip(prompts, continuations, strict=True), start=1):
        check_prompt(model.config, prompt, f"prompt {number}")
        for option, tokens in enumerate(options, start=1):
            name = f"prompt {number}, continuation {option}"
            if not len(tokens):
                raise GenerationError(f"{name}: holds no token, so it has no probability; give it a text")
            if min(tokens) < 0 or max(tokens) >= vocab:
                raise GenerationError(
                    f"{name}: a token is outside of the vocabulary of {vocab}; use this model's tokenizer"
                )
            if limit is not None and len(prompt) + len(tokens) > limit + 1:  # the last token is never fed
                raise GenerationError(
                    f"{name}: {len(prompt)} + {len(tokens)} tokens exceed the model's context of {limit}; shorten the "
                    "prompt"
                )
