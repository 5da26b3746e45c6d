"""Well-known spellings of the ecosystem's settings, and the canonical keys they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Path = tuple[str, ...]

ALIASES: dict[str, Path] = {
    "model_name_or_path": ("model", "path"),
    "base_model": ("model", "path"),
    "data_path": ("data", "train"),
    "lora_r": ("adapter", "rank"),
    "lora_rank": ("adapter", "rank"),
    "lora_alpha": ("adapter", "alpha"),
    "lora_dropout": ("adapter", "dropout"),
    "lora_target_modules": ("adapter", "target_modules"),
    "lora_target": ("adapter", "target_modules"),
    "cutoff_len": ("data", "cutoff"),
    "max_length": ("data", "cutoff"),
    "sequence_len": ("data", "cutoff"),
    "max_seq_length": ("data", "cutoff"),
    "micro_batch_size": ("train", "micro_batch"),
    "per_device_train_batch_size": ("train", "micro_batch"),
    "batch_size": ("train", "batch_size"),
    "learning_rate": ("train", "learning_rate"),
    "num_epochs": ("train", "epochs"),
    "num_train_epochs": ("train", "epochs"),
    "warmup_steps": ("train", "warmup_steps"),
    "warmup_ratio": ("train", "warmup_ratio"),
    "train_on_inputs": ("data", "train_on_inputs"),
    "val_set_size": ("data", "valid_size"),
    "gradient_checkpointing": ("train", "recompute"),
    "optim": ("train", "optimizer"),
    "resume_from_checkpoint": ("train", "resume"),
    "report_to": ("log", "report_to"),
    "seed": ("train", "seed"),
}

# A section written as one word: `model: smollm2-135m-instruct`, `adapter=lora`.
SHORTHANDS: dict[str, Path] = {
    "model": ("model", "path"),
    "data": ("data", "train"),
    "adapter": ("adapter", "kind"),
    "quant": ("quant", "kind"),
}

ACCUMULATION = "gradient_accumulation_steps"
NOTED = "group_by_length"
EIGHT_BITS, FOUR_BITS = "load_in_8bit", "load_in_4bit"
# What 4 bits means, where it is asked for; alone these change nothing.
FOUR_BIT_SETTINGS: dict[str, Path] = {
    "bnb_4bit_quant_type": ("quant", "kind"),
    "bnb_4bit_use_double_quant": ("quant", "double_quant"),
}

# Settings of other tools that have another shape here: not aliases, but an error can say what to write.
HINTS: dict[str, str] = {
    "bf16": "write model.dtype: bfloat16",
    "fp16": "write model.dtype: float16",
    "wandb_project": "write log.project",
    "run_name": "write name",
    "lr_scheduler_type": "write train.schedule",
    "save_total_limit": "write train.keep_checkpoints",
    "eval_steps": "write evaluate.every_steps",
    "prompt_template_name": "write data.template",
    "bnb_4bit_compute_dtype": "write model.dtype, in which products are computed",
    "bnb_4bit_quant_storage": "leave it out: quantized weights are stored as bytes",
}


def _targets(value: Any) -> Any:
    """`q_proj,v_proj` as a list, `all` as all-linear; a regular expression stays as it is."""
    if value == "all":
        return "all-linear"
    if isinstance(value, str) and "," in value and re.fullmatch(r"[\w., -]+", value):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


CONVERTERS: dict[str, Callable[[Any], Any]] = {"lora_target_modules": _targets, "lora_target": _targets}


def is_special(key: str) -> bool:
    """Say whether `key` is accepted without standing for a single canonical key."""
    return key in (ACCUMULATION, NOTED, EIGHT_BITS, FOUR_BITS, *FOUR_BIT_SETTINGS)
