"""Faults in numbers and in memory, planted in a whole run, are named by it; what they stop is left as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import edit_weights, reviews, run_it, words, write_base, write_rows

from tunesmith import api, footprint, plan, prepare
from tunesmith.files import is_complete
from tunesmith.train import loop, memory
from tunesmith.train.log import read_metrics

pytestmark = pytest.mark.usefixtures("single_thread", "in_process")
GIB = 2**30


# Numbers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflowing(tmp_path) -> Path:
    """A base whose last down_proj is fine in float32 and beyond 65504 in float16."""
    base = write_base(tmp_path / "base")
    edit_weights(base, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e5))
    return base


def test_fp16_overflow_names_layer_size_and_row(command, overflowing, tiny_reviews, tmp_path):
    rows = tiny_reviews / "train.jsonl"
    err = run_it(command, overflowing, rows, tmp_path, code=4, model__dtype="float16", train__shuffle=False)
    last = err.splitlines()[-1]
    assert re.match(r"error: step 1: the loss is nan; first in the (in|out)put of model.layers.1.mlp.down_proj", last)
    assert re.search(r"values are not finite, the largest other is [\d,.]+ \(float16 ends at 65,504\)", last)
    assert re.search(rf"data row {re.escape(str(rows))}:[1-8]; the optimizer step was not made", last)
    assert "use model.dtype=bfloat16 or float32" in last
    assert not list((tmp_path / "run").glob("checkpoint-*")) and read_metrics(tmp_path / "run" / "metrics.jsonl") == []
    run_it(command, overflowing, rows, tmp_path, name="wide", model__dtype="float32", train__max_steps=1)


def test_a_held_out_loss_that_is_nan_is_no_best_checkpoint(command, overflowing, tiny_reviews, tmp_path):
    err = run_it(command, overflowing, tiny_reviews, tmp_path, code=4, model__dtype="float16")
    last = err.splitlines()[-1]
    assert last.startswith("error: step 0: the held-out loss is nan; first in the ")
    assert (
        "put of model.layers.1.mlp.down_proj" in last
        and "data row" in last
        and "valid.jsonl:" in last
        and "use model.dtype=bfloat16 or float32" in last
    )


def spoil_gradient(monkeypatch, step: int, factor: float) -> None:
    """From `step` on (from 0), multiply what flows back into the model; the loss itself stays as it is."""
    true = loop.pack_loss
    made = loop.Trainer._accumulate
    at = [0]

    def accumulate(self, *args):
        at[0] = self.progress.step
        return made(self, *args)

    def loss(model, pack, ctx, hidden):
        if at[0] >= step:
            hidden.register_hook(lambda grad: grad * factor)
        return true(model, pack, ctx, hidden)

    monkeypatch.setattr(loop.Trainer, "_accumulate", accumulate)
    monkeypatch.setattr(loop, "pack_loss", loss)


@pytest.mark.parametrize("fault", ["gradient", "loss", "zero loss"])
def test_what_stops_a_step_leaves_the_state_as_it_was(tiny_base, tiny_reviews, tmp_path, monkeypatch, fault):
    """At step 4; the checkpoint of step 3 holds what the model holds then, to the bit."""
    from tunesmith.errors import NumericalError

    if fault == "gradient":
        spoil_gradient(monkeypatch, 3, float("nan"))
    else:
        true, calls = loop.Trainer._accumulate, []

        def accumulate(self, pack, supervised, rows):
            value = true(self, pack, supervised, rows)
            if self.progress.step < 3:
                return value
            calls.append(value)
            return float("nan") if fault == "loss" else 0.0

        monkeypatch.setattr(loop.Trainer, "_accumulate", accumulate)
    loaded = api.load(tiny_base, dtype="float32", device="cpu")
    adapter = api.attach(loaded, "lora", rank=2)
    with pytest.raises(NumericalError) as stopped:
        api.train(
            loaded, tiny_reviews, epochs=3, batch_size=8, learning_rate=0.01, samples=0, template="alpaca-short",
            train__save_steps=1, output_dir=str(tmp_path), name="run",
        )  # fmt: skip
    text = str(stopped.value)
    assert text.startswith("step 4: ")
    assert {
        "gradient": "the gradient of model.layers.0.self_attn.q_proj.edit.",
        "loss": "the loss is nan; the optimizer step was not made",
        "zero loss": "the loss is exactly 0.0. Either no token of the batch is supervised",
    }[fault] in text
    kept = load_file(tmp_path / "run" / "checkpoint-000003" / "adapter.safetensors")
    state = adapter.state()
    assert set(kept) == set(state) and all(torch.equal(kept[key], state[key]) for key in kept)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_one_bad_row_is_found_by_its_line(command, tmp_path):
    """Only the letter Q overflows, and only in float16."""
    base = write_base(tmp_path / "base", tie_word_embeddings=False)
    from tunesmith.tokenizer import load_tokenizer

    letter = load_tokenizer(base).encode("Q")
    assert len(letter) == 1

    def large(tensors):
        tensors["model.embed_tokens.weight"][letter[0]] = 65000.0
        tensors["model.layers.0.self_attn.o_proj.weight"].mul_(2000)

    edit_weights(base, large)
    rows = reviews(24)
    rows[18]["text"] += " Q"
    data = write_rows(tmp_path / "d.jsonl", rows)
    given = {"model__dtype": "float16", "train__shuffle": False, "train__save_steps": 1}
    err = run_it(command, base, data, tmp_path, code=4, **given)
    last = err.splitlines()[-1]
    assert last.startswith(
        "error: step 3: the loss is nan; first in the input of model.layers.0.post_attention_layernorm"
    )
    assert f"data row {data}:19; the optimizer step was not made" in last
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))][-1] == "checkpoint-000002"


def test_a_loss_of_uniform_logits_is_said_to_be_missing_weights(command, tiny_reviews, tmp_path):
    base = write_base(tmp_path / "base")
    edit_weights(base, lambda tensors: tensors["model.embed_tokens.weight"].zero_())
    err = run_it(command, base, tiny_reviews, tmp_path, code=4)
    assert "warning: step 1: the loss 6.6438 is ln(768), that of a model whose logits are all equal" in err
    assert "the base weights look as if they had not been loaded; check model.path" in err
    assert "every gradient is exactly 0, so training cannot move" in err.splitlines()[-1]


def test_a_module_without_a_gradient_is_named_from_the_second_update_on(command, tiny_reviews, tmp_path):
    base = write_base(tmp_path / "base")
    edit_weights(base, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"].zero_())
    err = run_it(command, base, tiny_reviews, tmp_path, adapter__target_modules=["q_proj"])
    assert "warning: step 2: the gradient of model.layers.1.self_attn.q_proj.edit.A (and model.layers.1." in err
    assert (
        "is exactly 0 after 1 updates, so it does not learn" in err and "layers.0" not in err.split("warning: step")[1]
    )
    assert "warning: step 1" not in err


def test_fp16_gradients_that_overflow_say_that_the_step_is_skipped(
    command, tiny_base, tiny_reviews, tmp_path, monkeypatch
):
    spoil_gradient(monkeypatch, 0, float("inf"))
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, code=4, model__dtype="float16", train__epochs=9)
    assert "warning: step 1: fp16 gradients overflowed, step skipped; the loss scale is halved" in err
    assert "fp16 gradients overflow even without loss scaling" in err.splitlines()[-1]


def test_a_long_warm_up_is_said_in_optimizer_steps(command, tiny_base, tiny_reviews, tmp_path, caplog):
    given = {"train__epochs": 4, "train__warmup_steps": 6, "train__micro_batch": 1}
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, **given)
    said = err + caplog.text
    assert "warm-up takes 6 of 12 optimizer steps (50%); more than 20% is rarely meant" in said
    assert "micro-batches were not counted as steps" in said
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates.index(max(rates)) == 6  # the unit is the optimizer step, whatever the micro-batch


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [None, 4096])
def test_what_cannot_fit_is_refused_before_training(command, tiny_base, tiny_reviews, tmp_path, monkeypatch, pack):
    monkeypatch.setattr(footprint, "usable_memory", lambda device: int(0.2 * GIB))
    monkeypatch.setattr(plan, "usable_memory", lambda device: int(0.2 * GIB))
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, code=3, train__pack_tokens=pack)
    last = err.splitlines()[-1]
    assert re.search(r"error: .*a pack of \d+ tokens of this 0M model needs 0\.\d+ GiB", last)
    assert "may be used; try" in last and "a smaller model" in last
    assert not (tmp_path / "run").exists()
    given = [word for word in words(tiny_base, tiny_reviews, tmp_path, train__pack_tokens=pack) if "=" in word]
    code, out, err = command("plan", "--no-time", "--model", tiny_base, "--data", tiny_reviews, *given)
    assert code == 0, err
    assert "fits                     False" in out and "needs" in out


def test_weights_that_cannot_fit_are_not_even_read(command, tiny_base, tiny_reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda device: 10_000)
    monkeypatch.setattr(prepare, "load_model", None)
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, code=3)
    assert "the weights of this 0M model take 0.00 GiB in float32" in err and "set model.dtype=bfloat16" in err


def test_memory_held_already_counts_as_there(monkeypatch):
    """The weights are in the plan, and when it is made they are in memory: they must not count twice."""
    monkeypatch.setattr(memory, "available_memory", lambda device: 3 * GIB)
    monkeypatch.setattr(memory, "resident_memory", lambda: (2 * GIB, 2 * GIB))
    assert memory.usable_memory("cpu") == 5 * GIB


def test_everything_is_quiet_when_nothing_is_wrong(command, tiny_base, tiny_reviews, tmp_path):
    err = run_it(command, tiny_base, tiny_reviews, tmp_path, train__epochs=2)
    assert "warning" not in err and "error" not in err and is_complete(tmp_path / "run" / "adapter")
