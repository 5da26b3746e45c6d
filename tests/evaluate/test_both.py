"""Loss and accuracy of a classification in one pass are those of two, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import reviews, write_rows

from tunesmith.adapters import attach
from tunesmith.data.encode import encode_rows
from tunesmith.data.schemas import labels
from tunesmith.data.sources import read_rows
from tunesmith.data.templates import get_template
from tunesmith.evaluate.classification import score_both
from tunesmith.evaluate.outcomes import OUTCOMES, row_outcomes
from tunesmith.evaluate.run import measure
from tunesmith.evaluate.subject import Subject
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

NAMES = ["eval_loss", "accuracy"]
METHODS = [None, {"kind": "lora"}, {"kind": "prompt", "virtual_tokens": 3}, {"kind": "reft"}, {"kind": "llama_adapter"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(12))


def subject_of(base: Path, file: Path, **how: Any) -> Subject:
    tokenizer = load_tokenizer(base)
    template, rows = get_template("chat", tokenizer), read_rows(file)
    encoded = encode_rows(rows, template, tokenizer, **{"cutoff": 512, **how})
    model = load_model(base, dtype=torch.float64)
    return Subject(model, tokenizer, template, tuple(rows), encoded.examples, tuple(labels(rows)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["kind"] if m else "base")
def test_one_pass_measures_what_two_do(tiny_base: Path, file: Path, method: dict[str, object] | None) -> None:
    subject = subject_of(tiny_base, file)
    if method is not None:
        adapter = attach(subject.model, method)
        draw = torch.Generator().manual_seed(0)
        for parameter in adapter.trainable.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    assert score_both(subject) is not None
    apart = {key: value for name in NAMES for key, value in measure(subject, [name]).items()}
    assert measure(subject, NAMES) == pytest.approx(apart, rel=1e-6)
    found = row_outcomes(subject, NAMES)
    for name in NAMES:
        expected = OUTCOMES[name](subject)
        assert (
            found[name].values == pytest.approx(expected.values, rel=1e-6) and found[name].weights == expected.weights
        )
        assert found[name].ratio == pytest.approx(apart[name], rel=1e-6)


def test_the_prompt_is_read_once(tiny_base: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(tiny_base, file)
    read: list[int] = []
    run = subject.model.run
    monkeypatch.setattr(
        subject.model, "run", lambda ids, *rest, **rows: read.append(len(ids)) or run(ids, *rest, **rows)
    )
    measure(subject, NAMES)
    once = sum(read)
    read.clear()
    for name in NAMES:
        measure(subject, [name])
    assert once < 0.6 * sum(read)


def test_rows_that_differ_from_their_prompts_take_two_passes(tiny_base: Path, file: Path) -> None:
    """A row that was cut, and one that learns its prompt too, are other tokens than the labels are scored behind."""
    whole = subject_of(tiny_base, file)
    first = whole.examples[0]
    learnt = replace(first, supervised=np.ones_like(first.supervised))
    for subject in (
        subject_of(tiny_base, file, cutoff=max(len(e.ids) for e in whole.examples) - 2, cut="prompt-start"),
        replace(whole, examples=(learnt, *whole.examples[1:])),
    ):
        assert score_both(subject) is None
        apart = {key: value for name in NAMES for key, value in measure(subject, [name]).items()}
        assert measure(subject, NAMES) == apart
        assert row_outcomes(subject, NAMES) == {name: OUTCOMES[name](subject) for name in NAMES}
