"""A base model small enough to train in a test, data for it, and the words of a command that trains it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.data.conftest import SMOLLM2, write_folder
from tests.laws.small import TINY, build

from tunesmith.model.config import ModelConfig

VOCAB = 768
GOOD = ("a joy from start to end", "warm, funny and kind", "the best film of the year", "I laughed and cried")
BAD = ("dull and far too long", "a mess without a plot", "the worst film of the year", "I left before the end")


def write_base(folder: Path, *, seed: int = 0, chat_template: str | None = SMOLLM2, **changes: Any) -> Path:
    """A random LLaMA in Hugging Face's layout, with a byte-level BPE whose EOS and pad are both <|im_end|>."""
    write_folder(folder, eos="<|im_end|>", chat_template=chat_template)
    fields = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_ids": (2,), **changes}
    config = ModelConfig(**{**vars(TINY), **fields})
    model = build(config, torch.float32, seed)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k in config.weight_shapes()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    return folder


def edit_weights(folder: Path, change: Any) -> None:
    """Rewrite a base's weights after `change` has been given the mapping of names to tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    found = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Reviews of unequal length with a label; no two are alike."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = ("negative", "positive")[i % 2]
        words = " and ".join(draw.choices(GOOD if i % 2 else BAD, k=draw.randint(1, 3)))
        rows.append({"text": f"{words}, {draw.randint(0, 10**6)}", "label": label})
    return rows


def review_folder(folder: Path, second: str = "valid") -> Path:
    """24 reviews for training and 8 others in SECOND.jsonl."""
    write_rows(folder / "train.jsonl", reviews(24))
    write_rows(folder / f"{second}.jsonl", reviews(8, seed=1))
    return folder


def words(base: Path, data: Path, out: Path, name: str = "run", **settings: Any) -> list[str]:
    """Words after `tunesmith train`: small batches in float32 on the CPU, unless `settings` (a__b=c) say otherwise."""
    chosen: dict[str, Any] = {
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.template": "alpaca-short",
        "data.cutoff": 128,
        "adapter.rank": 2,
        "train.batch_size": 8,
        "train.pack_tokens": 256,
        "train.learning_rate": 0.01,
        "evaluate.samples": 1,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    given = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    return ["--model", str(base), "--data", str(data), "--output-dir", str(out), "--name", name, *given]


def run_it(command: Any, base: Path, data: Path, out: Path, *, code: int = 0, **settings: Any) -> str:
    """Train; return what was said on stderr. Samples are off unless asked for."""
    got, _, err = command("train", *words(base, data, out, **{"evaluate__samples": 0, **settings}))
    assert got == code, err
    return err
