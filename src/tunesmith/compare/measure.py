"""What is measured of a loaded model: metrics on rows, published tasks, samples; each figure with its rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tunesmith.compare.record import Measured
from tunesmith.config import DataSection, Run
from tunesmith.config.grid import Measure, MeasuredSet
from tunesmith.data.encode import encode_rows
from tunesmith.data.schemas import Row, labels
from tunesmith.data.segments import Template
from tunesmith.errors import NumericalError
from tunesmith.evaluate.generations import greedy_answers
from tunesmith.evaluate.held_out import read_split
from tunesmith.evaluate.outcomes import Outcomes, row_outcomes
from tunesmith.evaluate.run import chooses_labels, find_metric, measure
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import read_tasks, run_tasks
from tunesmith.evaluate.trained import as_trained, ask_as_trained, unknown_labels
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer
from tunesmith.vision.open import rows_seen


@dataclass(frozen=True)
class Subjects:
    """A model with whatever is attached to it. `template(name)` finds one, `own_rows(split)` rows of the run's data."""

    run: Run
    model: Llama
    tokenizer: Tokenizer
    template: Callable[[str], Template]
    own_rows: Callable[[str], list[Row]]

    @cached_property
    def _trained(self) -> DataSection:
        return as_trained(self.run.data)

    def of(self, asked: MeasuredSet) -> tuple[Subject, list[str]]:
        """The rows of a set under the model, and notes; a task brings its own rows."""
        run = self.run
        template = self.template(asked.template or run.data.template)
        bare = Subject(self.model, self.tokenizer, template, budget=run.train.pack_tokens or 4096)
        if asked.task is not None:
            return bare, []
        if asked.data is None:
            section, rows = run.data, self.own_rows(asked.split)
        else:
            data = run.data
            kept = {"instruction": data.instruction, "cutoff": data.cutoff, "cut": data.cut, "labels": data.labels}
            section = DataSection(train=asked.data, **kept)  # type: ignore[arg-type]
            rows = read_split(section, asked.split)
        rows, names, notes = self._as_trained(asked, section, rows)
        rows = rows_seen(rows, self.model.needs().looks)
        encoded = encode_rows(rows, template, self.tokenizer, cutoff=section.cutoff, cut=section.cut)
        subject = replace(bare, rows=tuple(rows), examples=encoded.examples, labels=names)
        return subject, notes if chooses_labels(asked.metrics) else []

    def _as_trained(
        self, asked: MeasuredSet, section: DataSection, rows: list[Row]
    ) -> tuple[list[Row], tuple[str, ...], list[str]]:
        """The rows that are measured as they are asked, the labels to choose among, and notes on those of the rows.

        A set that shares no label with the training, as one for what was forgotten may not, is chosen among its own.
        """
        called, found = asked.called or "rows", labels(rows)  # of all rows: the first ones may have one label only
        trained = self._trained if rows[0].kind == "classification" else section
        if set(found).isdisjoint(trained.labels):
            own = f"{called}: the labels are its own ({', '.join(found)}), none of which was trained with"
            return rows[: asked.rows], found, [own] if found and trained.labels else []
        rows, names = ask_as_trained(rows, section, trained)
        rows = rows[: asked.rows]
        unknown = unknown_labels(rows, names)
        if not unknown:
            return rows, names, []
        first = f"{unknown[0].label!r} at {unknown[0].source}"
        wrong = f"{called}: {len(unknown):,} rows are wrong by a label that was not trained with ({first})"
        return rows, names, [wrong]


Found = tuple[dict[str, Measured], dict[str, Outcomes]]


def measured(
    asked: Measure, subjects: Subjects
) -> tuple[dict[str, Measured], dict[str, Outcomes], list[dict[str, str]], list[str]]:
    """Figures and their rows by name, samples, and notes. Raises NumericalError for a figure that is not finite."""
    figures: dict[str, Measured] = {}
    outcomes: dict[str, Outcomes] = {}
    samples: list[dict[str, str]] = []
    notes: list[str] = []
    for forgetting, sets in ((False, asked.sets), (True, asked.forgetting)):
        for one in sets:
            subject, said = subjects.of(one)
            notes += said
            if one.task is None:
                found, rows = _on_rows(one, subject)
            else:
                found, rows, said = _on_task(one, subject)
                notes += said
            figures |= {name: replace(figure, forgetting=forgetting) for name, figure in found.items()}
            outcomes |= rows
            if not samples and not forgetting:
                samples = _samples(subject, asked.samples)
    for name, figure in figures.items():
        if not math.isfinite(figure.value):
            raise NumericalError(f"{name} is {figure.value} on {figure.count} rows")
    return figures, outcomes, samples, notes


def _on_rows(asked: MeasuredSet, subject: Subject) -> Found:
    """Metrics on rows; where a metric is made of rows, they are kept."""
    rows = row_outcomes(subject, asked.metrics)
    rest = [name for name in asked.metrics if name not in rows]
    values = {**(measure(subject, rest) if rest else {}), **{name: one.ratio for name, one in rows.items()}}
    items = _hash([[[turn.role, turn.text] for turn in row.turns] for row in subject.rows])
    figures = {}
    for name in asked.metrics:
        better = find_metric(name, "measure.metrics").higher_is_better
        figures[_named(asked, name)] = Measured(values[name], len(subject.rows), better, asked.called, items)
    return figures, {_named(asked, name): one for name, one in rows.items()}


def _on_task(asked: MeasuredSet, subject: Subject) -> tuple[dict[str, Measured], dict[str, Outcomes], list[str]]:
    """A published task with its own settings."""
    name = str(asked.task)
    read = read_tasks([f"{name}={asked.data}"], {name: asked.settings}, asked.rows)
    (found,) = run_tasks(subject, read, lambda line: None)
    result = found.result
    of_items = _hash([name, asked.data, dict(asked.settings), len(found.asked.items)])
    figures = {
        _named(asked, name): Measured(
            figure.value, figure.count, figure.higher_is_better, asked.called, of_items, figure.interval
        )
        for name, figure in result.figures.items()
    }
    rows = {}
    for name, each in result.each.items():
        one = Outcomes(tuple(map(float, each)), (1.0,) * len(each))
        if name in result.figures and math.isclose(one.ratio, result.figures[name].value, rel_tol=1e-6, abs_tol=1e-9):
            rows[_named(asked, name)] = one
    stated = [", ".join(f"{key} {value}" for key, value in result.stated.items())] if result.stated else []
    return figures, rows, [f"{asked.called}: {note}" for note in (*stated, *result.notes)]


def _samples(subject: Subject, count: int) -> list[dict[str, str]]:
    """Greedy answers to the first rows that ask something."""
    chosen = [i for i, row in enumerate(subject.rows) if row.kind != "text" and len(row.turns) > 1][:count]
    if not chosen:
        return []
    rows = tuple(subject.rows[i] for i in chosen)
    few = replace(subject, rows=rows, examples=tuple(subject.examples[i] for i in chosen))
    answers = greedy_answers(few)
    return [
        {"prompt": row.fields.get("prompt") or row.turns[-2].text, "expected": row.turns[-1].text, "answer": a.text}
        for row, a in zip(rows, answers, strict=True)
    ]


def _named(asked: MeasuredSet, figure: str) -> str:
    return f"{asked.called} {figure}".strip()


def _hash(value: Sequence[object] | Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
