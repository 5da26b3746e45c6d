"""A classification's answers, chosen among the labels and generated freely.

    constrained   argmax_label  sum_t log p(label_t | prompt, label_<t)
    free          the label that the greedy answer names, and no other; white space and case aside

Constrained, every answer is a label. Free, an answer that names no label, or several, is unparsable: it counts as wrong
in `free_accuracy` and is counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.encode import Example, encode_prompt, encode_row
from tunesmith.data.schemas import Row, Turn
from tunesmith.errors import DataError
from tunesmith.evaluate.calibration import BINS, calibration_error, confidence_of
from tunesmith.evaluate.figures import half_interval
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.inference.score import Scored, score_continuations, score_pairs

UNLIMITED = 1 << 30


def accuracy(subject: Subject) -> dict[str, float]:
    """`accuracy` in [0, 1], `accuracy_interval`, half the width of its 95% interval, and `ece` in `ece_bins` bins.

    Raises DataError without labels.
    """
    return accuracy_figures(subject, label_scores(subject))


def accuracy_figures(subject: Subject, scores: Sequence[Tensor]) -> dict[str, float]:
    """The measures of `accuracy`, of each row's label scores."""
    chosen = likeliest_labels(subject, scores)
    right = [label == row.label for label, row in zip(chosen, subject.rows, strict=True)]
    share = sum(right) / len(right)
    return {
        "accuracy": share,
        "accuracy_interval": half_interval(share, len(right)),
        "ece": calibration_error(confidence_of(scores), right).value,
        "ece_bins": BINS,
    }


def free_accuracy(subject: Subject, answers: Sequence[Generation]) -> dict[str, float]:
    """`free_accuracy` of generated labels with its interval, `unparsable_rate`, and `parsed_accuracy` of the others.

    Raises DataError without labels.
    """
    _check(subject)
    named = [parse_label(answer.text, subject.labels) for answer in answers]
    right = sum(name == row.label for name, row in zip(named, subject.rows, strict=True))
    parsed = len(named) - named.count(None)
    return {
        "free_accuracy": right / len(named),
        "free_accuracy_interval": half_interval(right / len(named), len(named)),
        "unparsable_rate": 1 - parsed / len(named),
        "parsed_accuracy": right / parsed if parsed else 0.0,
    }


def parse_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names as whole words, unless it names none or several."""
    longest = sorted(labels, key=len, reverse=True)  # "very good" is not "good"
    pattern = "|".join(rf"(?<!\w){re.escape(label)}(?!\w)" for label in longest)
    found = {match.casefold() for match in re.findall(pattern, answer, re.IGNORECASE)}
    named = [label for label in labels if label.casefold() in found]
    return named[0] if len(named) == 1 else None


def predict_labels(subject: Subject) -> list[str]:
    """The likeliest label of every row. Raises DataError where there are no labels to choose from."""
    return likeliest_labels(subject, label_scores(subject))


def likeliest_labels(subject: Subject, scores: Sequence[Tensor]) -> list[str]:
    """The label of the highest score, row by row."""
    return [subject.labels[int(score.argmax())] for score in scores]


@dataclass(frozen=True)
class Both:
    """Of every row the score of each label, float64 (labels,), and that of its own whole answer."""

    labels: list[Tensor]
    answers: list[Scored]


def score_both(subject: Subject) -> Both | None:
    """Labels and answers in one pass over the rows: the prompt, which is nearly all of a row, is read once for both.

    None where an example is not its row's prompt with the one answer behind it, such as a row whose prompt was cut:
    two passes read different tokens there. Raises DataError without labels.
    """
    _check(subject)
    options = label_options(subject)
    prompts, continuations = [], []
    for row, example in zip(subject.rows, subject.examples, strict=True):
        prompt = encode_prompt(row, subject.template, subject.tokenizer)
        if not _is_whole(example, prompt):
            return None
        prompts.append(prompt)
        continuations.append([*options, example.ids[len(prompt) :].tolist()])
    pairs = [(prompt, one) for prompt, several in zip(prompts, continuations, strict=True) for one in several]
    scored = iter(score_pairs(subject.model, pairs, adapters=subject.adapters, pack_tokens=subject.budget))
    both = Both([], [])
    for _ in prompts:
        both.labels.append(torch.tensor([next(scored).logprob for _ in options], dtype=torch.float64))
        both.answers.append(next(scored))
    return both


def _is_whole(example: Example, prompt: Sequence[int]) -> bool:
    """Is it the prompt, and then nothing but tokens to learn?"""
    answer = np.arange(len(example.ids)) >= len(prompt)
    same = len(example.ids) > len(prompt) and np.array_equal(example.ids[: len(prompt)], np.asarray(prompt))
    return same and np.array_equal(example.supervised, answer)


def label_scores(subject: Subject) -> list[Tensor]:
    """The log-probability of each label, float64 (labels,), for every row. Raises DataError without labels."""
    _check(subject)
    options = label_options(subject)
    prompts = [encode_prompt(row, subject.template, subject.tokenizer) for row in subject.rows]
    return score_continuations(
        subject.model, prompts, [options] * len(prompts), adapters=subject.adapters, pack_tokens=subject.budget
    )


def label_options(subject: Subject) -> list[list[int]]:
    """The tokens of each label as an answer, without the ending that all of them share."""
    return _without_common_ending([label_tokens(subject, label) for label in subject.labels])


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


def _check(subject: Subject) -> None:
    if len(subject.labels) < 2:
        raise DataError(
            f"accuracy: needs rows with at least two labels, found {list(subject.labels)}; use text and label rows, or "
            "measure exact_match"
        )
    if not subject.rows:
        raise DataError("accuracy: there are no rows to measure on; give data.valid or data.valid_size")


def _without_common_ending(options: Sequence[list[int]]) -> list[list[int]]:
    """Drop the end-of-turn tokens that all labels share, unless one label is then the beginning of another."""
    shared = 0
    while all(len(o) > shared + 1 for o in options) and len({o[-1 - shared] for o in options}) == 1:
        shared += 1
    cut = [o[: len(o) - shared] for o in options]
    nested = any(a is not b and a == b[: len(a)] for a in cut for b in cut)
    return list(options) if nested else cut
