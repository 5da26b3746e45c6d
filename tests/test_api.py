"""The public Python API: the ten lines of its documentation, and what it says when it is used wrongly."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.tiny import edit_json, reviews, write_base, write_rows

import tunesmith as ts
from tunesmith import api
from tunesmith.errors import AdapterError, ConfigError, DataError, GenerationError, TokenizerError
from tunesmith.files import sha256_file

pytestmark = pytest.mark.usefixtures("single_thread", "in_process")


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def trained(tiny_base, tiny_reviews, tmp_path):
    """The documented lines, with small settings."""
    loaded = ts.load(tiny_base, dtype="float32")
    ts.attach(loaded, "lora", rank=8)
    run = ts.train(
        loaded, data=tiny_reviews, epochs=2, metrics=["accuracy"], batch_size=8, template="alpaca-short",
        learning_rate=0.01, samples=0, console=quiet(), output_dir=str(tmp_path), name="run",
    )  # fmt: skip
    return loaded, run


def test_the_documented_lines(trained, tiny_base):
    loaded, run = trained
    report = ts.verify(run.folder)
    assert report["ok"] and {"name", "ok", "detail"} <= set(report["checks"][0])
    assert set(run.before) == set(run.after) >= {"eval_loss", "accuracy", "accuracy_interval"}
    answer = ts.generate(loaded, "A joy.", max_new_tokens=4)
    assert set(answer) == {"text", "finish_reason", "tokens"} and answer["tokens"] <= 4
    again = ts.load(run.folder)
    assert again.name == str(tiny_base) and list(again.adapters) == ["default"]
    assert ts.generate(again, "A joy.", max_new_tokens=4) == answer
    assert again.template is None and again.templates["default"].name == "alpaca-short"


def test_the_public_names(tiny_base):
    assert all(callable(getattr(ts, name)) for name in ts.__all__ if name != "__version__")
    assert all(callable(getattr(api, name)) for name in api.__all__)
    with pytest.raises(AttributeError, match="the public names are"):
        ts.lode  # noqa: B018


def test_importing_it_loads_no_torch():
    code = "import sys, tunesmith; print([m for m in ('torch', 'numpy', 'pydantic', 'tokenizers') if m in sys.modules])"
    source = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=source)
    assert done.stdout == "[]\n", done.stderr


def test_a_run_keeps_the_precision_that_it_was_trained_in(trained):
    _, run = trained
    assert api.load(run.folder).model.dtype == torch.float32
    assert api.load(run.folder / "adapter").model.dtype == torch.float32
    assert api.load(run.folder, dtype="bfloat16").model.dtype == torch.bfloat16
    measured = api.evaluate(run.folder, split="valid", metrics=["eval_loss"])
    assert measured["eval_loss"] == pytest.approx(run.after["eval_loss"], rel=1e-6)


def test_the_same_lines_train_the_same_bytes_as_the_command_line(trained, command, tmp_path):
    _, run = trained
    code, _, err = command("train", run.folder / "config.yaml", "--name", "again")
    assert code == 0, err
    weights = "adapter/adapter_model.safetensors"
    assert sha256_file(run.folder / weights) == sha256_file(tmp_path / "again" / weights)


def test_several_adapters_by_name(trained, tiny_base):
    _, run = trained
    loaded = api.load(tiny_base, dtype="float32", adapter={"a": run.folder, "b": run.folder})
    same = [api.generate(loaded, "A joy.", use=name, max_new_tokens=4) for name in ("a", "b", None)]
    assert same[0] == same[1] == same[2]
    bare = api.load(tiny_base, dtype="float32")
    assert api.generate(loaded, "A joy.", use="base", max_new_tokens=4) == api.generate(
        bare, "A joy.", max_new_tokens=4
    )
    with pytest.raises(AdapterError, match=r"--use c: no adapter has this name.*there are a, b, base"):
        api.generate(loaded, "a", use="c")


def test_dotted_settings_and_short_ones(tiny_base, tiny_reviews, tmp_path):
    loaded = ts.load(tiny_base, dtype="float32")
    ts.attach(loaded, rank=2)
    run = ts.train(
        loaded, tiny_reviews, max_steps=1, train__batch_size=4, data__template="plain", evaluate__rows=2, samples=0,
        console=quiet(), output_dir=str(tmp_path),
    )  # fmt: skip
    config = (run.folder / "config.yaml").read_text()
    assert all(text in config for text in ("batch_size: 4", "template: plain", "rows: 2", "rank: 2", "max_steps: 1"))


def test_training_goes_on_from_what_is_attached(trained, tiny_reviews, tmp_path):
    loaded, run = trained
    more = ts.train(
        loaded, tiny_reviews, epochs=1, batch_size=8, template="alpaca-short", learning_rate=0.001, samples=0,
        console=quiet(), output_dir=str(tmp_path), name="more",
    )  # fmt: skip
    assert more.after["eval_loss"] < run.before["eval_loss"] - 1
    assert more.before["eval_loss"] == pytest.approx(run.before["eval_loss"])  # the bare base, as before


@pytest.mark.parametrize(
    ("settings", "error", "what"),
    [
        ({"epoch": 2}, ConfigError, "epoch: unknown key"),
        ({"train__epoch": 2}, ConfigError, "train.epoch: unknown key.*did you mean 'epochs'"),
        ({"metrics": ["acc"]}, ConfigError, "no metric 'acc'"),
        ({"data__cutoff": 2}, DataError, "none of 24 rows has a supervised token"),
    ],
)
def test_wrong_settings(tiny_base, tiny_reviews, tmp_path, settings, error, what):
    loaded = ts.load(tiny_base)
    ts.attach(loaded)
    with pytest.raises(error, match=what):
        ts.train(loaded, tiny_reviews, console=quiet(), output_dir=str(tmp_path), **settings)


def test_wrong_order_and_wrong_words(trained, tiny_base, tiny_reviews, tmp_path):
    loaded, run = trained
    with pytest.raises(ConfigError, match=r'nothing is attached; call attach\(loaded, "lora"\) first'):
        ts.train(ts.load(tiny_base), tiny_reviews)
    with pytest.raises(AdapterError, match="already attached"):
        ts.attach(loaded)
    with pytest.raises(ConfigError, match="there is no method 'lorra'; did you mean 'lora'"):
        ts.attach(ts.load(tiny_base), "lorra")
    with pytest.raises(GenerationError, match="unknown setting 'temprature'; did you mean 'temperature'"):
        ts.generate(loaded, "a", temprature=1)
    with pytest.raises(ConfigError, match="which base model"):
        api.load()
    other = write_base(tmp_path / "other", seed=4)
    with pytest.raises(AdapterError, match="for another base"):
        api.load(other, adapter=run.folder)
    edit_json(other / "tokenizer_config.json", eos_token="</s>")
    with pytest.raises((AdapterError, TokenizerError)):
        api.load(other, adapter=run.folder)


def test_full_fine_tuning_through_the_api(tiny_base, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", reviews(16))
    loaded = ts.load(tiny_base, dtype="float32")
    ts.attach(loaded, "full")
    run = ts.train(
        loaded, data, valid_size=4, epochs=1, batch_size=4, template="plain", samples=0, learning_rate=0.01,
        console=quiet(), output_dir=str(tmp_path),
    )  # fmt: skip
    assert run.after["eval_loss"] < run.before["eval_loss"] - 0.5
    assert ts.verify(run.folder)["ok"]
    again = ts.load(run.folder)
    assert ts.generate(again, "A", max_new_tokens=3) == ts.generate(loaded, "A", max_new_tokens=3)
    with pytest.raises(AdapterError, match=r"--use base: default \(full\) changed the base's own weights"):
        ts.generate(again, "A", use="base")
    with pytest.raises(AdapterError, match="no other adapter fits beside it"):
        ts.load(tiny_base, adapter={"a": run.folder, "b": run.folder})


def test_full_fine_tuning_of_a_half_precision_base_is_refused(tiny_base, tiny_reviews, tmp_path):
    loaded = ts.load(tiny_base, dtype="bfloat16")
    ts.attach(loaded, "full")
    with pytest.raises(ConfigError, match="rounds their small updates away; set model.dtype=float32"):
        ts.train(loaded, tiny_reviews, console=quiet(), output_dir=str(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_terminal_talks_with_what_was_trained(command, monkeypatch, tiny_base, tiny_reviews, tmp_path, kind):
    loaded = ts.load(tiny_base, dtype="float32")
    ts.attach(loaded, kind)
    run = ts.train(
        loaded, tiny_reviews, epochs=1, batch_size=8, template="plain", samples=0, learning_rate=0.01,
        console=quiet(), output_dir=str(tmp_path),
    )  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("A joy.\n"))
    code, out, err = command("chat", run.folder, "--max-new-tokens", "3")
    assert code == 0, err
    assert api.generate(loaded, "A joy.", max_new_tokens=3)["text"].strip() in out


def test_a_run_is_measured_on_what_it_held_out_and_never_on_its_own_rows(tiny_base, tmp_path):
    file = write_rows(tmp_path / "all.jsonl", reviews(24))
    folders = []
    for name, more in (("held", {"valid_size": 6}), ("whole", {})):
        loaded = ts.load(tiny_base, dtype="float32")
        ts.attach(loaded, "lora", rank=2)
        run = ts.train(
            loaded, data=file, max_steps=1, template="alpaca-short", samples=0, console=quiet(),
            output_dir=str(tmp_path), name=name, **more,
        )  # fmt: skip
        folders.append(run.folder)
    assert api.evaluate(folders[0], metrics=["eval_loss"])["rows"] == 6
    with pytest.raises(DataError, match="is what the run was trained on"):
        api.evaluate(folders[1], metrics=["eval_loss"])
    assert api.evaluate(folders[1], data=str(file), metrics=["eval_loss"])["rows"] == 24  # asked for by name
