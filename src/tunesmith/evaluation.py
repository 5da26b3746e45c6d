"""`evaluate`: rows with metrics, published sets as tasks, tasks of lm-evaluation-harness, in one report.

words and files -> checked and read -> (a model is loaded) -> rows, tasks, harness -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import DataSection, load_run
from tunesmith.data.schemas import Row
from tunesmith.errors import ConfigError
from tunesmith.evaluate.held_out import evaluate_rows, read_split
from tunesmith.evaluate.run import find_metric
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import Asked, parse_settings, read_tasks, run_tasks
from tunesmith.files import atomic_write_text
from tunesmith.prepare import held_out_rows

if TYPE_CHECKING:
    from tunesmith.evaluate.harness import Harness

HARNESS = "harness"  # its settings are harness.KEY=VALUE


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured; everything that can be read without a model has been."""

    section: DataSection | None
    rows: Sequence[Row]
    metrics: tuple[str, ...]
    tasks: Sequence[Asked]
    harness: Harness | None
    limit: int | None

    def measure(self, subject: Subject, say: Callable[[str], None], items: Path | None = None) -> dict[str, Any]:
        """The report; `items` is a file for a line about every item of the tasks. `say` is told what goes on."""
        report: dict[str, Any] = {}
        if self.section is not None:
            found = evaluate_rows(subject, self.section, self.rows, metrics=self.metrics)
            report |= {"data": self.section.train, **found}
        if self.tasks:
            lines, tasks = [], {}
            for one in run_tasks(subject, self.tasks, say):
                tasks[one.asked.task.name] = one.to_dict()
                lines += [{"task": one.asked.task.name, **sample} for sample in one.result.samples]
                if items is not None:  # after every task, so that an interrupt keeps what was measured
                    atomic_write_text(items, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            report["tasks"] = tasks
        if self.harness is not None:
            report[HARNESS] = self.harness.run(subject, self.limit)
        return report


def read_evaluation(
    target: Path,
    *,
    data: str | None = None,
    metrics: Sequence[str] = (),
    split: str = "test",
    rows: int | None = None,
    tasks: Sequence[str] = (),
    settings: Sequence[str] = (),
    harness: Sequence[str] = (),
) -> Evaluation:
    """Read what is asked for. Rows are measured where data or metrics are named, or nothing else is.

    `rows` limits rows, items of tasks and items of the harness's tasks alike. Raises ConfigError, DataError.
    """
    for name in metrics:
        find_metric(name, "--metrics")
    given = parse_settings(settings)
    library = _harness(harness, given.pop(HARNESS, {}))
    asked = read_tasks(tasks, given, rows)
    section: DataSection | None = None
    found: list[Row] = []
    if data is not None or metrics or not (tasks or harness):
        section, found = _rows(target, data, split)
    return Evaluation(section, found[:rows], tuple(metrics), asked, library, rows)


def _harness(names: Sequence[str], settings: Mapping[str, Any]) -> Harness | None:
    if not names and not settings:
        return None
    if not names:
        raise ConfigError(f"{HARNESS}.{next(iter(settings))}: no task of the harness is asked for; give --harness NAME")
    if len(set(names)) < len(names):
        raise ConfigError(f"--harness {', '.join(names)}: a task is asked for twice")
    from tunesmith.evaluate.harness import find_harness  # slow to import, and an extra

    return find_harness(names, settings)


def _rows(target: Path, data: str | None, split: str) -> tuple[DataSection, list[Row]]:
    config = target / "config.yaml"
    if data is not None:
        section = DataSection(train=data)
        return section, read_split(section, split)
    if config.is_file():
        run, _ = load_run(config, [], {})
        return run.data, list(held_out_rows(run) or read_split(run.data, split))
    raise ConfigError("evaluate: say on which data with --data (a run folder has its own), or which --task NAME=PATH")
