"""The ways settings come in, and that each lands on the key it stands for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tunesmith.config import Run, load_run
from tunesmith.config.aliases import ALIASES
from tunesmith.errors import ConfigError

BASE = "model: m\ndata: d\n"

# spelling -> (value written, canonical key, value that must arrive), typed from CONVENTIONS and not from the table.
SPELLINGS = [
    ("model_name_or_path", "x", "model.path", "x"),
    ("base_model", "x", "model.path", "x"),
    ("data_path", "rows.jsonl", "data.train", "rows.jsonl"),
    ("output_dir", "out", "output_dir", "out"),
    ("lora_r", 4, "adapter.rank", 4),
    ("lora_rank", 4, "adapter.rank", 4),
    ("lora_alpha", 32, "adapter.alpha", 32),
    ("lora_dropout", 0.1, "adapter.dropout", 0.1),
    ("lora_target_modules", "[q_proj, v_proj]", "adapter.target_modules", ["q_proj", "v_proj"]),
    ("lora_target", "all", "adapter.target_modules", "all-linear"),
    ("lora_target", "q_proj,v_proj", "adapter.target_modules", ["q_proj", "v_proj"]),
    ("lora_target", ".*mlp.*", "adapter.target_modules", ".*mlp.*"),
    ("cutoff_len", 256, "data.cutoff", 256),
    ("max_length", 256, "data.cutoff", 256),
    ("sequence_len", 256, "data.cutoff", 256),
    ("max_seq_length", 256, "data.cutoff", 256),
    ("micro_batch_size", 4, "train.micro_batch", 4),
    ("per_device_train_batch_size", 4, "train.micro_batch", 4),
    ("batch_size", 128, "train.batch_size", 128),
    ("learning_rate", "3e-4", "train.learning_rate", 3e-4),
    ("num_epochs", 3, "train.epochs", 3.0),
    ("num_train_epochs", 2.5, "train.epochs", 2.5),
    ("warmup_steps", 100, "train.warmup_steps", 100),
    ("warmup_ratio", 0.03, "train.warmup_ratio", 0.03),
    ("train_on_inputs", "true", "data.train_on_inputs", True),
    ("val_set_size", 2000, "data.valid_size", 2000),
    ("val_set_size", 0.1, "data.valid_size", 0.1),
    ("gradient_checkpointing", "true", "train.recompute", True),
    ("gradient_checkpointing", "selective", "train.recompute", "selective"),
    ("optim", "paged_adamw_32bit", "train.optimizer", "paged_adamw"),
    ("optim", "adamw_bnb_8bit", "train.optimizer", "adamw_8bit"),
    ("optim", "adamw_torch", "train.optimizer", "adamw"),
    ("resume_from_checkpoint", "runs/a/checkpoint-000010", "train.resume", "runs/a/checkpoint-000010"),
    ("resume_from_checkpoint", "true", "train.resume", "latest"),
    ("resume_from_checkpoint", "false", "train.resume", None),
    ("report_to", "wandb", "log.report_to", ("wandb",)),
    ("report_to", "[wandb, tensorboard]", "log.report_to", ("wandb", "tensorboard")),
    ("report_to", "none", "log.report_to", ()),
    ("seed", 7, "train.seed", 7),
    ("load_in_8bit", "false", "quant.kind", "none"),
    ("load_in_8bit", "true", "quant.kind", "llm-int8"),
    ("load_in_4bit", "true", "quant.kind", "nf4"),
    ("quant", "nf3", "quant.kind", "nf3"),
]


@pytest.fixture
def load(tmp_path: Path):
    """Load YAML text, overrides and flags (dots written as two underscores)."""

    def load_text(text: str, *overrides: str, **flags: object) -> tuple[Run, list[str]]:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run(path, overrides, {key.replace("__", "."): value for key, value in flags.items()})

    return load_text


def at(run: Run, dotted: str) -> object:
    value: object = run
    for name in dotted.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize(("spelling", "written", "key", "arrives"), SPELLINGS)
@pytest.mark.parametrize("way", ["yaml", "override"])
def test_a_well_known_spelling_lands_on_its_key(load, spelling, written, key, arrives, way):
    base = {"model.path": "model: m\n", "data.train": "data: d\n"}
    text = "".join(line for name, line in base.items() if name != key)
    run, notes = load(f"{text}{spelling}: {written}\n") if way == "yaml" else load(text, f"{spelling}={written}")
    assert at(run, key) == arrives
    assert type(at(run, key)) is type(arrives)
    assert notes == []


def test_the_table_above_has_every_alias():
    assert set(ALIASES) <= {spelling for spelling, *_ in SPELLINGS}


def test_nested_dotted_and_flat_say_the_same(load):
    nested, _ = load("model: {path: m}\ndata: {train: d}\ntrain:\n  epochs: 3\n  seed: 5\nadapter:\n  rank: 4\n")
    dotted, _ = load("model.path: m\ndata.train: d\ntrain.epochs: 3\ntrain.seed: 5\nadapter.rank: 4\n")
    flat, _ = load("base_model: m\ndata_path: d\nnum_epochs: 3\nseed: 5\nlora_r: 4\n")
    words, _ = load("", "model=m", "data=d", "num_epochs=3", "train.seed=5", "lora_rank=4", "adapter=lora")
    assert nested == dotted == flat == words


def test_later_layers_replace_earlier_ones(load):
    text = BASE + "learning_rate: 1e-3\nseed: 1\nnum_epochs: 2\n"
    assert load(text)[0].train.learning_rate == 1e-3
    assert load(text, "train.learning_rate=1e-4")[0].train.learning_rate == 1e-4  # another spelling, still the same key
    run, _ = load(text, "learning_rate=1e-4", "seed=2", train__learning_rate=1e-5, train__epochs=None)
    assert (run.train.learning_rate, run.train.seed, run.train.epochs) == (1e-5, 2, 2.0)
    assert load(text, "seed=2", "seed=3")[0].train.seed == 3


def test_an_override_replaces_one_adapter_setting_and_keeps_the_others(load):
    run, _ = load(BASE + "adapter:\n  kind: lora\n  rank: 4\n  alpha: 8\n", "adapter.rank=16")
    assert run.adapter == {"kind": "lora", "rank": 16, "alpha": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("1e-4", 1e-4), ("1.5", 1.5), (".5", 0.5), ("true", True), ("null", None), ("", None),
        ("[q_proj, 2]", ["q_proj", 2]), ("{a: 1}", {"a": 1}), ("'3'", "3"), ("yes", "yes"), ("no", "no"),
        ("2026-01-02", "2026-01-02"), ("a: b #c", "a: b #c"), ("1_000", "1_000"), ("12:30:00", "12:30:00"),
    ],
)  # fmt: skip
def test_override_values_are_typed_as_yaml_1_2(load, text, value):
    got = load(BASE, f"adapter.thing={text}")[0].adapter["thing"]
    assert got == value
    assert type(got) is type(value)


def test_words_in_yaml_stay_words(load):
    run, _ = load("model: m\ndata:\n  train: d\n  labels: [yes, no, on]\n")
    assert run.data.labels == ("yes", "no", "on")


@pytest.mark.parametrize(
    ("text", "batch", "micro"),
    [
        ("micro_batch_size: 4\ngradient_accumulation_steps: 8\n", 32, 4),
        ("batch_size: 32\ngradient_accumulation_steps: 8\n", 32, 4),
        ("batch_size: 32\nmicro_batch_size: 4\ngradient_accumulation_steps: 8\n", 32, 4),
        ("batch_size: 32\nmicro_batch_size: 4\n", 32, 4),
        ("", 16, None),
    ],
)
def test_accumulation_completes_the_batch(load, text, batch, micro):
    train = load(BASE + text)[0].train
    assert (train.batch_size, train.micro_batch) == (batch, micro)


def test_group_by_length_is_answered_by_a_line(load):
    _, notes = load(BASE + "group_by_length: true\n")
    assert len(notes) == 1
    assert "nothing is padded" in notes[0]
    assert load(BASE + "group_by_length: false\n")[1] == []


@pytest.mark.parametrize(
    ("metrics", "best"),
    [("[]", "eval_loss"), ("[eval_loss, perplexity]", "eval_loss"), ("[eval_loss, accuracy, f1]", "accuracy")],
)
def test_the_best_checkpoint_is_chosen_by_the_first_task_metric(load, metrics, best):
    assert load(BASE + f"evaluate:\n  metrics: {metrics}\n")[0].evaluate.best == best


def test_a_run_is_frozen_and_replaced(load):
    run, _ = load(BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.name = "b"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.train.seed = 1
    assert dataclasses.replace(run, name="b").name == "b"
    assert run.name is None


def test_no_file_is_needed():
    run, _ = load_run(None, [], {"model.path": "m", "data.train": "d"})
    assert run.adapter == {"kind": "lora"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothere.yaml: no such configuration file"):
        load_run(tmp_path / "nothere.yaml")


def test_what_4_bits_means_counts_only_beside_it(load):
    run, notes = load(
        "model: m\ndata: d\nload_in_4bit: true\nbnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: false"
    )
    assert (run.quant.kind, run.quant.double_quant, notes) == ("fp4", False, [])
    run, notes = load("model: m\ndata: d\nload_in_4bit: false\nbnb_4bit_quant_type: fp4")
    assert run.quant.kind == "none" and notes == ["bnb_4bit_quant_type: nothing to do: load_in_4bit is not true"]
