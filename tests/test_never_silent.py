"""Every fault of DESIGN section 6 and of the field's failure table, planted in a whole run, is named by it.

Numbers and memory are in test_never_silent_numbers.py; faults that the command line refuses outright (typos, missing
weights, wrong bases) in test_bad_input.py; the best checkpoint by task against by loss, the plan beside the measure,
and masking by default in test_workflow.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import edit_json, reviews, run_it, words, write_base, write_rows

from tunesmith import api
from tunesmith.adapters import peft_format
from tunesmith.train import loop

pytestmark = pytest.mark.usefixtures("single_thread", "in_process")
GIB = 2**30


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, tiny_reviews) -> Path:
    """A finished run. Do not change it."""
    import contextlib
    import io

    from tunesmith.cli import main

    out = tmp_path_factory.mktemp("trained")
    given = words(tiny_base, tiny_reviews, out, train__epochs=2, evaluate__samples=0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *given]) == 0
    return out / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run, to be broken."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# What was saved ----------------------------------------------------------------------------------------------------


def empty(tensors):
    return {}


def doubled_prefix(tensors):
    return {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}


def one_missing(tensors):
    return dict(list(tensors.items())[1:])


def untrained(tensors):
    return {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in tensors.items()}


def of_another_step(tensors):
    return {key: tensor * 1.5 for key, tensor in tensors.items()}


def with_nan(tensors):
    return {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}


SAVED = [
    (empty, "tensors", "reload"),
    (doubled_prefix, "keys", "keys"),
    (one_missing, "reload", "reload"),
    (untrained, "tensors", "live logits"),
    (of_another_step, "live logits", "live logits"),
    (with_nan, "tensors", "reload"),
]


@pytest.mark.parametrize(("change", "first", "also"), SAVED, ids=lambda v: getattr(v, "__name__", ""))
def test_a_run_whose_adapter_was_saved_wrongly_fails(
    command, tiny_base, tiny_reviews, tmp_path, monkeypatch, change, first, also
):
    """The fault is in what is written at the end of training, as in the 443 bytes of the field's best-known bug."""
    save = peft_format.atomic_save_safetensors
    monkeypatch.setattr(peft_format, "atomic_save_safetensors", lambda path, t, meta: save(path, change(t), meta))
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, code=4, train__max_steps=3)
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}: ")
    failed = {c["name"] for c in json.loads((tmp_path / "run" / "verify.json").read_text())["checks"] if not c["ok"]}
    assert first in failed or also in failed
    assert "FAIL" in (tmp_path / "run" / "report.html").read_text()


def twice_filtered(tensors):
    return {key.replace(".lora_A", ".default.lora"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (empty, "an empty adapter of"),
        (twice_filtered, "q_proj.lora_A.weight"),
        (one_missing, "lora_A.weight is missing"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_such_an_adapter_is_not_used_either(command, run, change, what):
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    code, out, err = command("generate", run, "--prompt", "a", "--max-new-tokens", "1")
    assert (code, out) == (2, "") and err.startswith("error: ") and what in err
    code, out, _ = command("verify", run)
    assert code == 4 and "FAIL" in out


def test_an_adapter_that_changes_nothing_says_so_when_it_is_loaded(run, caplog):
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(untrained(load_file(file)), file)
    api.load(run)
    assert "this adapter changes nothing: every lora_B is zero" in caplog.text


def test_a_lossy_merge_is_refused_and_a_good_one_reported(command, trained, tiny_base, tiny_reviews, tmp_path):
    code, _, err = command("merge", trained, "--out", tmp_path / "good")
    assert code == 0 and "least survived" in err and "top1 agreement" in err
    weak = {"train__learning_rate": 1e-5, "train__max_steps": 2, "train__pack_tokens": 512}
    run_it(command, tiny_base, tiny_reviews, tmp_path, **weak)
    code, _, err = command("merge", tmp_path / "run", "--out", tmp_path / "lossy", "--dtype", "bfloat16")
    assert code == 4 and "rounding to bfloat16 lost" in err and "--dtype float32" in err
    assert not (tmp_path / "lossy").exists()


# Template and tokenizer --------------------------------------------------------------------------------------------


def test_a_template_that_renders_otherwise_than_in_training_is_refused(command, run):
    file = run / "adapter" / "tunesmith.json"
    text = file.read_text()
    assert "### Response" in text
    file.write_text(text.replace("### Response", "### Answer"))
    code, out, err = command("generate", run, "--prompt", "a")
    assert (code, out) == (2, "") and "does not render as it did in training" in err
    code, out, _ = command("verify", run)
    assert code == 4 and re.search(r"FAIL +template", out)


def test_the_adapter_brings_its_own_template_whatever_the_base_says_now(command, trained, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    ask = ("generate", "--adapter", trained, "--prompt", "A joy.", "--max-new-tokens", "8", "--dtype", "float32")
    before = command(*ask, "--model", tiny_base)
    edit_json(base / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    assert command(*ask, "--model", base) == before


def test_eos_stays_supervised_where_pad_is_eos(command, tiny_base, tiny_reviews, tmp_path, monkeypatch):
    seen = []
    make = loop.Trainer.__init__

    def note(self, model, adapter, examples, *args, **more):
        seen.extend(examples)
        make(self, model, adapter, examples, *args, **more)

    monkeypatch.setattr(loop.Trainer, "__init__", note)
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, train__max_steps=1)
    assert "pad and EOS are the same token (2); nothing is padded or masked by id here, so EOS is still learned" in err
    assert len(seen) == 24 and all(e.ids[-1] == 2 and e.supervised[-1] for e in seen)
    assert re.search(r"train: rows without EOS +0\n", err)


def test_ids_that_tokenizer_and_model_see_differently_are_named(command, tiny_reviews, tmp_path):
    base = write_base(tmp_path / "base")
    edit_json(base / "config.json", eos_token_id=5, bos_token_id=3)
    edit_json(base / "tokenizer_config.json", bos_token="<|im_start|>")
    err = run_it(command, base, tiny_reviews, tmp_path, train__max_steps=1)
    assert "tokenizer: the tokenizer ends a text with id 2, the model's configuration says 5" in err
    assert "tokenizer: the tokenizer begins a text with id 1, the model's configuration says 3" in err


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        ({"bos_token": "", "eos_token": "", "pad_token": ""}, "no EOS token is named"),  # the first LLaMA conversions
        ({"bos_token": "<|im_end|>", "eos_token": "</s>"}, "begins texts with '<|im_end|>' (2), but the config ends"),
        ({"eos_token": "</a>"}, "eos_token '</a>' is not in the vocabulary"),
        ({"eos_token": "a"}, "plain text became the special token 'a'"),
    ],
)  # fmt: skip
def test_a_broken_tokenizer_configuration_is_refused(command, tiny_reviews, tmp_path, tokens, what):
    base = write_base(tmp_path / "base")
    if tokens.get("eos_token") == "":
        edit_json(base / "config.json", eos_token_id=None)
    edit_json(base / "tokenizer_config.json", **tokens)
    err = run_it(command, base, tiny_reviews, tmp_path, code=2)
    assert what in err.splitlines()[-1]


# Data --------------------------------------------------------------------------------------------------------------


def before_training(err: str, line: str) -> bool:
    """Was `line` said, and before the first step?"""
    return line in err and err.index(line) < err.index("step 1/")


CUT = 40
LONG = [{"instruction": f"say {i}", "output": " ".join(["many words"] * (1 + 9 * (i % 2)))} for i in range(8)]


def test_rows_cut_before_their_eos_are_counted_and_shown(command, tiny_base, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", LONG)
    err = run_it(command, tiny_base, data, tmp_path, data__cutoff=CUT)
    assert re.search(rf"train: rows cut +4 \(in the answer 4; cutoff {CUT} tokens\)", err)
    assert re.search(r"train: rows without EOS +4\n", err)
    assert before_training(
        err, "warning: 4 of 8 rows end inside the answer, so the model learns to stop short or never"
    )
    assert before_training(err, f"(such as {data}:2)")


def test_rows_without_a_supervised_token_are_counted_and_shown(command, tiny_base, tmp_path):
    rows = [{"instruction": "say " + " ".join(["so"] * (40 * (i % 2))), "output": f"it {i}"} for i in range(8)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    err = run_it(command, tiny_base, data, tmp_path, data__cutoff=CUT)
    assert before_training(err, "warning: 4 of 8 rows have no supervised token and teach nothing; raise data.cutoff")


def test_two_bos_are_counted_and_shown(command, tmp_path):
    base = write_base(
        tmp_path / "base",
        chat_template="{{ bos_token }}{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    edit_json(base / "tokenizer_config.json", bos_token="<s>", add_bos_token=True)
    data = write_rows(tmp_path / "d.jsonl", LONG)
    err = run_it(command, base, data, tmp_path, data__template="chat")
    assert before_training(err, "warning: 8 of 8 rows begin with two BOS tokens; take the BOS out of the template")


def test_rows_shared_by_training_and_validation_are_counted(command, tiny_base, tmp_path):
    rows = reviews(8)
    write_rows(tmp_path / "d" / "train.jsonl", rows)
    write_rows(tmp_path / "d" / "valid.jsonl", rows[:3] + reviews(3, seed=9))
    err = run_it(command, tiny_base, tmp_path / "d", tmp_path)
    assert before_training(err, "valid: warning: 3 of 6 rows also occur in the training set")


def test_the_preview_counts_the_same(command, tiny_base, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", LONG)
    given = words(tiny_base, data, tmp_path, data__cutoff=CUT)
    chosen = [word for word in given if "=" in word]
    code, out, _ = command("data", "preview", "--model", tiny_base, "--data", data, "--json", *chosen)
    report = json.loads(out)["train"]
    assert code == 0 and (report["cut_in_answer"], report["no_eos"], report["rows"]) == (4, 4, 8)


def test_group_by_length_is_answered(command, tiny_base, tiny_reviews, tmp_path):
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, group_by_length=True, train__max_steps=1)
    assert err.startswith("note: group_by_length: nothing to do: examples lie end to end and nothing is padded\n")


def test_the_prompt_copy_rate_sees_a_model_that_repeats_its_prompt(command, trained, monkeypatch):
    from tunesmith.evaluate import generations
    from tunesmith.inference.answers import Generation

    ask = ("evaluate", trained, "--split", "valid", "--metrics", "prompt_copy_rate", "--json")
    assert json.loads(command(*ask)[1])["prompt_copy_rate"] < 0.5

    fields = list(Generation.__dataclass_fields__)
    made = {"text": "", "ids": (), "finish_reason": "length"}

    def copying(model, prompts, *_: object, **__: object):
        return [Generation(**{key: {**made, "ids": tuple(p[-20:])}.get(key, 0) for key in fields}) for p in prompts]

    monkeypatch.setattr(generations, "generate", copying)
    assert json.loads(command(*ask)[1])["prompt_copy_rate"] == 1.0
