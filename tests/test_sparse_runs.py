"""Sparse attention in a run: set in the configuration, saved with the adapter, there again when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny import run_it

from tunesmith import api
from tunesmith.config import load_run
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.files import sha256_file
from tunesmith.model.layout import Layout

LOCAL = {"pattern": "local", "window": 6}
S2 = {"pattern": "s2", "group": 8}
pytestmark = pytest.mark.usefixtures("single_thread", "in_process")


@pytest.fixture
def train(command, tiny_base, tiny_reviews, tmp_path):
    """Train with this attention; returns the run folder."""

    def run(attention: dict[str, object] | None, name: str = "run", **settings: object) -> Path:
        run_it(command, tiny_base, tiny_reviews, tmp_path / name, model__attention=attention, **settings)
        return tmp_path / name / "run"

    return run


def logits(loaded: api.Loaded) -> torch.Tensor:
    """Logits of a row longer than every window."""
    model, layout = loaded.model, Layout.single(40)
    with torch.no_grad():
        ctx = model.context(layout)
        return model.logits(model.run(torch.arange(40) * 7 % 500, ctx), ctx)


def test_what_was_trained_sparse_is_loaded_sparse(train, command, tiny_base) -> None:
    run = train(LOCAL)
    assert json.loads((run / "verify.json").read_text())["ok"]
    own = run / "adapter" / "tunesmith.json"
    assert json.loads(own.read_text())["attention"] == LOCAL
    assert json.loads(command("inspect", run, "--json")[1])["saved_adapter"]["attention"] == LOCAL
    assert "other tools would compute full attention" in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    loaded = api.load(run)
    assert loaded.model.pattern is not None and loaded.model.pattern.settings == LOCAL
    sparse = logits(loaded)
    assert torch.equal(sparse, logits(api.load(tiny_base, adapter=run / "adapter")))
    loaded.model.pattern = None
    assert not torch.allclose(sparse, logits(loaded))
    assert api.verify(run / "adapter", base=str(tiny_base))["ok"]
    forged = {**json.loads(own.read_text()), "attention": {"pattern": "local", "window": 0}}
    own.write_text(json.dumps(forged))
    with pytest.raises(AdapterError, match="tunesmith.json: attention.window"):
        api.load(run)


def test_verification_sees_attention_that_was_lost(train, tiny_base) -> None:
    run = train(LOCAL)
    own = run / "adapter" / "tunesmith.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "attention": None}))
    failed = {check["name"] for check in api.verify(run, base=str(tiny_base))["checks"] if not check["ok"]}
    assert {"base logits", "live logits"} <= failed


def test_a_merge_would_lose_it(train, command, tmp_path) -> None:
    run = train(LOCAL)
    code, _, err = command("merge", run, "--out", tmp_path / "merged")
    assert code == 2 and "sparse attention (local, window 6)" in err and not (tmp_path / "merged").exists()
    assert command("merge", run, "--out", tmp_path / "merged", "--force")[0] == 0
    dense = train(S2, "s2")  # trained sparse, evaluated dense
    assert command("merge", dense, "--out", tmp_path / "merged-s2", "--dtype", "float32")[0] == 0


def test_adapters_of_other_attention_do_not_go_together(train, tiny_base) -> None:
    runs = {name: train(attention, name) for name, attention in (("full", None), ("local", LOCAL), ("s2", S2))}
    both = api.load(tiny_base, adapter={"a": runs["full"], "b": runs["s2"]})
    assert both.model.pattern is None  # evaluated alike
    with pytest.raises(AdapterError, match=r"local, window 6.*full.*load this adapter alone"):
        api.load(tiny_base, adapter={"a": runs["full"], "b": runs["local"]})


def test_it_changes_the_run_and_a_rerun_repeats_it(train) -> None:
    names = {"full": None, "local": LOCAL, "again": LOCAL, "s2": S2}
    files = {
        name: sha256_file(train(attention, name) / "adapter" / "adapter_model.safetensors")
        for name, attention in names.items()
    }
    assert files["local"] == files["again"] and len(set(files.values())) == 3


def test_a_loaded_model_trains_with_the_attention_that_is_asked_for_or_its_own(
    train, tiny_base, tiny_reviews, tmp_path
) -> None:
    given = {
        "max_steps": 1, "samples": 0, "template": "alpaca-short", "cutoff": 128, "output_dir": str(tmp_path),
        "train__pack_tokens": 256,
    }  # fmt: skip
    loaded = api.load(train(LOCAL))
    more = api.train(loaded, tiny_reviews, name="own", **given)
    assert load_run(more.folder / "config.yaml")[0].model.attention.to_dict() == LOCAL
    fresh = api.load(tiny_base)
    api.attach(fresh, "lora", rank=2)
    other = api.train(fresh, tiny_reviews, name="asked", model__attention=S2, **given)
    assert fresh.model.pattern is not None and fresh.model.pattern.settings == S2
    assert json.loads((other.folder / "adapter" / "tunesmith.json").read_text())["attention"] == S2


def test_a_pattern_that_does_nothing_is_said(command, tiny_base, tiny_reviews, tmp_path) -> None:
    wide = {"pattern": "local", "window": 4096}
    said = run_it(command, tiny_base, tiny_reviews, tmp_path, model__attention=wide)
    assert "warning: model.attention (local, window 4096) hides nothing of the longest row, which has" in said
    assert "hides nothing" not in run_it(command, tiny_base, tiny_reviews, tmp_path / "b", model__attention=LOCAL)


def test_attention_dropout(train, command, tiny_base, tiny_reviews, tmp_path) -> None:
    said = run_it(command, tiny_base, tiny_reviews, tmp_path, train__attention_dropout=0.2)
    assert "prefixes are not shared" in said
    plain = train(None, "plain", train__share_prefix=False)
    dropped = tmp_path / "run"
    weights = [sha256_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, dropped)]
    assert weights[0] != weights[1]
    again = train(None, "again", train__attention_dropout=0.2)
    assert sha256_file(again / "adapter" / "adapter_model.safetensors") == weights[1]


def test_a_resumed_run_drops_the_same(command, tiny_base, tiny_reviews, tmp_path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    settings = {"train__attention_dropout": 0.2, "train__save_steps": 1, "train__keep_checkpoints": 9}
    run_it(command, tiny_base, tiny_reviews, whole, model__attention=S2, **settings)
    run_it(command, tiny_base, tiny_reviews, halved, model__attention=S2, **settings)
    run = halved / "run"
    for step in ("000002", "000003"):
        for file in (run / f"checkpoint-{step}").iterdir():
            file.unlink()
        (run / f"checkpoint-{step}").rmdir()
    code, _, err = command("train", run / "config.yaml", "--resume", run)
    assert code == 0 and "resumed from" in err, err
    ends = [sha256_file(folder / "run" / "adapter" / "adapter_model.safetensors") for folder in (whole, halved)]
    assert ends[0] == ends[1]


WRONG = {
    "{pattern: local}": "local needs window, such as {pattern: local, window: 64}",
    "{pattern: s2, group: 7}": "group: should be a multiple of 2, not 7",
    "{pattern: s2, group: 8, window: 3}": "window does nothing with s2, which uses group; leave it out",
    "{window: 3}": "window does nothing with full, which uses no setting; leave it out",
    "{patern: s2}": "patern: unknown key; did you mean 'pattern'?",
    "{pattern: stridded, stride: 4}": "did you mean 'strided'?",
    "{pattern: fixed, block: 8, columns: 8}": "columns 8 of blocks of 8 are all of them; give fewer",
    "{pattern: local, window: 2.5}": "window: should be a valid integer, not 2.5",
    "s2": "should be a mapping, such as {pattern: local, window: 256}, not 's2'",
}


@pytest.mark.parametrize("value", WRONG)
def test_wrong_settings_are_named(value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(None, ["model=a", "data=b", f"model.attention={value}"])
    assert str(error.value).startswith("model.attention: ") and WRONG[value] in str(error.value)
    assert "override model.attention" in str(error.value)


def test_a_line_of_a_file_is_named(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  path: a\n  attention:\n    pattern: local\n    windw: 4\ndata: b\n")
    with pytest.raises(ConfigError, match=r"windw: unknown key; did you mean 'window'\? \(config.yaml line 3\)"):
        load_run(path)


@pytest.mark.parametrize("attention", [None, LOCAL, S2, {"pattern": "full"}, {"pattern": "fixed", "block": 8}])
def test_a_dumped_run_loads_equal(attention, tmp_path) -> None:
    run, _ = load_run(None, [], {"model.path": "a", "data.train": "b", "model.attention": attention})
    path = tmp_path / "config.yaml"
    path.write_text(run.dump_yaml())
    assert load_run(path)[0] == run and "stride" not in run.dump_yaml()


def test_a_model_with_one_key_value_head_has_no_halves(command, tiny_reviews, tmp_path) -> None:
    from tests.tiny import write_base

    single = write_base(tmp_path / "base", num_key_value_heads=1)
    err = run_it(command, single, tiny_reviews, tmp_path, code=2, model__attention=S2)
    assert "s2 needs two KV heads" in err
