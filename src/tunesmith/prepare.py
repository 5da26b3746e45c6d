"""Everything before the first step: model, tokenizer, template, data, adapter, and the choices that were left open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.adapters import Adapter, attach, find_method
from tunesmith.config import ModelSection, Run, validate_section
from tunesmith.data.catalog import resolve_data, resolve_model
from tunesmith.data.encode import EncodedSet, encode_rows
from tunesmith.data.report import content
from tunesmith.data.schemas import Row, labels
from tunesmith.data.segments import Template
from tunesmith.data.sources import Splits, read_rows, read_splits, split_rows
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.suite import Asked
from tunesmith.hardware import recommended_dtype
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_config, load_model, model_identity
from tunesmith.model.quantize import spec_of
from tunesmith.model.sparse import Pattern, pattern_of, said
from tunesmith.quant.storage import Spec
from tunesmith.scratch import describe, is_random, write_base
from tunesmith.tokenizer import Tokenizer, check_fits, load_tokenizer
from tunesmith.train.memory import check_weights_fit
from tunesmith.train.optim import choose_optimizer
from tunesmith.vision.open import open_rows

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
    revision: str | None = None
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
    images: int = 0  # training rows with an image
    general: tuple[Asked, ...] = ()  # sets that are not trained for, measured beside the held-out rows


def load_base(section: ModelSection, quant: Spec | None = None) -> Loaded:
    """Resolve, check and load a base model, with its sparse attention, its linears quantized as `quant` says.

    Raises CatalogError, ModelError, TokenizerError, OutOfMemory.
    """
    path = resolve_model(section.path, revision=section.revision)
    device = choose_device(section.device)
    dtype = choose_dtype(section.dtype, device)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_tokenizer, path)
        check_weights_fit(load_config(path), dtype, device, None if quant is None else quant.bits)
        model = load_model(path, dtype=dtype, device=device, quant=quant)
        tokenizer = reading.result()
    model.pattern = pattern_of(section.attention, model.config.num_key_value_heads)
    check_fits(tokenizer, model.config)
    return Loaded(section.path, path, model, tokenizer, model_identity(path, quant), section.revision)


def base_for(run: Run, folder: Path, loaded: Loaded | None = None, resumed: bool = False) -> Loaded:
    """The run's base (`loaded`, if it is there already) with the run's attention; a random one is written to `folder`.

    A `resumed` run has the one that is there.
    """
    if loaded is None:
        section = base_of(run)
        section = write_base(section, run.train.seed, folder, resumed) if is_random(section) else section
        loaded = load_base(section, spec_of(run.quant))
    loaded.model.pattern = pattern_of(run.model.attention, loaded.model.config.num_key_value_heads)
    return loaded


def sizes_and_tokenizer(section: ModelSection) -> tuple[ModelConfig, Tokenizer]:
    """What is known of a base without its weights. Raises CatalogError, ModelError, TokenizerError, ConfigError."""
    if is_random(section):
        return describe(section)
    path = resolve_model(section.path, revision=section.revision)
    return load_config(path), load_tokenizer(path)


def base_of(run: Run) -> ModelSection:
    """The run's model section; `auto` is float32 where the base's own weights are trained (see `check_precision`)."""
    method = find_method(str(run.adapter["kind"]))
    trains_base = getattr(method, "trains_base", False)
    if callable(trains_base):  # it depends on the settings
        trains_base = trains_base(validate_section(method.settings, run.adapter, "adapter"))
    return replace(run.model, dtype="float32") if trains_base and run.model.dtype == "auto" else run.model


def check_precision(adapter: Adapter) -> None:
    """Raise ConfigError where base weights are trained in half precision: rounding would swallow their updates."""
    for name, parameter in adapter.base.items():
        if parameter.dtype.itemsize < 4:
            raise ConfigError(
                f"model.dtype: {adapter.kind} trains the base's own weights ({name}, ...), and "
                f"{str(parameter.dtype).removeprefix('torch.')} rounds their small updates away; set "
                "model.dtype=float32, or train an adapter such as lora"
            )


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device: {name!r} is not there (GPUs found: {torch.cuda.device_count()}); use auto or cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware is fast in it, else float32."""
    return getattr(torch, recommended_dtype(device) if name == "auto" else name)


def load_data(run: Run, tokenizer: Tokenizer, template: Template) -> Data:
    """Read, split and encode the rows of a run. Raises DataError, TemplateError, CatalogError."""
    section = run.data
    splits = read_splits(
        resolve_data(section.train),
        schema=section.schema,
        limit=section.limit,
        instruction=section.instruction,
        captions=section.captions,
    )
    train, valid = _validation(run, splits)
    images = sum(row.image is not None for row in train)
    if looks_at_images(run):
        train, valid = open_rows(train), open_rows(valid)
    names = section.labels or labels(splits.train)
    encode = partial(
        encode_rows,
        template=template,
        tokenizer=tokenizer,
        cutoff=section.cutoff,
        train_on_inputs=section.train_on_inputs,
        cut=section.cut,
    )
    encoded = encode(train)
    valid = valid[: run.evaluate.rows] if run.evaluate.rows else valid
    held_out = encode(valid, against=encoded) if valid else None
    return Data(encoded, held_out, tuple(valid), tuple(names), _fingerprint(encoded), images)


def looks_at_images(run: Run) -> bool:
    """Does the run's method look at the images of rows?"""
    settings: Any = validate_section(find_method(str(run.adapter["kind"])).settings, run.adapter, "adapter")
    return bool(getattr(settings, "looks", ()))


def check_images(run: Run, data: Data, console: Console) -> None:
    """Say what becomes of the rows' images. Raises ConfigError where the method looks, and there is none."""
    rows, kind = len(data.train.examples), run.adapter["kind"]
    if looks_at_images(run):
        if not data.images:
            raise ConfigError(
                f"adapter.kind: {kind} looks at images, and no row of {run.data.train} has one; give rows an 'image', "
                "or choose a method without images"
            )
        console.print(f"train: {data.images:,} of {rows:,} rows have an image", markup=False, soft_wrap=True)
    elif data.images:
        said = f"train: {data.images:,} of {rows:,} rows have an image, and {kind} does not look at it"
        console.print(said, markup=False, style="yellow", soft_wrap=True)


def _validation(run: Run, splits: Splits) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, by data.valid, by data.valid_size, or as the folder has them."""
    section = run.data
    if section.valid is not None:
        path = resolve_data(section.valid)
        asked = section.instruction  # the training rows' own, so that both are asked alike
        if asked is None and splits.train and splits.train[0].kind == "classification":
            asked = splits.train[0].fields["instruction"]
        return splits.train, read_rows(path, schema=section.schema, instruction=asked)
    if section.valid_size:
        seed = run.train.seed if section.valid_seed is None else section.valid_seed
        return split_rows(splits.train, section.valid_size, seed)
    return splits.train, splits.valid if section.valid_size is None else []


def held_out_rows(run: Run) -> list[Row]:
    """The validation rows of a run whose data is a single file; empty for a folder, which has splits of its own.

    Raises DataError where the run held none out: the file is what it was trained on.
    """
    path = resolve_data(run.data.train)
    if path.is_dir() and run.data.valid is None and not run.data.valid_size:
        return []
    splits = read_splits(
        path,
        schema=run.data.schema,
        limit=run.data.limit,
        instruction=run.data.instruction,
        captions=run.data.captions,
    )
    rows = _validation(run, splits)[1]
    if not rows:
        raise DataError(
            f"{path}: is what the run was trained on, and nothing was held out; give other rows with --data"
        )
    return rows


def _fingerprint(encoded: EncodedSet) -> str:
    digest = hashlib.sha256()
    for example in encoded.examples:
        digest.update(content(example) + b"|" + example.supervised.tobytes() + b";")
    return digest.hexdigest()


def show_report(data: Data, console: Console, pattern: Pattern | None = None) -> None:
    """Print what was found in the data, each problem with its cure, for a model with this sparse attention."""
    for name, encoded in (("train", data.train), ("valid", data.valid)):
        if encoded is not None:
            for line in encoded.report.lines():
                console.print(f"{name}: {line}", markup=False, soft_wrap=True)
            for problem in encoded.report.problems():
                console.print(f"{name}: warning: {problem}", markup=False, style="yellow", soft_wrap=True)
    longest = data.train.report.longest
    if pattern is not None and min(pattern.pairs(longest)) == longest * (longest + 1) // 2:
        said_of = f"({said(pattern)}) hides nothing of the longest row, which has {longest} tokens; make it narrower"
        console.print(f"warning: model.attention {said_of}", markup=False, style="yellow", soft_wrap=True)


def resolve(run: Run, loaded: Loaded, kernels: str) -> Run:
    """The run with every automatic choice written down, so that a rerun or a resume makes the same ones."""
    method = find_method(str(run.adapter["kind"]))
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[loaded.model.dtype]
    model = replace(run.model, dtype=dtype, device=str(loaded.model.device), revision=loaded.revision)  # type: ignore[arg-type]
    rate = run.train.learning_rate or method.learning_rate
    train = replace(run.train, learning_rate=rate, kernels=kernels, resume=None)  # type: ignore[arg-type]
    return replace(run, model=model, train=train)


def settle_optimizer(run: Run, device: torch.device) -> tuple[Run, tuple[str, ...]]:
    """The run with the optimizer and the offload that there are on `device`, and a line for each that is another."""
    choice = choose_optimizer(run.train.optimizer, run.train.offload, device)
    train = replace(run.train, optimizer=choice.optimizer, offload=choice.offload)  # type: ignore[arg-type]
    return replace(run, train=train), choice.notes


def attach_adapter(run: Run, loaded: Loaded, name: str = "default") -> Adapter:
    """Attach the run's method to the loaded model."""
    adapter = attach(loaded.model, run.adapter, name, run.train.seed, loaded.tokenizer.encode)
    loaded.adapters[name] = adapter
    return adapter


def run_fingerprint(run: Run, loaded: Loaded, data: Data) -> str:
    """What a checkpoint shares with a run that may resume it: data, base, every setting that moves parameters."""
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
_FREE: dict[str, Sequence[str]] = {
    "train": ("save_steps", "keep_checkpoints", "resume", "offload"),
    "evaluate": ("samples",),
}


def template_for(run: Run, tokenizer: Tokenizer) -> Template:
    """The run's template. Raises TemplateError where the model has none and none was named."""
    return get_template(run.data.template, tokenizer)
