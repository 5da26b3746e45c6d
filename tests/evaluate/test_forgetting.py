"""Before and after on the same items: figures by hand, the base with its adapter off, tracked while training."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tests.tiny import reviews, run_it, write_rows

from tunesmith import api
from tunesmith.evaluate.figures import mean, share
from tunesmith.evaluate.forgetting import change_of, forgetting, paired_interval, with_forgetting
from tunesmith.evaluate.tasks import Result
from tunesmith.forgetting import forgetting as measure
from tunesmith.train.log import read_metrics

QUESTIONS = [
    {"question": f"Is a {word} dull?", "choices": ["no", "yes, far too long"], "answer": number % 2}
    for number, word in enumerate(("film", "plot", "year", "mess", "joy", "start"))
]
pytestmark = pytest.mark.usefixtures("in_process")


def hits(*right: int) -> Result:
    return Result({"acc": share(right)}, {"shots": 0}, {"acc": [float(r) for r in right]})


def loss(value: float) -> Result:
    return Result({"perplexity": mean([value], higher_is_better=False)}, {"window": 8})


def test_the_change_of_a_task_is_paired():
    found = change_of(hits(1, 1, 1, 0), hits(1, 0, 0, 1))
    assert (found.before, found.after, found.change) == (0.75, 0.5, -0.25)
    # b = 2 lost, c = 1 gained, of 4: by hand (1.5 - 2.5) / 6 +- z sqrt(4 - 1/6) / 6
    half = 1.959964 * math.sqrt(4 - 1 / 6) / 6
    assert found.interval == pytest.approx((-1 / 6 - half, -1 / 6 + half))
    nothing = change_of(hits(*[1, 0] * 20), hits(*[1, 0] * 20)).interval
    assert nothing == pytest.approx((-1.959964 / 42, 1.959964 / 42)), "40 items do not prove that nothing changed"
    assert change_of(loss(10.0), loss(12.0)).interval is None
    assert paired_interval([1.0, 2.0, 4.0], [2.0, 4.0, 7.0]) == pytest.approx((2 - 1.1316, 2 + 1.1316), abs=1e-3)


def test_the_interval_covers_what_it_says():
    draw = np.random.default_rng(0)
    for lost, gained, count in ((0.1, 0.05, 60), (0.02, 0.02, 100), (0.3, 0.1, 30)):
        drawn = draw.multinomial(count, [lost, gained, 1 - lost - gained], size=400)
        inside = 0
        for b, c, same in drawn:
            low, high = paired_interval([1.0] * b + [0.0] * c + [1.0] * same, [0.0] * b + [1.0] * c + [1.0] * same)
            inside += low <= gained - lost <= high
        assert inside / 400 > 0.92


def test_forgotten_is_the_mean_over_general_tasks():
    before = {"a": hits(1, 1, 1, 1), "b": hits(1, 0), "text": loss(10.0), "target": hits(0, 0)}
    after = {"a": hits(1, 1, 0, 0), "b": hits(1, 1), "text": loss(12.0), "target": hits(1, 0)}
    report = forgetting(before, after, ["a", "b", "text"])
    general = report["general"]
    assert general["tasks"] == ["a", "b"], "it names which"
    assert (general["before"], general["after"], general["forgotten"]) == (0.75, 0.75, 0.0)
    ends = [change_of(before[name], after[name]).interval for name in "ab"]
    middle, half = -sum(map(sum, ends)) / 4, math.hypot(*((high - low) / 2 for low, high in ends)) / 2
    assert general["interval"] == pytest.approx([middle - half, middle + half])
    assert list(report["general_text"]) == ["text"] and report["general_text"]["text"]["change"] == 2.0
    assert list(report["target"]) == ["target"] and report["target"]["target"]["change"] == 0.5
    assert "general" not in forgetting(before, after, ["text"])


def test_forgetting_of_a_moment():
    assert with_forgetting({"general_accuracy": 0.4}, {"general_accuracy": 0.5})["forgetting"] == pytest.approx(0.1)
    assert with_forgetting({"eval_loss": 1.0}, {}) == {"eval_loss": 1.0}


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    (tmp_path / "text.txt").write_text("the end of a film is a joy and a mess of the year\n" * 12)
    questions = write_rows(tmp_path / "mine.jsonl", QUESTIONS)
    return {"choice": f"choice={questions}", "text": f"text={tmp_path / 'text.txt'}"}


def test_a_run_against_its_base_in_one_process(command, tiny_base, tiny_reviews, sets, tmp_path):
    run_it(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=6, train__learning_rate=0.1)
    run = tmp_path / "run"
    general = ["--general", sets["choice"], "--general", sets["text"], "text.window=32"]
    code, out, err = command(
        "forgetting", run, *general, "--metrics", "accuracy,eval_loss", "--split", "valid", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    alone = {
        use: api.evaluate(
            run, use=use, tasks=list(sets.values()), settings=["text.window=32"], metrics=["accuracy", "eval_loss"],
            split="valid",
        )
        for use in ("base", None)
    }  # fmt: skip
    tasks = {"choice": ("general_tasks", "acc"), "text": ("general_text", "perplexity")}
    for name, (part, figure) in tasks.items():
        entry = report[part][name]
        for side, use in (("before", "base"), ("after", None)):
            assert entry[side] == alone[use]["tasks"][name]["figures"][figure]["value"], (name, side)
    assert report["general"]["tasks"] == ["choice"] and report["general_tasks"]["choice"]["items"] == 6
    rows = report["rows"]["metrics"]
    assert rows["eval_loss"]["after"] == alone[None]["eval_loss"] and report["rows"]["count"] == 8
    assert rows["eval_loss"]["gain"] == rows["eval_loss"]["before"] - rows["eval_loss"]["after"] != 0
    code, out, err = command("forgetting", run, *general)
    assert code == 0 and out.startswith("forgotten ") and "mean accuracy of choice" in out.splitlines()[0]
    assert "adapter off: choice: 6 items" in err and "adapter on: choice" in err


def test_full_fine_tuning_is_held_against_its_base_loaded_again(command, tiny_base, tiny_reviews, sets, tmp_path):
    run_it(
        command, tiny_base, tiny_reviews, tmp_path, train__max_steps=4, train__learning_rate=0.01,
        adapter__kind="full", adapter__rank=None,
    )  # fmt: skip
    report = measure(tmp_path / "run", general=[sets["text"]])
    entry = report["general_text"]["text"]
    for side, target in (("before", tiny_base), ("after", tmp_path / "run")):
        alone = api.evaluate(target, tasks=[sets["text"]], dtype="float32")
        assert entry[side] == alone["tasks"]["text"]["figures"]["perplexity"]["value"]
    assert entry["before"] != entry["after"]


def test_tracked_while_training(command, tiny_base, tiny_reviews, sets, tmp_path):
    asked = [sets["choice"], sets["text"], "text.window=32"]
    run_it(
        command, tiny_base, tiny_reviews, tmp_path, train__epochs=2, train__learning_rate=0.1,
        evaluate__every_steps=2, evaluate__general=asked, evaluate__general_items=4, train__keep_checkpoints=9,
    )  # fmt: skip
    run = tmp_path / "run"
    before = json.loads((run / "before.json").read_text())["measured"]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "general_accuracy" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["general_accuracy"] == line["general.choice"] in (0, 0.25, 0.5, 0.75, 1)
        assert line["forgetting"] == before["general_accuracy"] - line["general_accuracy"]
    assert before["general.text"] != lines[-1]["general.text"] and "forgetting" not in before
    alone = api.evaluate(tiny_base, tasks=[sets["text"]], settings=["text.window=32"], rows=4, dtype="float32")
    assert before["general.text"] == alone["tasks"]["text"]["figures"]["perplexity"]["value"]


@pytest.mark.parametrize(
    ("general", "message"),
    [
        (["helaswag=x.jsonl"], "evaluate.general: there is no task 'helaswag'; did you mean 'hellaswag'?"),
        (["choice"], "evaluate.general: choice: should be choice=PATH"),
        (["choice=MINE", "choice.shts=1"], "choice.shts: unknown key; did you mean 'shots'?"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_is_loaded(
    general, message, command, tiny_base, tiny_reviews, sets, tmp_path
):
    given = [word.replace("choice=MINE", sets["choice"]) for word in general]
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, code=2, evaluate__general=given)
    assert message in err and not (tmp_path / "run").exists()


def test_without_held_out_rows_there_is_no_moment_to_measure(command, tiny_base, sets, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", reviews(8))
    err = run_it(command, tiny_base, rows, tmp_path, code=2, evaluate__general=[sets["choice"]])
    assert "evaluate.general: there are no held-out rows" in err


def test_what_cannot_be_compared_is_refused(command, tiny_base, sets, tmp_path):
    code, _, err = command("forgetting", tiny_base, "--general", sets["choice"])
    assert code == 2 and "holds no adapter, so nothing was learnt or forgotten" in err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, _, err = command("forgetting", tmp_path)
    assert code == 2 and "name the general tasks with --general NAME=PATH" in err
