"""`forgetting`: a run measured with its adapter off and on, in one process, on the same items.

words and files -> checked and read -> base, then base and adapter -> what was gained, what was forgotten
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.adapters.peft_format import adapter_folder
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.evaluate.forgetting import forgetting as compare
from tunesmith.evaluate.held_out import evaluate_rows
from tunesmith.evaluate.run import METRICS
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import run_tasks
from tunesmith.evaluate.tasks import Result
from tunesmith.evaluation import Evaluation, read_evaluation
from tunesmith.prepare import Loaded

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one side came to: metrics of the rows, results of the tasks."""

    rows: Mapping[str, Any]
    tasks: Mapping[str, Result]


def forgetting(
    target: str | Path,
    *,
    general: Sequence[str],
    tasks: Sequence[str] = (),
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Say = lambda line: None,
    **asked: Any,
) -> dict[str, Any]:
    """Report what a run or an adapter forgot on `general` tasks (NAME=PATH) and gained on `tasks` and on rows.

    `asked`: `data`, `metrics`, `split`, `rows` and `settings`, as for `api.evaluate`; rows are measured where data or
    metrics are named. A method that trained the base's own weights cannot be switched off: its base is loaded again.
    Raises ConfigError, DataError before a model is loaded, AdapterError for what holds no adapter.
    """
    folder = adapter_folder(Path(target))
    if folder is None:
        raise AdapterError(f"{target}: holds no adapter, so nothing was learnt or forgotten; give a run or an adapter")
    if not general:
        raise ConfigError("forgetting: name the general tasks with --general NAME=PATH, such as hellaswag=FILE")
    evaluation = read_evaluation(Path(target), tasks=[*general, *tasks], **asked)
    own = None if base is None else folder

    def load() -> Loaded:
        return api.load(target if base is None else base, adapter=own, dtype=dtype, device=device)

    before, after = _both(evaluation, load, device, say)
    names = [word.partition("=")[0].strip() for word in general]
    report = {"trained": str(target), **compare(before.tasks, after.tasks, names)}
    return {**report, **({"rows": _rows(before.rows, after.rows)} if before.rows else {})}


def _both(evaluation: Evaluation, load: Callable[[], Loaded], device: str, say: Say) -> tuple[Measured, Measured]:
    """(adapter off, adapter on), asked alike: in the template that the adapter was trained with."""
    loaded = load()
    template, adapters = api.acting(loaded)
    on = Subject(loaded.model, loaded.tokenizer, template, adapters=adapters)
    if not any(adapter.base for adapter in loaded.adapters.values()):
        off = replace(on, adapters=())
        return _measure(evaluation, off, say, "adapter off"), _measure(evaluation, on, say, "adapter on")
    after = _measure(evaluation, on, say, "as trained")
    held, path = str(loaded.model.dtype).removeprefix("torch."), loaded.path
    del on, loaded  # one model at a time
    bare = api.load(path, dtype=held, device=device)
    return _measure(evaluation, Subject(bare.model, bare.tokenizer, template, adapters=()), say, "base"), after


def _measure(evaluation: Evaluation, subject: Subject, say: Say, side: str) -> Measured:
    rows: dict[str, Any] = {}
    if evaluation.section is not None:
        rows = evaluate_rows(subject, evaluation.section, evaluation.rows, metrics=evaluation.metrics)
    found = {
        one.asked.task.name: one.result
        for one in run_tasks(subject, evaluation.tasks, lambda line: say(f"{side}: {line}"))
    }
    return Measured(rows, found)


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric that both sides have: before, after, and the gain, above 0 where it became better."""
    found = {}
    for name, metric in METRICS.items():
        if name in before and name in after:
            change = after[name] - before[name]
            gain = change if metric.higher_is_better else -change
            found[name] = {"before": before[name], "after": after[name], "gain": gain}
    return {"count": after.get("rows"), "metrics": found}
