"""Bad input through the command line: exit code 2, nothing on stdout, one `error:` line that names the cure."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.tiny import edit_json, edit_weights, reviews, words, write_base, write_rows

pytestmark = pytest.mark.usefixtures("single_thread", "in_process")


def error_of(command, *args: object, code: int = 2) -> str:
    """Run a command that must fail; return its one error line, the last: data and memory may have been told before."""
    got, out, err = command(*args)
    assert (got, out) == (code, ""), err
    *before, last = err.splitlines()
    assert last.startswith("error: ") and not any("error" in line or "Traceback" in line for line in before), err
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, tiny_reviews) -> Path:
    """A finished run. Do not change it."""
    import contextlib
    import io

    from tunesmith.cli import main

    out = tmp_path_factory.mktemp("trained")
    given = words(tiny_base, tiny_reviews, out, train__max_steps=3, evaluate__samples=0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *given]) == 0
    return out / "run"


SETTINGS = [  # settings of an otherwise good run -> what the line says
    ({"train.epoch": 1}, "train.epoch: unknown key", "did you mean 'epochs'?"),
    ({"lernrate": 1}, "lernrate: unknown key", ""),
    ({"adapter.kind": "lroa"}, "adapter.kind: there is no method 'lroa'", "did you mean 'lora'?"),
    ({"adapter.rnk": 8}, "adapter.rnk: unknown key", "did you mean 'rank'?"),
    ({"adapter.rank": 0}, "adapter.rank: should be greater than or equal to 1", ""),
    ({"adapter.target_modules": ["q_porj"]}, "'q_porj'", "did you mean 'q_proj'?"),
    ({"adapter.target_modules": "nothing.*"}, "adapter.target_modules: 'nothing.*' matches no module", "q_proj"),
    ({"adapter.layers_to_transform": [2]}, "adapter.layers_to_transform: no layer 2", "layers 0 to 1"),
    ({"evaluate.metrics": ["acuracy"]}, "evaluate.metrics: there is no metric 'acuracy'", "did you mean 'accuracy'?"),
    ({"evaluate.best": "accuracy"}, "best is 'accuracy', which is not measured", "add it to metrics"),
    ({"data.template": "alpacca"}, "data.template: unknown template 'alpacca'", "did you mean 'alpaca'?"),
    ({"data.template": "{instructon}{output}"}, "instructon", "instruction"),
    ({"data.schema": "alpca"}, "alpca", "alpaca"),
    ({"data.valid_size": 24}, "data.valid_size=24: must be less than the 24 rows", ""),
    ({"data.valid_size": 1.5}, "data.valid_size: a share must be below 1", "write a whole number"),
    ({"model.device": "cuda:9"}, "model.device: 'cuda:9' is not there", "use auto or cpu"),
    ({"model.device": "gpu"}, "model.device", "auto"),
    ({"model.dtype": "fp16"}, "model.dtype", "'float16'"),
    ({"train.warmup_steps": 99}, "train.warmup_steps: 99 of warm-up and only 3 optimizer steps", "use at most 0"),
    ({"train.warmup_steps": 1, "train.warmup_ratio": 0.1}, "keep one", "warm-up"),
    ({"train.learning_rate": -1}, "train.learning_rate: should be greater than 0", ""),
    ({"train.schedule": "cosin"}, "train.schedule", "did you mean 'cosine'?"),
    ({"log.report_to": ["tensorbord"]}, "log.report_to", "'tensorboard'"),
    ({"data.cutoff": 2}, "none of 24 rows has a supervised token", "raise data.cutoff"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "what", "cure"), SETTINGS, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
def test_a_bad_setting(command, tiny_base, tiny_reviews, tmp_path, settings, what, cure):
    line = error_of(command, "train", *words(tiny_base, tiny_reviews / "train.jsonl", tmp_path, **settings))
    assert what in line and cure in line
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_patience_without_held_out_rows(command, tiny_base, tiny_reviews, tmp_path):
    for given in ({"evaluate.patience": 2}, {"evaluate.metrics": ["accuracy"]}):
        line = error_of(command, "train", *words(tiny_base, tiny_reviews / "train.jsonl", tmp_path, **given))
        assert f"{next(iter(given))}: there are no held-out rows to measure on; give data.valid, or" in line


# Files -------------------------------------------------------------------------------------------------------------


DATA = [
    (None, "no such file", ""),
    ("", "is empty", "give it data"),
    ("\n\n", "holds no row", "give it data"),
    ('{"text": "a", "label": "b"\n', "data.jsonl:1: ", ""),
    ('{"txt": "a", "lable": "b"}\n', "data.jsonl:1: ", ""),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', "data.jsonl:2: ", "output"),
    ('{"messages": [{"role": "user", "content": "hi"}]}\n', "data.jsonl:1: ", "assistant"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": false}]}\n',
     "none of 1 rows has a supervised token", 'marked "loss": false'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "what", "cure"), DATA)
def test_bad_data(command, tiny_base, tmp_path, text, what, cure):
    data = tmp_path / "data.jsonl"
    if text is not None:
        data.write_text(text, encoding="utf-8")
    line = error_of(command, "train", *words(tiny_base, data, tmp_path, data__template="chat"))
    assert what in line and cure in line and "data.jsonl" in line or "none of 1 rows" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_file(command, tmp_path):
    (tmp_path / "config.yaml").write_text("model: x\n")
    assert "no such configuration file" in error_of(command, "train", tmp_path / "confg.yaml")


def test_an_unknown_key_in_yaml_names_its_line(command, tmp_path):
    (tmp_path / "config.yaml").write_text("model: x\ndata: y\ntrain:\n  epochs: 1\n  learningrate: 3\n")
    line = error_of(command, "train", tmp_path / "config.yaml")
    assert "train.learningrate: unknown key" in line and "line 5" in line and "'learning_rate'" in line


def test_a_model_that_is_not_there(command, tiny_reviews, tmp_path):
    line = error_of(command, "train", *words(Path("smollm2-135m-instuct"), tiny_reviews, tmp_path))
    assert "did you mean 'smollm2-135m-instruct'?" in line


def broken(tmp_path: Path, how) -> Path:
    base = write_base(tmp_path / "base")
    how(base)
    return base


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def with_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def without_a_tensor(base: Path) -> None:
    edit_weights(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def of_another_shape(base: Path) -> None:
    edit_json(base / "config.json", intermediate_size=41)


def without_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def with_a_larger_tokenizer(base: Path) -> None:
    edit_weights(
        base,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:300].clone()}
        ),
    )
    edit_json(base / "config.json", vocab_size=300)


def of_another_kind(base: Path) -> None:
    edit_json(base / "config.json", model_type="gpt2")


def with_a_nan(base: Path) -> None:
    edit_weights(base, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def without_chat_template(base: Path) -> None:
    edit_json(base / "tokenizer_config.json", chat_template=None)


MODELS = [
    (without_weights, "no model.safetensors", ""),
    (with_pickle, "pytorch_model.bin", "convert"),
    (without_a_tensor, "model.layers.1.mlp.up_proj.weight is missing", "is the download complete?"),
    (of_another_shape, "gate_proj.weight has shape [40, 24], the config says [41, 24]", "belong together"),
    (without_tokenizer, "no tokenizer.json or tokenizer.model", "download the folder again, tokenizer included"),
    (with_a_larger_tokenizer, "the model embeds 300", "use the tokenizer that came with the weights"),
    (of_another_kind, "model_type 'gpt2' is not supported", "llama"),
    (with_a_nan, "model.norm.weight holds NaN", "damaged"),
    (without_chat_template, "has no chat template", "choose one of alpaca"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "what", "cure"), MODELS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_model(command, tmp_path, tiny_reviews, how, what, cure):
    base = broken(tmp_path, how)
    line = error_of(command, "train", *words(base, tiny_reviews, tmp_path, data__template="chat"))
    assert what in line and cure in line
    assert not (tmp_path / "run").exists()


# Adapters and runs -------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base(command, trained, tmp_path):
    other = write_base(tmp_path / "other", seed=1)
    line = error_of(command, "generate", "--model", other, "--adapter", trained, "--prompt", "a")
    assert "this adapter is for another base" in line and "give that model" in line
    larger = write_base(tmp_path / "larger", num_hidden_layers=3)
    line = error_of(command, "evaluate", trained, "--base", larger, "--split", "valid")
    assert "num_hidden_layers 2 there, 3 here" in line


def test_an_adapter_whose_base_has_another_tokenizer_now(command, trained, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edit_json(base / "tokenizer_config.json", eos_token="</s>")
    line = error_of(command, "generate", "--model", base, "--adapter", trained, "--prompt", "a")
    assert "was trained with another tokenizer than" in line and "use the base it was trained on" in line


def test_an_adapter_that_is_pickled(command, trained, tiny_base, tmp_path):
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    line = error_of(command, "generate", "--model", tiny_base, "--adapter", adapter, "--prompt", "a")
    assert "adapter_model.bin" in line and "convert" in line


def test_a_folder_without_an_adapter(command, tiny_base, tmp_path):
    line = error_of(command, "merge", tmp_path, "--out", tmp_path / "merged")
    assert "holds no adapter" in line
    line = error_of(command, "generate", "--model", tiny_base, "--adapter", tmp_path / "none", "--prompt", "a")
    assert "no such adapter folder" in line


def test_the_name_is_taken(command, trained, tiny_base, tiny_reviews):
    line = error_of(command, "train", *words(tiny_base, tiny_reviews, trained.parent))
    assert f"name: {trained} is there already; choose another name, or go on with --resume {trained}" in line


def test_nothing_to_resume_from(command, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    line = error_of(command, "train", "--resume", run)
    assert "has no complete checkpoint to resume from" in line and "remove the folder and start the run again" in line
    assert "no such run folder; did you mean 'run'?" in error_of(command, "train", "--resume", tmp_path / "rum")
    (run / "config.yaml").unlink()
    assert "holds no config.yaml, so it is no run folder" in error_of(command, "train", "--resume", run)
    assert "say which run to go on with" in error_of(command, "train", "--resume")


def test_a_run_that_never_finished_cannot_be_verified(command, trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    assert f"go on with tunesmith train --resume {run}" in error_of(command, "verify", run)


GENERATION = [
    (("--beams", "4", "--temperature", "0.7"), "temperature=0.7 has no effect with beams=4", "set beams=1 to sample"),
    (("--top-k", "5"), "top_k=5 has no effect with temperature=0", "set temperature=1"),
    (("--temperature", "-1"), "temperature=-1.0: must be 0 (greedy) or more", ""),
    (("--max-new-tokens", "0"), "max_new_tokens=0: must be a whole number of at least 1", ""),
    (("--top-p", "2", "--temperature", "1"), "top_p=2.0: must be above 0 and at most 1", ""),
    (("--stop", ""), "non-empty strings", ""),
    (("--use", "defualt"), "--use defualt: no adapter has this name", "did you mean 'default'?"),
    (("--stream", "--json"), "--stream cannot act with --json", "leave one of them out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "what", "cure"), GENERATION, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_bad_generation_settings(command, trained, flags, what, cure):
    line = error_of(command, "generate", trained, "--prompt", "a", *flags)
    assert what in line and cure in line


def test_evaluation_of_what_is_not_there(command, trained):
    assert "has no test rows; choose another with --split" in error_of(command, "evaluate", trained)
    line = error_of(command, "evaluate", trained, "--split", "valid", "--metrics", "bleu")
    assert "there is no metric 'bleu'" in line
    line = error_of(command, "evaluate", trained, "--split", "vaild")
    assert line == "--split vaild: should be one of train, valid, test; did you mean 'valid'?"


def test_accuracy_of_rows_without_labels_leaves_the_name_free(command, tiny_base, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"instruction": f"say {i}", "output": str(i)} for i in range(8)])
    given = {"evaluate__metrics": ["accuracy"], "data__valid_size": 2, "evaluate__samples": 0}
    line = error_of(command, "train", *words(tiny_base, data, tmp_path, **given))
    assert "accuracy: needs rows with at least two labels" in line and "measure exact_match" in line
    assert command("train", *words(tiny_base, data, tmp_path, **given | {"evaluate__metrics": ["exact_match"]}))[0] == 0


# The machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_exit_3_and_keeps_the_last_checkpoint(
    command, tiny_base, tiny_reviews, tmp_path, monkeypatch, number
):
    """The disk fills at the second checkpoint: path, bytes, cure; the first one resumes when there is room again."""
    from tunesmith import files

    write, full = files._write_all, []

    def limited(descriptor, data):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        if "checkpoint-000004" in target:
            full.append(target)
            raise OSError(number, os.strerror(number))
        write(descriptor, data)

    rows = tiny_reviews / "train.jsonl"
    given = words(tiny_base, rows, tmp_path, train__epochs=2, train__save_steps=2, evaluate__samples=0)
    with monkeypatch.context() as during:
        during.setattr(files, "_write_all", limited)
        code, _, err = command("train", *given)
    line = err.splitlines()[-1]
    assert code == 3 and full
    assert "checkpoint-000004" in line and "could not be written" in line and "bytes needed" in line
    assert ("free some space" if number == errno.ENOSPC else "input/output error") in line
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert command("train", "--resume", run)[0] == 0
    assert json.loads((run / "verify.json").read_text())["ok"]


def test_out_of_memory_while_training_is_exit_3(command, tiny_base, tiny_reviews, tmp_path, monkeypatch):
    from tunesmith.train import loop

    def exhausted(*_: object):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(loop, "pack_loss", exhausted)
    line = error_of(command, "train", *words(tiny_base, tiny_reviews, tmp_path, evaluate__samples=0), code=3)
    assert line.startswith("out of memory: ") and "try a smaller train.pack_tokens" in line


def test_the_reviews_of_these_tests_are_good(command, tiny_base, tmp_path):
    """What the faults above are planted in trains."""
    data = write_rows(tmp_path / "d.jsonl", reviews(8))
    assert command("train", *words(tiny_base, data, tmp_path, evaluate__samples=0))[0] == 0
