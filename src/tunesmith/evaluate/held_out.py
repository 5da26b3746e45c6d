"""Measure a model on the rows of a data set that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.config import DataSection
from tunesmith.data.catalog import resolve_data
from tunesmith.data.encode import encode_rows
from tunesmith.data.schemas import Row
from tunesmith.data.sources import SPLITS, read_splits
from tunesmith.errors import ConfigError, DataError, did_you_mean
from tunesmith.evaluate.run import measure
from tunesmith.evaluate.subject import Subject
from tunesmith.vision.open import rows_seen


def read_split(section: DataSection, split: str) -> list[Row]:
    """The rows of `split` ("train", "valid" or "test") of `section.train`; a file is one split, whatever it is called.

    Raises ConfigError for an unknown split, DataError where the data has none of its rows.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: should be one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    path = resolve_data(section.train)
    splits = read_splits(path, schema=section.schema, instruction=section.instruction, captions=section.captions)
    rows: list[Row] = splits.train if path.is_file() else getattr(splits, split)
    if not rows:
        raise DataError(f"{path}: has no {split} rows; choose another with --split")
    return rows


def evaluate_rows(
    subject: Subject, section: DataSection, rows: Sequence[Row], *, metrics: Sequence[str]
) -> dict[str, Any]:
    """Measure `metrics` on `rows` with the model, template and adapters of `subject`, which has no rows of its own.

    An answer is chosen among the labels of `section`: `rows` may be the first few of a file and not show them all.
    Without metrics: eval_loss, and accuracy where there are labels. Raises ConfigError for an unknown metric.
    """
    rows = rows_seen(rows, subject.model.needs(subject.adapters).looks)
    encoded = encode_rows(rows, subject.template, subject.tokenizer, cutoff=section.cutoff, cut=section.cut)
    asked = replace(subject, rows=tuple(rows), examples=encoded.examples, labels=section.labels)
    wanted = list(metrics) or ["eval_loss", *(["accuracy"] if len(section.labels) > 1 else [])]
    return {"rows": len(rows), **measure(asked, wanted)}
