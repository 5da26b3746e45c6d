"""`train`, `plan`, `demo` and `data preview`: words and flags become the run that the room below is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tunesmith.cli.train import complete_resume

YAML = "model: m\ndata: d\ntrain:\n  epochs: 5\n  seed: 3\n"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return str(path)


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_train_gives_the_run_and_prints_its_folder(api, tunesmith_command, config, name):
    api.answers["train_run"] = SimpleNamespace(folder="runs/a")
    code, out, err = tunesmith_command(
        name, "adapter.rank=4", config, "seed=9", "--epochs", "2", "--lr", "1e-3", "-o", "out", "--name", "n", "-m", "x"
    )
    assert (code, out, err) == (0, "runs/a\n", "")
    [(called, (run, console), _)] = api.calls
    assert called == "train_run"
    assert (run.train.epochs, run.train.learning_rate, run.train.seed) == (2.0, 1e-3, 9)
    assert (run.output_dir, run.name, run.model.path, run.data.train) == ("out", "n", "x", "d")
    assert run.adapter == {"kind": "lora", "rank": 4}
    assert console.stderr


def test_notes_go_to_stderr(api, tunesmith_command, config):
    api.answers["train_run"] = SimpleNamespace(folder="runs/a")
    _, out, err = tunesmith_command("train", config, "group_by_length=true")
    assert out == "runs/a\n"
    assert err.startswith("note: group_by_length: ")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "error: nothing to train: give a YAML file, or --model NAME and --data FILE; "
             "'tunesmith demo' shows a whole run"),
        (("--model", "m"), "error: data.train: missing; say what to train on: --data FILE, or data_path in the YAML"),
        (("--data", "d"),
         "error: model.path: missing; say which model to adapt: --model NAME, or model_name_or_path in the YAML"),
        (("--model", "m", "--data", "d", "train.epoch=1"),
         "error: train.epoch: unknown key (override train.epoch=1); did you mean 'epochs'?"),
        (("a.yaml", "b.yaml"), "error: 'b.yaml': one configuration file at a time; an override is written key=value"),
        (("a.yaml",), "error: a.yaml: no such configuration file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(api, tunesmith_command, args, line):
    assert tunesmith_command("train", *args) == (2, "", f"{line}\n")
    assert api.calls == []


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["--resume"], ["--resume", "latest"]),
        (["--resume", "runs/a"], ["--resume", "runs/a"]),
        (["--resume", "--model", "m"], ["--resume", "latest", "--model", "m"]),
        (["--resume", "c.yaml"], ["--resume", "latest", "c.yaml"]),
        (["--resume", "seed=3"], ["--resume", "latest", "seed=3"]),
        (["c.yaml", "--resume=runs/a"], ["c.yaml", "--resume=runs/a"]),
    ],
)
def test_resume_may_stand_alone(words, completed):
    assert complete_resume(words) == completed


def test_resume_takes_the_configuration_of_the_run_folder(api, tunesmith_command, tmp_path):
    api.answers["train_run"] = SimpleNamespace(folder="runs/a")
    run = tmp_path / "runs" / "a"
    checkpoint = run / "checkpoint-000010"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(YAML + "name: a\n")
    for folder in (run, checkpoint):
        api.calls.clear()
        assert tunesmith_command("train", "--resume", str(folder))[0] == 0
        [(_, (resumed, _), _)] = api.calls
        assert (resumed.name, resumed.train.seed, resumed.train.resume) == ("a", 3, str(folder))


def test_plan(api, tunesmith_command, config):
    api.answers["plan_run"] = {"peak_memory_gib": 2.5}
    assert tunesmith_command("plan", config, "seed=4") == (0, f"{'peak memory gib':<24} 2.5\n", "")
    assert api.calls[0][1][0].train.seed == 4
    assert tunesmith_command("plan", config, "--json")[1] == '{\n  "peak_memory_gib": 2.5\n}\n'


def test_demo(api, tunesmith_command):
    api.answers["demo"] = "runs/demo"
    assert tunesmith_command("demo", "--quick", "seed=1")[:2] == (0, "runs/demo\n")
    assert api.calls[0][2]["quick"] is True
    assert api.calls[0][2]["overrides"] == ["seed=1"]


def test_data_preview_takes_a_configuration_or_data(api, tunesmith_command, config):
    assert tunesmith_command("data", "preview", config, "-t", "alpaca", "-n", "5") == (0, "", "")
    assert tunesmith_command("data", "preview", "rows.jsonl", "--model", "m", "--json")[0] == 0
    (_, (first,), one), (_, (second,), two) = api.calls
    assert (first.data.template, first.data.train, one) == ("alpaca", "d", {"rows": 5, "as_json": False})
    assert (second.data.train, second.model.path, two) == ("rows.jsonl", "m", {"rows": 3, "as_json": True})


def test_data_preview_says_what_to_give(api, tunesmith_command):
    code, _, err = tunesmith_command("data", "preview")
    assert (code, err) == (2, "error: nothing to preview: give a YAML file, or --model NAME and --data FILE\n")
    assert tunesmith_command("data", "preview", "a.jsonl", "b.jsonl")[0] == 2
