"""Every complaint: one line that names the key, where it was written, and the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from tunesmith.config import STRICT, Located, load_run, validate_section
from tunesmith.config.source import MAX_BYTES
from tunesmith.errors import ConfigError

BASE = "model: m\ndata: d\n"  # two lines: what follows stands on line 3
L3 = r"\(config\.yaml line 3\)"

IN_YAML = {
    "unknown key in a section": ("train: {epoch: 1}", rf"train\.epoch: unknown key {L3}; did you mean 'epochs'\?"),
    "its own line": ("train:\n  seed: 1\n  epoch: 1", r"train\.epoch: unknown key \(config\.yaml line 5\)"),
    "alias in a section": ("train: {num_epochs: 1}", rf"train\.num_epochs: unknown key {L3}; did you mean 'epochs'\?"),
    "alias elsewhere": ("train: {lora_r: 1}", rf"train\.lora_r: unknown key {L3}; did you mean 'adapter\.rank'\?"),
    "key without its section": ("epochs: 3", rf"epochs: unknown key {L3}; did you mean 'train\.epochs'\?"),
    "misspelled alias": ("lora_rr: 3", rf"lora_rr: unknown key {L3}; did you mean 'lora_r'\?"),
    "misspelled section": ("trian: {epochs: 1}", rf"trian: unknown key {L3}; did you mean 'train'\?"),
    "misspelled dotted": ("trian.epochs: 3", rf"trian\.epochs: unknown key {L3}; did you mean 'train\.epochs'\?"),
    "nothing like it": ("zzz: 3", rf"^zzz: unknown key {L3}$"),
    "another tool's key": ("bf16: true", rf"bf16: unknown key {L3}; write model\.dtype: bfloat16"),
    "merge key": ("x: &x {seed: 1}", rf"^x: unknown key {L3}"),
    "word for a number": ("learning_rate: fast", rf"train\.learning_rate: should be a valid number, not 'fast' {L3}"),
    "switch for a number": ("seed: true", rf"train\.seed: should be a valid integer, not True {L3}"),
    "number for a word": ("log: {project: 3}", rf"log\.project: should be a valid string, not 3 {L3}"),
    "part of a whole number": ("batch_size: 1.5", rf"train\.batch_size: should be a valid integer, not 1\.5 {L3}"),
    "yes for true": ("train: {shuffle: yes}", rf"train\.shuffle: .* not 'yes'; write true {L3}"),
    "off for false": ("train: {shuffle: off}", rf"train\.shuffle: .* not 'off'; write false {L3}"),
    "learning rate 0": ("learning_rate: 0", rf"train\.learning_rate: should be greater than 0, not 0 {L3}"),
    "infinite": ("learning_rate: .inf", rf"train\.learning_rate: should be a finite number, not inf {L3}"),
    "beta of 1": ("train: {beta2: 1}", rf"train\.beta2: should be less than 1, not 1 {L3}"),
    "no rows a step": ("batch_size: 0", rf"train\.batch_size: should be greater than or equal to 1, not 0 {L3}"),
    "negative epochs": ("num_epochs: -1", rf"train\.epochs: should be greater than 0, not -1 {L3}"),
    "unknown dtype": (
        "model.dtype: bfloat",
        rf"model\.dtype: should be 'auto', .* not 'bfloat'; did you mean 'bfloat16'\? {L3}",
    ),
    "unknown device": ("model.device: gpu", rf"model\.device: .*, not 'gpu' {L3}"),
    "unknown tracker": ("report_to: [wandbb]", rf"log\.report_to\.0: .*; did you mean 'wandb'\? {L3}"),
    "share of 2": ("val_set_size: 2.0", rf"data\.valid_size: a share must be below 1; .* {L3}"),
    "negative share": ("val_set_size: -0.5", rf"data\.valid_size: .* {L3}"),
    "two warm-ups": (
        "warmup_steps: 3\nwarmup_ratio: 0.1",
        r"train: warmup_steps and warmup_ratio both .* keep one \(config\.yaml line 3; config\.yaml line 4\)",
    ),
    "neither true nor selective": (
        "gradient_checkpointing: selectiv",
        rf"train\.recompute: should be true, false or selective, not 'selectiv' {L3}",
    ),
    "unknown optimizer": ("optim: adamw_8bits", rf"train\.optimizer: .*; did you mean 'adamw_8bit'\? {L3}"),
    "paged and offloaded": (
        "optim: paged_adamw_32bit\ntrain.offload: cpu",
        r"train: optimizer pages its states and offload moves them; keep one .*line 3; config\.yaml line 4\)",
    ),
    "two validation sets": (
        "data.valid: v\nval_set_size: 10",
        r"data: valid and valid_size both .* line 3; .* line 4\)",
    ),
    "a seed that holds nothing out": (
        "data.valid_seed: 1",
        r"data: valid_seed says which rows valid_size holds out, and there is none; .* line 3\)",
    ),
    "best not measured": ("evaluate: {best: f1}", rf"evaluate: best is 'f1', which is not measured; .* {L3}"),
    "name that leaves the folder": ("name: ../x", rf"name: should be a folder's name .*, not '\.\./x' {L3}"),
    "name of dots": ("name: ..", rf"name: should be a folder's name .* {L3}"),
    "section that is a number": ("train: 3", rf"train: should hold settings \(epochs, .*\), not 3 {L3}"),
    "adapter that is a list": ("adapter: [lora]", rf"adapter: should hold settings \(kind, .* {L3}"),
    "adapter without a name": ("adapter: {kind: }", r"adapter: 'kind' should be the name of a method"),
    "alias and its key": (
        "lora_r: 3\nadapter: {rank: 4}",
        rf"adapter\.rank: set twice, by 'lora_r' {L3} and by 'adapter\.rank' \(config\.yaml line 4\); keep one",
    ),
    "two aliases": ("cutoff_len: 3\nmax_length: 3", r"data\.cutoff: set twice, by 'cutoff_len' .* by 'max_length' .*"),
    "shorthand and its key": ("model.path: x", r"model\.path: set twice, by 'model' .* and by 'model\.path' .*"),
    "key twice": ("seed: 1\nseed: 1", r"seed: given twice \(config\.yaml line 4, first on line 3\); keep one"),
    "8 bits and 4": (
        "load_in_8bit: true\nload_in_4bit: true",
        r"quant\.kind: set twice, by load_in_4bit \(config\.yaml line 4\) and load_in_8bit .*; keep one",
    ),
    "4 bits and a kind": (
        "load_in_4bit: true\nquant: int8",
        r"quant\.kind: set twice, by load_in_4bit .* and quant .*",
    ),
    "4 bits of a number": ("load_in_4bit: 4", rf"load_in_4bit: should be true or false, not 4 {L3}"),
    "unknown 4-bit type": (
        "load_in_4bit: true\nbnb_4bit_quant_type: nf5",
        r"quant\.kind: should be 'none', 'nf4', .* not 'nf5'; did you mean 'nf[432]'\? \(config\.yaml line 4\)",
    ),
    "4-bit arithmetic": ("bnb_4bit_compute_dtype: bfloat16", r"bnb_4bit_compute_dtype: .*; write model\.dtype, .*"),
    "block of 50": ("quant: {block_size: 50}", r"quant\.block_size: should be a multiple of 8, not 50 .*"),
    "accumulation alone": (
        "gradient_accumulation_steps: 4",
        rf"gradient_accumulation_steps 4 {L3} needs micro_batch_size .*",
    ),
    "accumulation that contradicts": (
        "batch_size: 9\nmicro_batch_size: 2\ngradient_accumulation_steps: 4",
        rf"batch_size 9 {L3} is not micro_batch_size 2 .* \* gradient_accumulation_steps 4 .* = 8; leave one .* out",
    ),
    "accumulation that does not divide": (
        "batch_size: 9\ngradient_accumulation_steps: 4",
        rf"batch_size 9 {L3} cannot be divided into gradient_accumulation_steps 4 \(config\.yaml line 4\)",
    ),
    "accumulation of a word": ("gradient_accumulation_steps: x", rf"gradient_accumulation_steps: .* not 'x' {L3}"),
    "python object": ("x: !!python/object/apply:os.getcwd []", r"config\.yaml line 3: the tag .* is not allowed"),
    "custom tag": ("x: !thing 3", r"config\.yaml line 3: the tag '!thing' is not allowed"),
    "not YAML": ("a: [1", r"config\.yaml line \d: not valid YAML: .*"),
    "two documents": ("---\nseed: 1", r"config\.yaml line \d: not valid YAML: .*"),
    "key that is a list": ("[1]: 2", r"config\.yaml line 3: a key must be a word"),
    "bell": ("seed: \x07", r"config\.yaml: not valid YAML: .*"),
    "too deep": ("x: " + "[" * 5000, r"config\.yaml.*"),
    "deep and closed": ("x: " + "[" * 30 + "]" * 30, r"config\.yaml line 3: too large or too deep .*"),
    "contains itself": ("x: &x [*x]", r"config\.yaml line 3: too large or too deep .*"),
}


def complaint(tmp_path: Path, text: str, *overrides: str, **flags: object) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_run(path, overrides, {key.replace("__", "."): value for key, value in flags.items()})
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message.lower()
    return message


@pytest.mark.parametrize(("text", "pattern"), IN_YAML.values(), ids=list(IN_YAML))
def test_yaml_is_answered_with_key_line_and_cure(tmp_path, text, pattern):
    message = complaint(tmp_path, f"{BASE}{text}\n")
    assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("train.epochs", r"'train\.epochs': an override is written key=value"),
        ("=3", r"'=3': an override is written key=value"),
        ("train.epochs=abc", r"train\.epochs: should be a valid number, not 'abc' \(override train\.epochs=abc\)"),
        ("train.epoch=1", r"train\.epoch: unknown key \(override train\.epoch=1\); did you mean 'epochs'\?"),
        ("data.labels=[a", r"override data\.labels=\[a: not valid YAML"),
        ("train.=1", r"train\.: unknown key"),
        ("load_in_4bit=yes", r"load_in_4bit: should be true or false, not 'yes' \(override load_in_4bit=yes\)"),
    ],
)
def test_an_override_is_answered_with_the_override(tmp_path, override, pattern):
    message = complaint(tmp_path, BASE, override)
    assert re.search(pattern, message), message


def test_two_spellings_in_one_command_are_refused(tmp_path):
    message = complaint(tmp_path, BASE, "lora_r=3", "adapter.rank=4")
    assert re.search(r"set twice, by 'lora_r' \(override lora_r=3\) and by 'adapter\.rank'", message)


def test_a_flag_is_answered_too(tmp_path):
    assert "(command line)" in complaint(tmp_path, BASE, train__learning_rate=-1.0)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("data: d\n", r"model\.path: missing; .*--model.*model_name_or_path"),
        ("model: m\n", r"data\.train: missing; .*--data.*data_path"),
        ("model: m\ndata: {template: plain}\n", r"data\.train: missing"),
        ("model: {path: ''}\ndata: d\n", r"model\.path: .*at least 1 character"),
        ("- a\n- b\n", r"config\.yaml: should be a mapping"),
        ("", r"model\.path: missing"),
        ("# only a comment\n", r"model\.path: missing"),
    ],
)
def test_what_is_missing_is_said(tmp_path, text, pattern):
    message = complaint(tmp_path, text)
    assert re.search(pattern, message), message


def test_all_that_is_wrong_in_a_section_is_said_at_once(tmp_path):
    message = complaint(tmp_path, BASE + "train: {beta1: 2, eps: -1, seed: x}\n")
    assert message.startswith("train.")
    assert all(name in message for name in ("beta1", "eps", "seed"))


def test_a_file_that_is_no_configuration_is_refused_before_it_is_parsed(tmp_path):
    assert "larger than 64 KiB" in complaint(tmp_path, "# " + "x" * MAX_BYTES)
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\x80\x03\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_aliases_cannot_unfold_into_gigabytes(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "too large or too deep" in complaint(tmp_path, "\n".join(lines))


def test_an_anchor_used_twice_is_fine(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(BASE + "adapter:\n  a: &x [q_proj]\n  b: *x\n")
    assert load_run(path)[0].adapter["b"] == ["q_proj"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraLike:
    rank: int = Field(default=8, ge=1)
    rank_pattern: dict[str, int] = Field(default_factory=dict)


class ModelLike(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    kind: str = "lora"
    rank: int = Field(default=8, ge=1)
    rank_pattern: dict[str, int] = Field(default_factory=dict)


@pytest.mark.parametrize("cls", [LoraLike, ModelLike])
def test_a_method_validates_its_own_mapping_and_keeps_the_lines(tmp_path, cls):
    path = tmp_path / "config.yaml"

    def check(adapter: str) -> object:
        path.write_text(f"{BASE}adapter:\n  kind: lora\n{adapter}")
        return validate_section(cls, load_run(path)[0].adapter, "adapter")

    assert check("  rank: 4\n  rank_pattern: {q_proj: 2}\n").rank == 4
    with pytest.raises(ConfigError) as error:
        check("  alpha: 1\n  rnk: 4\n" if cls is None else "  rnk: 4\n")
    assert str(error.value) == "adapter.rnk: unknown key (config.yaml line 5); did you mean 'rank'?"
    with pytest.raises(ConfigError, match=r"adapter\.rank: should be greater .* 1, not 0 \(config\.yaml line 5\)"):
        check("  rank: 0\n")
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern\.v_proj: .* not 'x' \(config\.yaml line 6\)"):
        check("  rank_pattern:\n    v_proj: x\n")


def test_a_plain_mapping_is_validated_without_lines():
    with pytest.raises(ConfigError, match=r"^adapter\.rnk: unknown key; did you mean 'rank'\?$"):
        validate_section(LoraLike, {"kind": "lora", "rnk": 1}, "adapter")
    assert validate_section(LoraLike, Located({"rank": 2}), "adapter") == LoraLike(rank=2)
