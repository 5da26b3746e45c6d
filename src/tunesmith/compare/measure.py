"""What is measured of a loaded model: metrics on rows, published tasks, samples; each figure with its rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from tunesmith.evaluate.run import find_metric, measure
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.suite import read_tasks, run_tasks
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

    def of(self, asked: MeasuredSet) -> Subject:
        """The rows of a set under the model; a task brings its own."""
        run = self.run
        template = self.template(asked.template or run.data.template)
        bare = Subject(self.model, self.tokenizer, template, budget=run.train.pack_tokens or 4096)
        if asked.task is not None:
            return bare
        if asked.data is None:
            section, rows = run.data, self.own_rows(asked.split)
        else:
            data = run.data
            kept = {"instruction": data.instruction, "cutoff": data.cutoff, "cut": data.cut, "labels": data.labels}
            section = DataSection(train=asked.data, **kept)  # type: ignore[arg-type]
            rows = read_split(section, asked.split)
        rows = rows_seen(rows[: asked.rows], self.model.needs().looks)
        encoded = encode_rows(rows, template, self.tokenizer, cutoff=section.cutoff, cut=section.cut)
        found = section.labels or labels(rows)
        return replace(bare, rows=tuple(rows), examples=encoded.examples, labels=tuple(found))


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
            subject = subjects.of(one)
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
