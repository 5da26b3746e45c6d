"""Accuracy of a classification by constrained scoring: the label whose tokens the model gives the highest probability.

    argmax_label  sum_t log p(label_t | prompt, label_<t)

Every answer is a label by construction, so nothing is unparsable; `exact_match` measures free generation instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tunesmith.data.encode import encode_prompt, encode_row
from tunesmith.data.schemas import Row, Turn
from tunesmith.errors import DataError
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.score import score_continuations

UNLIMITED = 1 << 30


def accuracy(subject: Subject) -> dict[str, float]:
    """`accuracy` in [0, 1] and `accuracy_interval`, half the width of its 95% interval.

    Raises DataError without labels.
    """
    predicted = predict_labels(subject)
    right = sum(p == row.label for p, row in zip(predicted, subject.rows, strict=True))
    share = right / len(predicted)
    return {"accuracy": share, "accuracy_interval": half_interval(share, len(predicted))}


def predict_labels(subject: Subject) -> list[str]:
    """The likeliest label of every row. Raises DataError where there are no labels to choose from."""
    if len(subject.labels) < 2:
        raise DataError(
            f"accuracy: needs rows with at least two labels, found {list(subject.labels)}; use text and label rows, or "
            "measure exact_match"
        )
    if not subject.rows:
        raise DataError("accuracy: there are no rows to measure on; give data.valid or data.valid_size")
    options = [label_tokens(subject, label) for label in subject.labels]
    options = _without_common_ending(options)
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    scores = score_continuations(
        subject.model, prompts, [options] * len(prompts), adapters=subject.adapters, pack_tokens=subject.budget
    )
    return [subject.labels[int(score.argmax())] for score in scores]


def label_tokens(subject: Subject, label: str) -> list[int]:
    """The tokens that the template makes of `label` as an answer, its end included."""
    row = with_label(subject.rows[0], label)
    prompt = encode_prompt(row, subject.template, subject.tokenizer)
    whole = encode_row(row, subject.template, subject.tokenizer, cutoff=UNLIMITED)
    return [int(token) for token in whole.ids[len(prompt) :]]


def with_label(row: Row, label: str) -> Row:
    """The row as if `label` were its answer."""
    fields = {**row.fields, "label": label, "output": label}
    return replace(row, label=label, turns=(*row.turns[:-1], Turn("assistant", label, True)), fields=fields)


def half_interval(share: float, count: int) -> float:
    """Half the width of the 95% interval of a share of `count` trials (Wilson's score interval)."""
    z = 1.959964
    return z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))


def _without_common_ending(options: Sequence[list[int]]) -> list[list[int]]:
    """Drop the end-of-turn tokens that all labels share, unless one label is then the beginning of another."""
    shared = 0
    while all(len(o) > shared + 1 for o in options) and len({o[-1 - shared] for o in options}) == 1:
        shared += 1
    cut = [o[: len(o) - shared] for o in options]
    nested = any(a is not b and a == b[: len(a)] for a in cut for b in cut)
    return list(options) if nested else cut
