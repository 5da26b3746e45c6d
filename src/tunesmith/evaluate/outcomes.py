"""What a metric is made of, row by row: paired tests compare two models on the same rows.

metric = sum_i value_i / sum_i weight_i      accuracy: right or wrong, weight 1
                                             eval_loss: a row's summed loss, its supervised tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tunesmith.data.pack import plan_packs
from tunesmith.errors import DataError
from tunesmith.evaluate.classification import likeliest_labels, predict_labels, score_both
from tunesmith.evaluate.generations import greedy_answers
from tunesmith.evaluate.subject import Subject


@dataclass(frozen=True)
class Outcomes:
    """A row's part in a metric, in the order of the rows: `values` and `weights`, alike in length."""

    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The metric over all rows."""
        return math.fsum(self.values) / math.fsum(self.weights)

    @property
    def binary(self) -> bool:
        """Is every row simply right or wrong?"""
        return set(self.values) <= {0.0, 1.0} and set(self.weights) <= {1.0}


def accuracy_outcomes(subject: Subject) -> Outcomes:
    """Is the likeliest label the row's own?"""
    return _right_labels(subject, predict_labels(subject))


def exact_match_outcomes(subject: Subject) -> Outcomes:
    """Is the greedy answer the row's own, white space at the ends aside?"""
    answers = greedy_answers(subject)
    return _rights(a.text.strip() == row.turns[-1].text.strip() for a, row in zip(answers, subject.rows, strict=True))


@torch.no_grad()
def loss_outcomes(subject: Subject) -> Outcomes:
    """Each row's summed loss in nats and its supervised tokens. Raises DataError where no token is supervised.

    Beginnings are not shared between rows, so that each target belongs to one of them.
    """
    values, weights = np.zeros(len(subject.examples)), np.zeros(len(subject.examples))
    model, adapters = subject.model, subject.adapters
    packs = plan_packs(
        subject.examples, budget=subject.budget, share=False, device=model.device, needs=model.needs(adapters)
    )
    for pack in packs:
        ctx = model.context(pack.layout, adapters=adapters)
        hidden = model.run(pack.tokens, ctx, rows=pack.read).index_select(0, pack.place)
        parts = model.logits_in_parts(hidden, ctx)
        losses = [functional.cross_entropy(logits, pack.target[rows], reduction="none") for rows, logits in parts]
        loss = torch.cat(losses).double().cpu().numpy() if losses else np.zeros(0)
        weight = pack.weight.cpu().numpy()
        starts = [int(places[0]) for places in pack.rows]  # a row of the pack follows another, so positions tell them
        owner = np.searchsorted(starts, pack.where.cpu().numpy(), side="right") - 1
        rows_of = np.asarray(pack.examples)[owner]
        np.add.at(values, rows_of, loss * weight)
        np.add.at(weights, rows_of, weight)
    if not weights.sum():
        raise DataError("evaluation: no row has a supervised token; look at them with `tunesmith data preview`")
    return Outcomes(tuple(values.tolist()), tuple(weights.tolist()))


def row_outcomes(subject: Subject, names: Iterable[str]) -> dict[str, Outcomes]:
    """The rows' parts in those of the metrics `names` that are made of rows, by name."""
    wanted = [name for name in names if name in OUTCOMES]
    both = score_both(subject) if {"accuracy", "eval_loss"} <= set(wanted) else None
    if both is None:
        return {name: OUTCOMES[name](subject) for name in wanted}
    answers = both.answers
    known = {
        "accuracy": _right_labels(subject, likeliest_labels(subject, both.labels)),
        "eval_loss": Outcomes(tuple(-one.logprob for one in answers), tuple(float(one.tokens) for one in answers)),
    }
    return {name: known.get(name) or OUTCOMES[name](subject) for name in wanted}


def _right_labels(subject: Subject, labels: Iterable[str]) -> Outcomes:
    return _rights(label == row.label for label, row in zip(labels, subject.rows, strict=True))


def _rights(right: Iterable[bool]) -> Outcomes:
    values = tuple(float(one) for one in right)
    return Outcomes(values, (1.0,) * len(values))


OUTCOMES: Mapping[str, Callable[[Subject], Outcomes]] = {
    "accuracy": accuracy_outcomes,
    "exact_match": exact_match_outcomes,
    "eval_loss": loss_outcomes,
}
