"""Loss and token accuracy on held-out rows: the same targets and the same packs as in training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from tunesmith.data.encode import Example
from tunesmith.data.pack import plan_packs
from tunesmith.errors import DataError
from tunesmith.model.llama import Llama

UNIFORM = 1e-3  # how near to ln(vocabulary) a loss must come to look like uniform logits


@torch.no_grad()
def language_model_metrics(
    model: Llama, examples: Sequence[Example], *, budget: int, adapters: tuple[str, ...] | None = None
) -> dict[str, float]:
    """`eval_loss` (mean over supervised tokens, in nats), `perplexity` of them and `mean_token_accuracy` (greedy, in
    [0, 1]).

    Raises DataError where no token is supervised.
    """
    loss = correct = tokens = 0.0
    for pack in plan_packs(examples, budget=budget, device=model.device, needs=model.needs(adapters)):
        ctx = model.context(pack.layout, adapters=adapters)
        hidden = model.run(pack.tokens, ctx, rows=pack.read).index_select(0, pack.place)
        for rows, logits in model.logits_in_parts(hidden, ctx):
            weight, target = pack.weight[rows], pack.target[rows]
            loss += float((functional.cross_entropy(logits, target, reduction="none") * weight).sum())
            correct += float(((logits.argmax(-1) == target) * weight).sum())
        tokens += pack.supervised
    return loss_figures(loss, correct, tokens)


def loss_figures(loss: float, correct: float, tokens: float) -> dict[str, float]:
    """The three measures of a summed loss and of as many correct tokens. Raises DataError without supervised tokens."""
    if not tokens:
        raise DataError("evaluation: no row has a supervised token; look at them with `tunesmith data preview`")
    mean = loss / tokens
    return {"eval_loss": mean, "perplexity": perplexity_of(mean), "mean_token_accuracy": correct / tokens}


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def is_uniform(loss: float, vocab_size: int) -> bool:
    """Is a loss that of equal chances for all tokens? Then weights were not loaded, or never trained."""
    return abs(loss - math.log(vocab_size)) < UNIFORM
