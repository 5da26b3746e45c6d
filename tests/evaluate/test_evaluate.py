"""`tunesmith evaluate` with tasks: what is read, measured, printed, and refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import run_it, write_rows

from tunesmith import api

QUESTIONS = [
    {"question": f"Is a {word} dull?", "choices": ["no", "yes, far too long"], "answer": number % 2}
    for number, word in enumerate(("film", "plot", "year", "mess", "joy"))
]


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_rows(tmp_path / "mine.jsonl", QUESTIONS)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("the end of a film is a joy and a mess of the year\n" * 12)
    return tmp_path / "text.txt"


def test_tasks_of_a_model(command, tiny_base, questions, text, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{**QUESTIONS[0], "question": "Is it?"}])
    code, out, err = command(
        "evaluate", tiny_base, "--task", f"choice={questions}", "--task", f"text={text}", "text.window=32",
        "choice.shots=1", f"choice.shots_from={train}",
        "--limit", 4, "--json", "--items", tmp_path / "items.jsonl", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert set(report) == {"tasks"} and list(report["tasks"]) == ["choice", "text"]
    choice = report["tasks"]["choice"]
    assert (choice["items"], choice["settings"]["shots"], choice["stated"]["shots"]) == (4, 1, 1)
    assert set(choice["figures"]) == {"acc", "acc_norm", "acc_bytes", "ece"}
    acc = choice["figures"]["acc"]
    assert acc["count"] == 4 and acc["interval"][0] <= acc["value"] <= acc["interval"][1]
    assert report["tasks"]["text"]["stated"]["window"] == 32
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"{questions}:{n}" for n in (1, 2, 3, 4)]
    assert sum(line["acc"] == line["answer"] for line in lines) / 4 == acc["value"]
    assert "choice: 4 items of" in err and "choice: acc 0." in err


def test_tasks_are_printed_with_intervals(command, tiny_base, questions):
    code, out, err = command("evaluate", tiny_base, "--task", f"choice={questions}", "--dtype", "float32")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["choice", "acc"] and lines[0].endswith("of 5") and "[" in lines[0]
    assert lines[-1] == "  shots 0, template no, chance 0.5, truncated 0, ece_bins 15"


def test_an_adapter_and_its_base(command, tiny_base, tiny_reviews, questions, tmp_path, in_process):
    run_it(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=4, train__learning_rate=0.1)
    run = tmp_path / "run"
    scores = {}
    for use in (None, "base"):
        report = api.evaluate(run, tasks=[f"choice={questions}"], use=use, items=tmp_path / "items.jsonl")
        scores[use] = [json.loads(line)["scores"] for line in (tmp_path / "items.jsonl").read_text().splitlines()]
        assert set(report) == {"tasks"}
    api.evaluate(tiny_base, tasks=[f"choice={questions}"], items=tmp_path / "items.jsonl", dtype="float32")
    bare = [json.loads(line)["scores"] for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert scores["base"] == bare != scores[None]
    code, out, err = command("evaluate", run, "--task", f"choice={questions}", "choice.template=true", "--json",
                             "--split", "valid", "--metrics", "accuracy,ece,free_accuracy,unparsable_rate")  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["tasks"]["choice"]["stated"]["template"] is True
    assert report["rows"] == 8 and report["ece_bins"] == 15 and 0 <= report["ece"] <= 1
    assert report["free_accuracy"] <= 1 - report["unparsable_rate"] + 1e-9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "helaswag=x.jsonl"], "there is no task 'helaswag'; did you mean 'hellaswag'?"),
        (["--task", "choice"], "--task choice: should be choice=PATH"),
        (["--task", "choice=none/none.jsonl"], "none/none.jsonl: no such file"),
        (["--task", "choice=Q", "--task", "choice=Q"], "choice is asked for twice"),
        (["--task", "choice=Q", "choice.shot=1"], "choice.shot: unknown key; did you mean 'shots'?"),
        (["--task", "choice=Q", "choice.shots=-1"], "choice.shots: "),
        (["--task", "choice=Q", "shots=1"], "'shots=1': should be TASK.KEY=VALUE"),
        (["--task", "choice=Q", "choice.shots=1", "choice.shots=2"], "choice.shots is given twice"),
        (["--task", "choice=Q", "mmlu.shots=1"], "mmlu.shots: task mmlu is not asked for"),
        (["--task", "choice=Q", "choice.shots=1"], "is one file, so examples must come from another"),
        (["--task", "choice=Q", "--metrics", "acuracy"], "there is no metric 'acuracy'; did you mean 'accuracy'?"),
        (["--items", "x.jsonl"], "--items: only tasks have items"),
        (["harness.shots=1"], "harness.shots: no task of the harness is asked for"),
        ([], "say on which data with --data (a run folder has its own), or which --task NAME=PATH"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(command, questions, words, said, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, err = command("evaluate", "some/model", *[word.replace("=Q", f"={questions}") for word in words])
    assert code == 2 and not out
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_errors_while_measuring_name_the_task(command, tiny_base, text):
    code, _, err = command("evaluate", tiny_base, "--task", f"text={text}", "text.window=4096", "--dtype", "float32")
    assert code == 2 and "error: text: window=4096: exceeds the model's context of 512" in err


def test_labels_of_free_answers():
    from tunesmith.evaluate.classification import parse_label

    labels = ("negative", "positive", "very positive")
    assert parse_label("Positive.", labels) == "positive"
    assert parse_label("It is very positive!", labels) == "very positive"
    assert parse_label("The answer is negative, not positive", labels) is None
    assert parse_label("nonnegative", labels) is None and parse_label("", labels) is None
    assert parse_label("negative or NEGATIVE", labels) == "negative"


def test_the_page_names_every_task_metric_and_setting():
    from tunesmith.config.validate import field_names
    from tunesmith.evaluate.choice import ChoiceSettings
    from tunesmith.evaluate.perplexity import PerplexitySettings
    from tunesmith.evaluate.run import METRICS
    from tunesmith.evaluate.suite import TASKS

    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    missing = [name for name in (*TASKS, *METRICS) if f"`{name}`" not in page]
    missing += [
        key for kind in (ChoiceSettings, PerplexitySettings) for key in field_names(kind) if f"| `{key}` |" not in page
    ]
    assert not missing
