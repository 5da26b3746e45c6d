"""`evaluate`: rows with metrics, published sets as tasks, tasks of lm-evaluation-harness, in one report.

words and files -> checked and read -> (a model is loaded) -> rows, tasks, harness -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import DataSection, validate_section
from tunesmith.data.schemas import Row
from tunesmith.errors import CatalogError, ConfigError, DataError, did_you_mean
from tunesmith.evaluate.held_out import evaluate_rows, read_split
from tunesmith.evaluate.run import chooses_labels, find_metric
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import Asked, parse_settings, read_tasks, run_tasks
from tunesmith.evaluate.trained import as_trained, ask_as_trained, trained_run, unknown_labels
from tunesmith.files import atomic_write_text
from tunesmith.prepare import held_out_rows

if TYPE_CHECKING:
    from tunesmith.config import Run
    from tunesmith.evaluate.harness import Harness

HARNESS = "harness"  # its settings are harness.KEY=VALUE
ROWS = "data"  # those of the rows are data.KEY=VALUE
ROW_KEYS = ("schema", "instruction", "labels", "cutoff", "cut", "captions")  # what makes prompts and answers of rows


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

    `rows` limits rows, items of tasks and items of the harness's tasks alike. Rows are asked as the run at `target` was
    trained, unless `settings` say otherwise as "data.KEY=VALUE". Raises ConfigError, DataError.
    """
    for name in metrics:
        find_metric(name, "--metrics")
    given = parse_settings(settings)
    library = _harness(harness, given.pop(HARNESS, {}))
    of_rows = given.pop(ROWS, {})
    asked = read_tasks(tasks, given, rows)
    section: DataSection | None = None
    found: list[Row] = []
    if data is not None or metrics or not (tasks or harness):
        section, found = _rows(target, data, split, of_rows)
        found = found[:rows]
        if not metrics or chooses_labels(metrics):
            _check_labels(found, section.labels)
    elif of_rows:
        raise ConfigError(f"{ROWS}.{next(iter(of_rows))}: no rows are measured; give --data or --metrics")
    return Evaluation(section, found, tuple(metrics), asked, library, rows)


def _harness(names: Sequence[str], settings: Mapping[str, Any]) -> Harness | None:
    if not names and not settings:
        return None
    if not names:
        raise ConfigError(f"{HARNESS}.{next(iter(settings))}: no task of the harness is asked for; give --harness NAME")
    if len(set(names)) < len(names):
        raise ConfigError(f"--harness {', '.join(names)}: a task is asked for twice")
    from tunesmith.evaluate.harness import find_harness  # slow to import, and an extra

    return find_harness(names, settings)


def _rows(target: Path, data: str | None, split: str, given: Mapping[str, Any]) -> tuple[DataSection, list[Row]]:
    """All rows, and how they are asked: its labels are those that an answer is chosen among, none without labels."""
    run = trained_run(target)
    section = _section(run, data, given)
    if run is not None and data is None:
        rows = held_out_rows(replace(run, data=section)) or read_split(section, split)
    else:
        rows = read_split(section, split)
    trained = section
    if run is not None and rows[0].kind == "classification" and "labels" not in given:
        trained = _trained(run)  # labels that are given ask another question, for which its instruction is not meant
    rows, names = ask_as_trained(rows, section, trained)
    return replace(section, labels=names), rows


def _section(run: Run | None, data: str | None, given: Mapping[str, Any]) -> DataSection:
    """The run's own section, or `data` with what of it belongs to rows; what is `given` wins."""
    if run is None and data is None:
        raise ConfigError(
            "evaluate: say on which data with --data (a run folder has its own), or which --task NAME=PATH"
        )
    for key in given:
        if key not in ROW_KEYS:
            known = ", ".join(ROW_KEYS)
            raise ConfigError(f"{ROWS}.{key}: is no setting of rows{did_you_mean(key, ROW_KEYS)}; there are {known}")
    keys = ROW_KEYS if data is not None else [field.name for field in fields(DataSection)]
    values = {} if run is None else {key: getattr(run.data, key) for key in keys}
    return validate_section(DataSection, {**values, **({} if data is None else {"train": data}), **given}, ROWS)


def _trained(run: Run) -> DataSection:
    try:
        return as_trained(run.data)
    except (DataError, CatalogError) as error:
        raise ConfigError(
            f"{ROWS}.labels: give them (and {ROWS}.instruction, if it is not the usual one); the run's data, which "
            f"tells them, cannot be read ({error})"
        ) from None


def _check_labels(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raise DataError for labels that cannot be chosen: every answer would be wrong."""
    unknown = unknown_labels(rows, names)
    if unknown:
        more = f" (nor are those of {len(unknown) - 1:,} other rows)" if len(unknown) > 1 else ""
        raise DataError(
            f"{unknown[0].source}: label {unknown[0].label!r} is none of {ROWS}.labels ({', '.join(names)}), which a "
            f"run has from its training{more}; correct or remove the row, give others as {ROWS}.labels=[A,B], or "
            "measure what needs no label, such as --metrics eval_loss"
        )
