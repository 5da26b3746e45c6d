"""`tunesmith train`, whole: from a configuration to a verified run folder, on a model of two layers."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tests.tiny import edit_json, reviews, words, write_base, write_rows

from tunesmith import workflow
from tunesmith.files import sha256_file
from tunesmith.train.log import LOGGED_NAMES, read_metrics

WEIGHTS = Path("adapter", "adapter_model.safetensors")
pytestmark = pytest.mark.usefixtures("single_thread")


def train(command, *args, **settings):
    """Run `tunesmith train`; it must succeed. Returns what it said."""
    code, out, err = command("train", *words(*args, **settings))
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, tiny_reviews):
    """One run with all that a run can show, verified in a fresh process; (folder, stdout, stderr). Do not change it."""
    import contextlib
    import io

    from tunesmith.cli import main

    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    folder = tmp_path_factory.mktemp("finished")
    given = words(tiny_base, tiny_reviews, folder, train__epochs=2, evaluate__metrics=["accuracy"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["train", *given]) == 0, err.getvalue()
    return folder / "run", out.getvalue(), err.getvalue()


def test_the_folder_is_the_only_result(finished):
    folder, out, _ = finished
    assert out == f"{folder}\n"


def test_a_run_leaves_what_the_design_says(finished):
    folder, _, _ = finished
    top = {path.name for path in folder.iterdir()}
    steps = [3, 6]
    assert top == {
        "config.yaml", "metrics.jsonl", "before.json", "adapter", "verify.json", "verify_probe.safetensors",
        "report.html", *(f"checkpoint-{step:06d}" for step in steps),
    }  # fmt: skip
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tunesmith.json", "tokenizer.json",
        "tokenizer_config.json", "COMPLETE",
    }  # fmt: skip
    checkpoint = {"adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "COMPLETE"}
    assert all({path.name for path in (folder / f"checkpoint-{s:06d}").iterdir()} == checkpoint for s in steps)
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_metrics_have_the_logged_names_and_a_line_a_step(finished):
    lines = read_metrics(finished[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(LOGGED_NAMES) <= set(line) for line in lines)
    measured = {"eval_loss", "perplexity", "mean_token_accuracy", "accuracy", "accuracy_interval"}
    assert [measured <= set(line) for line in lines] == [False, False, True, False, False, True]
    assert lines[-1]["epoch"] == 2 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["num_tokens"] == sum(2 * json.loads(line)["tokens"] for line in _tokens(finished[0]))


def _tokens(folder):
    from tunesmith import api
    from tunesmith.config import load_run
    from tunesmith.prepare import load_data, template_for
    from tunesmith.tokenizer import load_tokenizer

    run, _ = load_run(folder / "config.yaml")
    tokenizer = load_tokenizer(Path(run.model.path))
    data = load_data(run, tokenizer, template_for(run, tokenizer))
    assert api.adapter_folder(folder) == folder / "adapter"
    return [json.dumps({"tokens": len(example.ids)}) for example in data.train.examples]


def test_verify_is_ok_in_a_fresh_process(finished, command):
    report = json.loads((finished[0] / "verify.json").read_text())
    assert report["ok"] and all(check["ok"] for check in report["checks"])
    assert "a fresh process loaded base and adapter" in str(report)
    code, out, _ = command("verify", finished[0])
    assert code == 0 and "checks hold" in out


class Links(HTMLParser):
    """Everything in a page that would fetch or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}:
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in {"src", "href", "action"} or name.startswith("on")]


def test_the_report_opens_without_a_network_and_runs_nothing(finished):
    page = (finished[0] / "report.html").read_text()
    assert Links(page).found == [] and "url(" not in page and "@import" not in page
    assert all(word in page for word in ("Training loss", "Held-out loss", "accuracy", "Before and after", "planned"))
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_the_report_escapes_what_data_and_names_hold(command, in_process, tiny_base, tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    rows = [{**row, "text": f"{evil} {row['text']}"} for row in reviews(8)]
    data = write_rows(tmp_path / "<b onclick=a>.jsonl", rows)
    train(command, tiny_base, data, tmp_path / "runs", evaluate__samples=2, data__valid_size=2)
    page = (tmp_path / "runs" / "run" / "report.html").read_text()
    assert Links(page).found == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_config_yaml_reruns_to_the_same_bytes(finished, command, in_process, tmp_path):
    folder, _, _ = finished
    code, out, err = command("train", folder / "config.yaml", "--name", "again", "--output-dir", tmp_path)
    assert code == 0, err
    again = Path(out.strip())
    assert sha256_file(again / WEIGHTS) == sha256_file(folder / WEIGHTS)
    code, out, _ = command("train", folder / "config.yaml", "--name", "seed", "--output-dir", tmp_path, "train.seed=1")
    assert code == 0 and sha256_file(Path(out.strip()) / WEIGHTS) != sha256_file(folder / WEIGHTS)


def test_every_automatic_choice_is_written_down(command, in_process, tiny_base, tiny_reviews, tmp_path):
    train(
        command, tiny_base, tiny_reviews, tmp_path,
        train__pack_tokens=None, train__learning_rate=None, model__dtype=None, train__max_steps=1,
    )  # fmt: skip
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert not re.search(r"(dtype|device): auto|(pack_tokens|learning_rate): null", text)


def test_the_plan_is_printed_beside_what_was_measured(finished):
    lines = [line for line in finished[2].splitlines() if line.startswith("memory:")]
    assert re.fullmatch(r"memory: planned [\d.]+ GiB", lines[0])
    assert re.fullmatch(r"memory: planned [\d.]+ GiB, measured [\d.]+ GiB \(\d+% of it\)", lines[1])


def test_when_training_has_ended_its_memory_is_given_back(
    command, in_process, tiny_base, tiny_reviews, tmp_path, monkeypatch
):
    """Checked where what was trained is saved: no optimizer, no gradient, and free memory was returned."""
    given, seen, alive = [], [], []
    init, save = workflow.Trainer.__init__, workflow.save_run_adapter
    give = workflow.give_back_memory

    def made(self, *arguments, **named):
        init(self, *arguments, **named)
        alive.append(weakref.ref(self.optimizer))

    def saved(run, loaded, adapter, *rest):
        seen.append(([ref() for ref in alive], [p.grad for p in adapter.trainable.values()]))
        return save(run, loaded, adapter, *rest)

    monkeypatch.setattr(workflow.Trainer, "__init__", made)
    monkeypatch.setattr(workflow, "save_run_adapter", saved)
    monkeypatch.setattr(workflow, "give_back_memory", lambda: given.append(give()))
    train(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=2)
    ((optimizers, gradients),) = seen
    assert optimizers == [None] and gradients and not any(g is not None for g in gradients) and len(given) == 1


def test_lines_are_not_broken_by_the_width_of_a_terminal(finished):
    assert (
        "tokenizer: pad and EOS are the same token (2); nothing is padded or masked by id here, so EOS" in finished[2]
    )


SCRIPT = {  # after which epoch: (eval_loss, accuracy); accuracy is best where the loss is not
    "before": (6.0, 0.5),
    1: (3.0, 0.6),
    2: (2.0, 0.7),
    3: (2.5, 0.9),
    4: (3.5, 0.8),
}


@pytest.fixture
def scripted(monkeypatch):
    """Held-out measures as in SCRIPT, whatever was learned."""
    calls = iter(SCRIPT.values())

    def measure(subject, names):
        loss, accuracy = next(calls)
        return {"eval_loss": loss, "accuracy": accuracy}

    monkeypatch.setattr(workflow, "measure", measure)


@pytest.mark.parametrize(("best", "step"), [("accuracy", 9), ("eval_loss", 6)])
def test_the_best_checkpoint_is_chosen_by_the_named_metric(
    command, in_process, scripted, tiny_base, tiny_reviews, tmp_path, best, step
):
    """Held-out loss and the task disagree: 6 is the best by loss, 9 by accuracy, and 12 is where training ends."""
    out, err = train(
        command, tiny_base, tiny_reviews, tmp_path,
        train__epochs=4, evaluate__metrics=["accuracy"], evaluate__best=best, train__keep_checkpoints=1,
        evaluate__samples=0,
    )  # fmt: skip
    assert f"best {best} was at step {step}: that checkpoint is saved as the adapter" in err
    run = Path(out.strip())
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step:06d}", "checkpoint-000012"}
    assert _adapter_is_of(run, step) and not _adapter_is_of(run, 12)
    report = (run / "report.html").read_text()
    assert f"{SCRIPT[step // 3][1]:.4f}" in report and f"{SCRIPT[4][1]:.4f}" not in report.split("<h2>The run")[0]


def _adapter_is_of(run: Path, step: int) -> bool:
    from safetensors.torch import load_file

    saved = load_file(run / WEIGHTS)
    kept = load_file(run / f"checkpoint-{step:06d}" / "adapter.safetensors")
    up = "model.layers.1.mlp.up_proj"
    return torch.equal(saved[f"base_model.model.{up}.lora_B.weight"], kept[f"{up}.edit.B"])


def test_patience_ends_training(command, in_process, scripted, tiny_base, tiny_reviews, tmp_path):
    train(
        command, tiny_base, tiny_reviews, tmp_path,
        train__epochs=4, evaluate__metrics=["accuracy"], evaluate__best="eval_loss", evaluate__patience=1,
        evaluate__samples=0,
    )  # fmt: skip
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 9  # 6 was the best
    assert _adapter_is_of(tmp_path / "run", 6)


def test_samples_before_and_after(command, in_process, tiny_base, tiny_reviews, tmp_path):
    train(command, tiny_base, tiny_reviews, tmp_path, evaluate__samples=2, train__max_steps=2)
    samples = json.loads((tmp_path / "run" / "before.json").read_text())["samples"]
    assert [sample["expected"] for sample in samples] == ["negative", "positive"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<b>before</b>") == page.count("<b>after</b>") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_precision_trains(command, in_process, tiny_base, tiny_reviews, tmp_path, dtype, recompute):
    _, err = train(
        command, tiny_base, tiny_reviews, tmp_path,
        model__dtype=dtype, train__recompute=recompute, train__epochs=3, evaluate__metrics=["accuracy"],
    )  # fmt: skip
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    scaler = json.loads((tmp_path / "run" / "checkpoint-000009" / "state.json").read_text())["state"]["scaler"]
    assert [line["grad_norm"] for line in lines].count(None) == scaler["skipped"] <= 4
    assert scaler["value"] == (65536.0 / 2 ** scaler["skipped"] if dtype == "float16" else 1.0)
    assert ("fp16 gradients overflowed, step skipped" in err) == (scaler["skipped"] > 0)
    checks = json.loads((tmp_path / "run" / "verify.json").read_text())["checks"]
    assert next(check for check in checks if check["name"] == "dtype")["detail"] == f"{dtype} throughout"


def test_recomputing_changes_nothing(command, in_process, finished, tiny_base, tiny_reviews, tmp_path):
    train(
        command, tiny_base, tiny_reviews, tmp_path,
        train__recompute=True, train__epochs=2, evaluate__metrics=["accuracy"],
    )  # fmt: skip
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(finished[0] / WEIGHTS)


def test_dropout_says_that_prefixes_are_not_shared(command, in_process, tiny_base, tiny_reviews, tmp_path):
    line = "prefixes are not shared"
    given = {"train__max_steps": 1, "evaluate__samples": 0}
    assert line in train(command, tiny_base, tiny_reviews, tmp_path, "a", adapter__dropout=0.1, **given)[1]
    assert line not in train(command, tiny_base, tiny_reviews, tmp_path, "b", **given)[1]


def test_training_on_inputs_supervises_the_prompt(command, in_process, tiny_base, tiny_reviews, tmp_path):
    share = r"train: supervised tokens +[\d,]+ \((\d+\.\d)%\)"
    given = {"train__max_steps": 1, "evaluate__samples": 0}
    plain = train(command, tiny_base, tiny_reviews, tmp_path, "a", **given)[1]
    whole = train(command, tiny_base, tiny_reviews, tmp_path, "b", data__train_on_inputs=True, **given)[1]
    assert float(re.search(share, plain)[1]) < 10 and float(re.search(share, whole)[1]) > 90


def test_valid_size_holds_rows_out(command, in_process, tiny_base, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", reviews(24))
    _, err = train(command, tiny_base, data, tmp_path, data__valid_size=0.25, train__max_steps=1)
    assert re.search(r"train: rows +18\n", err) and re.search(r"valid: rows +6\n", err)
    assert re.search(r"valid: rows shared with train +0\n", err)


def test_a_held_out_label_that_training_does_not_know_is_said(command, in_process, tiny_base, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", reviews(24))
    held = [{**row, "label": "mixed"} if i in (2, 5) else row for i, row in enumerate(reviews(8, seed=1))]
    write_rows(tmp_path / "data" / "valid.jsonl", held)
    _, err = train(command, tiny_base, tmp_path / "data", tmp_path, train__max_steps=1)
    said = "valid: 2 of 8 rows have a label that is not among the training's (first 'mixed': "
    assert said in err and "valid.jsonl:3)" in err


def test_full_fine_tuning_trains_saves_reloads_and_verifies(command, in_process, tiny_base, tiny_reviews, tmp_path):
    out, err = train(
        command, tiny_base, tiny_reviews, tmp_path,
        adapter__kind="full", adapter__rank=None, train__epochs=2, model__dtype=None,
    )  # fmt: skip
    run = Path(out.strip())
    assert "full: 29,208 trainable of 29,208 parameters (100.00%)" in err or "(100.00%)" in err
    assert "dtype: float32" in (run / "config.yaml").read_text()
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[-1]["eval_loss"] < lines[0]["loss"] - 1
    assert json.loads((run / "verify.json").read_text())["ok"]
    code, out, err = command("evaluate", run, "--split", "valid", "--metrics", "eval_loss")
    assert code == 0 and float(re.search(r"eval_loss +([\d.]+)", out)[1]) == pytest.approx(
        lines[-1]["eval_loss"], abs=1e-3
    )


def test_full_fine_tuning_refuses_to_round_its_updates_away(command, tiny_base, tiny_reviews, tmp_path):
    given = words(tiny_base, tiny_reviews, tmp_path, adapter__kind="full", adapter__rank=None, model__dtype="bfloat16")
    code, _, err = command("train", *given)
    assert code == 2 and err.splitlines()[-1].startswith("error: model.dtype: full trains the base's own weights")
    assert "set model.dtype=float32" in err
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_step(command, in_process, tiny_base, tiny_reviews, tmp_path):
    pytest.importorskip("tensorboard")
    train(
        command, tiny_base, tiny_reviews, tmp_path,
        log__report_to=["tensorboard"], train__max_steps=2, evaluate__samples=0,
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["loss"] == [1, 2] and found["eval_loss"] == [2]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(
    command, monkeypatch, tiny_base, tiny_reviews, tmp_path
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command("train", *words(tiny_base, tiny_reviews, tmp_path, log__report_to=["wandb"]))
    assert (code, err) == (
        2, "error: log.report_to: wandb is not installed; pip install 'tunesmith[wandb]'\n",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_its_first_step_leaves_its_name_free(
    command, in_process, monkeypatch, tiny_base, tiny_reviews, tmp_path
):
    def stopped(*_: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(workflow, "measure", stopped)
        assert command("train", *words(tiny_base, tiny_reviews, tmp_path))[::2][0] == 130
    assert (tmp_path / "run" / "config.yaml").is_file()
    train(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=1)


def test_evaluate_and_generate_take_the_run_folder(finished, command):
    folder, _, _ = finished
    code, out, _ = command("evaluate", folder, "--split", "valid", "--json")
    last = read_metrics(folder / "metrics.jsonl")
    assert code == 0 and json.loads(out)["eval_loss"] in [
        pytest.approx(line.get("eval_loss"), abs=1e-4) for line in last
    ]
    answers = [
        command("generate", folder, "--prompt", "A joy.", "--max-new-tokens", "4", *more)[:2]
        for more in ([], ["--use", "base"])
    ]
    assert [code for code, _ in answers] == [0, 0] and answers[0][1] != answers[1][1]


def test_a_run_names_itself_where_no_name_is_given(command, in_process, tiny_base, tiny_reviews, tmp_path):
    given = words(tiny_base, tiny_reviews, tmp_path, train__max_steps=1, evaluate__samples=0)
    given = [word for word in given if word not in ("--name", "run")]
    names = [Path(command("train", *given)[1].strip()).name for _ in range(2)]
    stem = f"{tiny_base.name}-{tiny_reviews.name}-lora"
    assert names == [stem, f"{stem}-2"]


def test_the_run_folder_moves(finished, command, tmp_path):
    """Nothing in it points at where it was."""
    moved = shutil.copytree(finished[0], tmp_path / "elsewhere")
    assert command("verify", moved)[0] == 0


def test_llama_with_a_chat_template_trains_by_default(command, in_process, tmp_path, tiny_reviews):
    base = write_base(tmp_path / "base")
    edit_json(base / "config.json", bos_token_id=1)
    train(command, base, tiny_reviews, tmp_path, data__template=None, data__cutoff=None, train__max_steps=1)
    assert "template: chat" in (tmp_path / "run" / "config.yaml").read_text()
