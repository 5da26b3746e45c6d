"""What training gained and what it forgot: the same measures with the adapter off and with it on.

    forgotten = mean over general tasks of (accuracy before - accuracy after)                   (arXiv:2405.09673)

Tasks whose main figure is an accuracy make that mean; those where less is better, as perplexity, stand by themselves.
Both sides answer the same items, so the interval of a change is that of a mean of paired differences d:

    m +- z s / sqrt(n);  of right and wrong answers (Agresti and Min 2005), where b items were lost and c gained:
    (c - b) / N +- z sqrt(b + c - (c - b)^2 / N) / N,  1/2 added to b and c, 2 to N:  not 0 wide where nothing changed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.evaluate.figures import Figure, Z, mean
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import Asked, parse_settings, read_tasks, run_tasks
from tunesmith.evaluate.tasks import Result

Results = Mapping[str, Result]  # by the task's name


@dataclass(frozen=True)
class Change:
    """A task's main figure before and after; `change` is after - before, with the interval of paired differences."""

    figure: str
    before: float
    after: float
    change: float
    interval: tuple[float, float] | None
    higher_is_better: bool


def general_sets(words: Sequence[str], items: int | None) -> tuple[Asked, ...]:
    """The tasks of words NAME=PATH, with settings as NAME.KEY=VALUE among them; the first `items` of each.

    Raises ConfigError, DataError.
    """
    settings = [word for word in words if "." in word.partition("=")[0]]
    try:
        return tuple(read_tasks([word for word in words if word not in settings], parse_settings(settings), items))
    except ConfigError as error:
        raise ConfigError(f"evaluate.general: {str(error).removeprefix('--task').lstrip(': ')}") from None


def general_metrics(subject: Subject, asked: Sequence[Asked]) -> dict[str, float]:
    """`general.TASK`, each task's main figure, and `general_accuracy`, the mean of those that are accuracies."""
    found = {one.asked.task.name: _main(one.result)[1] for one in run_tasks(subject, asked, lambda line: None)}
    accuracies = [figure.value for figure in found.values() if figure.higher_is_better]
    measured = {f"general.{name}": figure.value for name, figure in found.items()}
    return measured | ({"general_accuracy": sum(accuracies) / len(accuracies)} if accuracies else {})


def with_forgetting(measured: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """The measures of a moment of training, and `forgetting`: by how much general_accuracy fell since `before`."""
    if "general_accuracy" not in measured or "general_accuracy" not in before:
        return dict(measured)
    return {**measured, "forgetting": before["general_accuracy"] - measured["general_accuracy"]}


def forgetting(before: Results, after: Results, general: Sequence[str]) -> dict[str, Any]:
    """Report the tasks in `general` as what may have been forgotten, all others as the target, figure by figure."""
    changes = {name: change_of(before[name], after[name]) for name in before}
    accuracies = [name for name in general if changes[name].higher_is_better]
    report: dict[str, Any] = {"general": _together(accuracies, changes)} if accuracies else {}
    parts = {
        "general_tasks": accuracies,
        "general_text": [name for name in general if name not in accuracies],
        "target": [name for name in before if name not in general],
    }
    for part, names in parts.items():
        if names:
            report[part] = {name: {**asdict(changes[name]), **_others(before[name], after[name])} for name in names}
    return report


def change_of(before: Result, after: Result) -> Change:
    """How the main figure of a task changed, which was measured twice on the same items."""
    name, figure = _main(before)
    now = after.figures[name]
    interval = None
    if name in before.each and name in after.each:
        interval = paired_interval(before.each[name], after.each[name])
    return Change(name, figure.value, now.value, now.value - figure.value, interval, figure.higher_is_better)


def _main(result: Result) -> tuple[str, Figure]:
    return next(iter(result.figures.items()))


def _others(before: Result, after: Result) -> dict[str, Any]:
    """The other figures that both have, and how the task was measured."""
    both = [name for name in list(before.figures)[1:] if name in after.figures]
    figures = {name: {"before": before.figures[name].value, "after": after.figures[name].value} for name in both}
    stated = {key: value for key, value in after.stated.items() if before.stated.get(key) == value}
    return {"figures": figures, "items": _main(before)[1].count, "stated": stated}


def _together(names: Sequence[str], changes: Mapping[str, Change]) -> dict[str, Any]:
    """The mean over tasks, each counting alike; its variance is the sum of theirs over the square of their number."""
    before, after = (sum(getattr(changes[n], side) for n in names) / len(names) for side in ("before", "after"))
    forgotten = before - after
    interval: list[float] | None = None
    ends = [found for n in names if (found := changes[n].interval) is not None]
    if len(ends) == len(names):
        middle = -math.fsum(low + high for low, high in ends) / 2 / len(names)
        half = math.hypot(*((high - low) / 2 for low, high in ends)) / len(names)
        interval = [middle - half, middle + half]
    return {"tasks": list(names), "before": before, "after": after, "forgotten": forgotten, "interval": interval}


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of after - before; None for a single item that is not right or wrong."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if not {*before, *after} <= {0.0, 1.0}:
        return mean(differences).interval
    lost, gained, count = differences.count(-1) + 0.5, differences.count(1) + 0.5, len(differences) + 2
    middle = (gained - lost) / count
    half = Z * math.sqrt(lost + gained - (gained - lost) ** 2 / count) / count
    return max(-1.0, middle - half), min(1.0, middle + half)
