"""Measures by name: one table, one function that runs what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.evaluate.classification import accuracy
from tunesmith.evaluate.generations import exact_match, prompt_copy_rate, unfinished_rate
from tunesmith.evaluate.language_model import language_model_metrics
from tunesmith.evaluate.subject import Subject


@dataclass(frozen=True)
class Metric:
    """How a metric is measured (several may come of one pass), and which way is better."""

    measure: Callable[[Subject], dict[str, float]]
    higher_is_better: bool


def _language_model(subject: Subject) -> dict[str, float]:
    return language_model_metrics(subject.model, subject.examples, budget=subject.budget, adapters=subject.adapters)


METRICS: dict[str, Metric] = {
    "eval_loss": Metric(_language_model, False),
    "perplexity": Metric(_language_model, False),
    "mean_token_accuracy": Metric(_language_model, True),
    "accuracy": Metric(accuracy, True),
    "exact_match": Metric(exact_match, True),
    "prompt_copy_rate": Metric(prompt_copy_rate, False),
    "unfinished_rate": Metric(unfinished_rate, False),
}


def find_metric(name: str, where: str = "evaluate.metrics") -> Metric:
    """The metric called `name`. Raises ConfigError with the nearest name."""
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise ConfigError(f"{where}: there is no metric {name!r}{did_you_mean(name, METRICS)}; there are {known}")
    return METRICS[name]


def measure(subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """Measure `names`, each pass over the rows once. Raises ConfigError for a name that is not known."""
    passes = list(dict.fromkeys(find_metric(name).measure for name in names))
    return {key: value for one in passes for key, value in one(subject).items()}
