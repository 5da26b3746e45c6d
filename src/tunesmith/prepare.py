"""Everything before the first step: model, tokenizer, template, data, adapter, and the choices that were left open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.adapters import Adapter, attach, find_method
from tunesmith.config import ModelSection, Run
from tunesmith.data.catalog import resolve_data, resolve_model
from tunesmith.data.encode import EncodedSet, encode_rows
from tunesmith.data.schemas import Row, labels
from tunesmith.data.segments import Template
from tunesmith.data.sources import Splits, read_rows, read_splits, split_rows
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError
from tunesmith.hardware import recommended_dtype
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model, model_identity
from tunesmith.tokenizer import Tokenizer, check_fits, load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Loaded:
    """A base model ready for use, with what belongs to it; `adapters` are those attached, by name."""

    name: str
    path: Path
    model: Llama
    tokenizer: Tokenizer
    identity: dict[str, Any]
    template: Template | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    templates: dict[str, Template] = field(default_factory=dict)  # of each adapter, as it was trained


@dataclass(frozen=True)
class Data:
    """The rows of a run, and what the model will see of them."""

    train: EncodedSet
    valid: EncodedSet | None
    valid_rows: tuple[Row, ...]
    labels: tuple[str, ...]
    fingerprint: str


def load_base(section: ModelSection) -> Loaded:
    """Resolve, check and load a base model. Raises CatalogError, ModelError, TokenizerError."""
    path = resolve_model(section.path, revision=section.revision)
    device = choose_device(section.device)
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=choose_dtype(section.dtype, device), device=device)
    check_fits(tokenizer, model.config)
    return Loaded(section.path, path, model, tokenizer, model_identity(path))


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device: {name!r} is not there (GPUs found: {torch.cuda.device_count()}); use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware is fast in it, else float32."""
    return getattr(torch, recommended_dtype(device) if name == "auto" else name)  # type: ignore[no-any-return]


def load_data(run: Run, tokenizer: Tokenizer, template: Template) -> Data:
    """Read, split and encode the rows of a run. Raises DataError, TemplateError, CatalogError."""
    section = run.data
    splits = read_splits(
        resolve_data(section.train), schema=section.schema, limit=section.limit, instruction=section.instruction
    )
    train, valid = _validation(run, splits)
    names = section.labels or labels(splits.train)
    settings = {"cutoff": section.cutoff, "train_on_inputs": section.train_on_inputs, "cut": section.cut}
    encoded = encode_rows(train, template, tokenizer, **settings)
    valid = valid[: run.evaluate.rows] if run.evaluate.rows else valid
    held_out = encode_rows(valid, template, tokenizer, **settings, against=encoded) if valid else None
    return Data(encoded, held_out, tuple(valid), tuple(names), _fingerprint(encoded))


def _validation(run: Run, splits: Splits) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, by data.valid, by data.valid_size, or as the folder has them."""
    section = run.data
    if section.valid is not None:
        path = resolve_data(section.valid)
        rows = read_rows(path, schema=section.schema, instruction=section.instruction)
        return splits.train, rows
    if section.valid_size:
        return split_rows(splits.train, section.valid_size, run.train.seed)
    return splits.train, splits.valid if section.valid_size is None else []


def _fingerprint(encoded: EncodedSet) -> str:
    digest = hashlib.sha256()
    for example in encoded.examples:
        digest.update(example.ids.tobytes() + b"|" + example.supervised.tobytes() + b";")
    return digest.hexdigest()


def show_report(data: Data, console: Console) -> None:
    """Print what was found in the data, each problem with its cure."""
    for name, encoded in (("train", data.train), ("valid", data.valid)):
        if encoded is not None:
            for line in encoded.report.lines():
                console.print(f"{name}: {line}", markup=False)
            for problem in encoded.report.problems():
                console.print(f"{name}: warning: {problem}", markup=False, style="yellow")


def resolve(run: Run, loaded: Loaded, pack_tokens: int) -> Run:
    """The run with every automatic choice written down, so that a rerun or a resume makes the same ones."""
    method = find_method(str(run.adapter["kind"]))
    model = replace(run.model, dtype=str(loaded.model.dtype).removeprefix("torch."), device=str(loaded.model.device))
    rate = run.train.learning_rate or method.learning_rate
    train = replace(run.train, pack_tokens=pack_tokens, learning_rate=rate, resume=None)
    return replace(run, model=model, train=train)


def attach_adapter(run: Run, loaded: Loaded, name: str = "default") -> Adapter:
    """Attach the run's method to the loaded model."""
    adapter = attach(loaded.model, run.adapter, name, run.train.seed)
    loaded.adapters[name] = adapter
    return adapter


def run_fingerprint(run: Run, loaded: Loaded, data: Data) -> str:
    """What a checkpoint must share with a run to be resumed by it: data, base and every setting that moves parameters."""
    settings = run.to_dict()
    for section, keys in _FREE.items():
        for key in keys:
            settings[section].pop(key)
    for key in ("name", "output_dir", "log"):
        settings.pop(key)
    text = json.dumps([settings, data.fingerprint, loaded.identity["sha256"]], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


# Settings that may change at a resume: they choose where a run stops and what is kept of it, not how it moves. The
# number of epochs is not among them, since the schedule depends on it.
_FREE: dict[str, Sequence[str]] = {"train": ("save_steps", "keep_checkpoints", "resume"), "evaluate": ("samples",)}


def template_for(run: Run, tokenizer: Tokenizer) -> Template:
    """The run's template. Raises TemplateError where the model has none and none was named."""
    return get_template(run.data.template, tokenizer)
