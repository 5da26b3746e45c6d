"""Measures by name: one table, one function that runs what was asked for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.evaluate.classification import accuracy, accuracy_figures, free_accuracy, score_both
from tunesmith.evaluate.generations import distinct_rates, exact_match, greedy_answers, never_stops, prompt_copy_rate
from tunesmith.evaluate.language_model import language_model_metrics, loss_figures
from tunesmith.evaluate.overlap import LIBRARY, overlap_rates
from tunesmith.evaluate.subject import Subject


@dataclass(frozen=True)
class Metric:
    """How a metric is measured (several may come of one pass), and which way is better.

    Where it is `of_answers`, `measure` also takes the greedy answers, which all such metrics share. `extra` is the one
    of Tunesmith's extras whose `library` it needs.
    """

    measure: Callable[..., dict[str, float]]
    higher_is_better: bool
    of_answers: bool = False
    extra: str = ""
    library: str = ""


def _language_model(subject: Subject) -> dict[str, float]:
    return language_model_metrics(subject.model, subject.examples, budget=subject.budget, adapters=subject.adapters)


METRICS: dict[str, Metric] = {
    "eval_loss": Metric(_language_model, False),
    "perplexity": Metric(_language_model, False),
    "mean_token_accuracy": Metric(_language_model, True),
    "accuracy": Metric(accuracy, True),
    "ece": Metric(accuracy, False),
    "free_accuracy": Metric(free_accuracy, True, of_answers=True),
    "unparsable_rate": Metric(free_accuracy, False, of_answers=True),
    "exact_match": Metric(exact_match, True, of_answers=True),
    "rouge_l": Metric(overlap_rates, True, True, "overlap", LIBRARY),
    "token_f1": Metric(overlap_rates, True, True, "overlap", LIBRARY),
    "squad_match": Metric(overlap_rates, True, True, "overlap", LIBRARY),
    "prompt_copy_rate": Metric(prompt_copy_rate, False, of_answers=True),
    "unfinished_rate": Metric(never_stops, False, of_answers=True),
    "looping_rate": Metric(never_stops, False, of_answers=True),
    "distinct_1": Metric(distinct_rates, True, of_answers=True),
    "distinct_2": Metric(distinct_rates, True, of_answers=True),
    "unique_rate": Metric(distinct_rates, True, of_answers=True),
}


def find_metric(name: str, where: str = "evaluate.metrics") -> Metric:
    """The metric called `name`. Raises ConfigError with the nearest name, or where its library is not installed."""
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise ConfigError(f"{where}: there is no metric {name!r}{did_you_mean(name, METRICS)}; there are {known}")
    metric = METRICS[name]
    if metric.library and importlib.util.find_spec(metric.library) is None:
        raise ConfigError(f"{where}: {name} needs {metric.library}; pip install 'tunesmith[{metric.extra}]'")
    return metric


def chooses_labels(names: Sequence[str]) -> bool:
    """Is any of these metrics a choice among labels?"""
    return any(find_metric(name).measure in (accuracy, free_accuracy) for name in names)


def measure(subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """Measure `names`, each pass over the rows once. Raises ConfigError for a name that is not known."""
    passes = {metric.measure: metric.of_answers for metric in map(find_metric, names)}
    answers = [greedy_answers(subject)] if any(passes.values()) else []
    found = _loss_and_accuracy(subject) if passes.keys() >= {_language_model, accuracy} else {}
    left = {one: of for one, of in passes.items() if not (found and one in (_language_model, accuracy))}
    for one, of_answers in left.items():
        found |= one(subject, *(answers if of_answers else ()))
    return found


def _loss_and_accuracy(subject: Subject) -> dict[str, float]:
    """What `_language_model` and `accuracy` measure, in one pass; nothing where that takes two."""
    both = score_both(subject)
    if both is None:
        return {}
    loss = -math.fsum(one.logprob for one in both.answers)
    correct, tokens = (sum(getattr(one, field) for one in both.answers) for field in ("likeliest", "tokens"))
    return {**loss_figures(loss, correct, tokens), **accuracy_figures(subject, both.labels)}
