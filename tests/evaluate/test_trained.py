"""A run's rows are asked as it was trained: its instruction, cut-off and labels, on any file and after any limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.tiny import reviews, run_it, write_rows

from tunesmith import api
from tunesmith import predict as room
from tunesmith.compare.measure import Subjects
from tunesmith.config import load_run
from tunesmith.config.grid import MeasuredSet
from tunesmith.data.sources import read_rows
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation import read_evaluation

NAMES = ("bad", "fine", "good", "poor")
ROWS = [{**row, "label": NAMES[number // 4]} for number, row in enumerate(reviews(16, seed=5))]  # sorted by label


@pytest.fixture
def four(tmp_path) -> Path:
    return write_rows(tmp_path / "four.jsonl", ROWS)


def run_on(folder: Path, train: Path, base: Path = Path("base"), **data: object) -> Path:
    """A run as far as its configuration tells."""
    folder.mkdir(parents=True)
    said = {"model": {"path": str(base)}, "data": {"train": str(train), **data}, "adapter": {"kind": "lora"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    return folder


def prompts(evaluation) -> list[str]:
    return [row.fields["instruction"] for row in evaluation.rows]


def test_settings_of_the_run_hold_for_other_rows(four, tmp_path) -> None:
    said = {"instruction": "Which?", "cutoff": 77, "cut": "drop", "labels": list(NAMES), "schema": "classification"}
    run = run_on(tmp_path / "run", tmp_path / "gone.jsonl", valid_size=3, limit=9, **said)
    found = read_evaluation(run, data=str(four))
    section = found.section
    assert (section.cutoff, section.cut, section.labels, section.schema) == (77, "drop", NAMES, "classification")
    assert section.train == str(four) and section.limit is None and len(found.rows) == 16
    assert set(prompts(found)) == {"Which?"}
    given = ["data.cutoff=99", "data.instruction=Say it.", "data.labels=[poor, good, fine, bad]", "data.schema=auto"]
    found = read_evaluation(run, data=str(four), settings=given)
    assert (found.section.cutoff, found.section.labels) == (99, NAMES[::-1]) and set(prompts(found)) == {"Say it."}


def test_what_the_run_leaves_open_is_as_its_training_had_it(four, tmp_path) -> None:
    """Two of four labels in the file, one after the limit; the first 12 rows, of three labels, were trained on."""
    half = write_rows(tmp_path / "half.jsonl", ROWS[:8])
    run = run_on(tmp_path / "run", four, limit=12, valid_size=3)
    trained = read_rows(four, limit=12)[0].fields["instruction"]
    assert trained == "Classify the text as bad, fine or good."
    for asked in ({"data": str(half)}, {"data": str(half), "rows": 2}, {}):
        found = read_evaluation(run, **asked)
        assert found.section.labels == NAMES[:3] and set(prompts(found)) == {trained}, asked
    bare = read_evaluation(tmp_path / "none", data=str(four), rows=2)
    assert bare.section.labels == NAMES and len(bare.rows) == 2


def test_rows_without_labels_have_none(four, tmp_path) -> None:
    file = write_rows(tmp_path / "alpaca.jsonl", [{"instruction": "Say so.", "output": "so"}])
    run = run_on(tmp_path / "run", four)
    assert read_evaluation(run, data=str(file)).section.labels == ()
    other = run_on(tmp_path / "other", file)
    assert read_evaluation(other, data=str(four), rows=1).section.labels == NAMES


def test_a_label_that_was_not_trained_with_is_named(four, tmp_path) -> None:
    run = run_on(tmp_path / "run", four, limit=12, valid_size=3)
    for metrics in ([], ["free_accuracy", "eval_loss"]):
        with pytest.raises(DataError) as error:
            read_evaluation(run, data=str(four), metrics=metrics)
        assert f"{four}:13: label 'poor' is none of data.labels (bad, fine, good)" in str(error.value)
        assert "nor are those of 3 other rows" in str(error.value) and "\n" not in str(error.value)
    assert len(read_evaluation(run, data=str(four), metrics=["eval_loss", "exact_match"]).rows) == 16
    assert len(read_evaluation(run, data=str(four), rows=12).rows) == 12
    given = read_evaluation(run, data=str(four), settings=["data.labels=[bad, fine, good, poor]"])
    assert given.section.labels == NAMES and set(prompts(given)) == {"Classify the text as bad, fine, good or poor."}


def test_without_the_runs_data_its_labels_are_asked_for(four, tmp_path) -> None:
    run = run_on(tmp_path / "run", tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"data\.labels: give them .* cannot be read \(.*gone\.jsonl"):
        read_evaluation(run, data=str(four))
    file = write_rows(tmp_path / "alpaca.jsonl", [{"instruction": "Say so.", "output": "so"}])
    assert len(read_evaluation(run, data=str(file)).rows) == 1


@pytest.mark.parametrize(
    ("words", "metrics", "said"),
    [
        (["data.cutof=9"], ["eval_loss"], "data.cutof: is no setting of rows; did you mean 'cutoff'?"),
        (["data.train=x.jsonl"], ["eval_loss"], "data.train: is no setting of rows"),
        (["data.cutoff=1"], ["eval_loss"], "data.cutoff: "),
        (["data.cutoff=99"], [], "data.cutoff: no rows are measured; give --data or --metrics"),
    ],
)
def test_settings_that_cannot_act_are_refused(four, tmp_path, words, metrics, said) -> None:
    questions = write_rows(tmp_path / "mine.jsonl", [{"question": "Is it?", "choices": ["no", "yes"], "answer": 1}])
    run = run_on(tmp_path / "run", four)
    with pytest.raises(ConfigError) as error:
        asked = {"metrics": metrics, "data": str(four)} if metrics else {"tasks": [f"choice={questions}"]}
        read_evaluation(run, settings=words, **asked)
    assert str(error.value).startswith(said)


@pytest.mark.usefixtures("in_process", "single_thread")
def test_accuracy_is_that_of_predicted_labels(command, tiny_base, four, tmp_path) -> None:
    """Of rows that begin with two labels, neither of them the run's favourite, so that both would be easier alone."""
    run_it(command, tiny_base, four, tmp_path, train__max_steps=4, data__instruction="Which?", data__cutoff=96)
    run = tmp_path / "run"
    room.predict(run, four, tmp_path / "labels.jsonl")
    chosen = [json.loads(line)["label"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    favourite = max(NAMES, key=chosen.count)
    order = sorted(range(16), key=lambda number: (ROWS[number]["label"] == favourite, number))
    file = write_rows(tmp_path / "ordered.jsonl", [ROWS[number] for number in order])
    assert favourite in [chosen[number] for number in order[:8]]
    right = sum(chosen[number] == ROWS[number]["label"] for number in order[:8]) / 8
    for target in (run, run / "adapter"):
        code, out, err = command("evaluate", target, "--data", file, "--limit", 8, "--metrics", "accuracy", "--json")
        assert code == 0, err
        assert json.loads(out)["accuracy"] == right
    text = tmp_path / "text.txt"
    text.write_text("the end of a film is a joy and a mess of the year\n" * 4)
    code, out, err = command("forgetting", run, "-g", f"text={text}", "--data", file, "--limit", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"]["metrics"]["accuracy"]["after"] == right


def test_a_cell_is_measured_among_the_labels_of_its_training(tiny_base, four, tmp_path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS[:12])
    run, _ = load_run(run_on(tmp_path / "run", train, tiny_base, template="alpaca-short") / "config.yaml")
    loaded = api.load(tiny_base, dtype="float32")
    subjects = Subjects(
        run, loaded.model, loaded.tokenizer,
        template=lambda name: get_template(name, loaded.tokenizer), own_rows=lambda split: read_rows(four),
    )  # fmt: skip
    half = write_rows(tmp_path / "half.jsonl", ROWS[4:12])
    metrics = ("accuracy",)
    subject, notes = subjects.of(MeasuredSet(data=str(half), rows=3, metrics=metrics))
    assert (subject.labels, len(subject.rows), notes) == (NAMES[:3], 3, [])
    assert {row.fields["instruction"] for row in subject.rows} == {"Classify the text as bad, fine or good."}
    subject, (note,) = subjects.of(MeasuredSet(metrics=metrics))
    assert subject.labels == NAMES[:3] and "4 rows are wrong by a label that was not trained with ('poor' at" in note
    assert f"{four}:13" in note and subjects.of(MeasuredSet(metrics=("eval_loss",)))[1] == []
    other = write_rows(tmp_path / "other.jsonl", reviews(8))
    subject, (note,) = subjects.of(MeasuredSet(data=str(other), rows=1, metrics=metrics))
    assert subject.labels == ("negative", "positive") and subject.rows[0].fields["instruction"].endswith("or positive.")
    assert note == "other: the labels are its own (negative, positive), none of which was trained with"
