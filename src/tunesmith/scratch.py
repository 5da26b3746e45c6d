"""Training from scratch: a base of random weights from a configuration, written into the run's folder as RUN/base.

model: {path: smollm2-135m, init: random, tokenizer: smollm2-135m-instruct}    a shape's name, a config.json, a model
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunesmith.adapters import Adapter
from tunesmith.config import ModelSection
from tunesmith.data.catalog import CATALOG, resolve_model
from tunesmith.errors import ConfigError
from tunesmith.files import atomic_folder
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import read_json
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_config
from tunesmith.model.random_weights import RANDOM, write_random
from tunesmith.model.shapes import shape, shapes
from tunesmith.tokenizer import Tokenizer, check_fits, load_tokenizer

BASE = "base"


def is_random(section: ModelSection) -> bool:
    """Is the base to be drawn at random?"""
    return section.init == "random"


def describe(section: ModelSection) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a base to be drawn.

    Its special tokens are the tokenizer's. Raises ConfigError, CatalogError, ModelError, TokenizerError.
    """
    tokenizer = load_tokenizer(_tokenizer_path(section))
    config = replace(_config(section), bos_token_id=tokenizer.bos_id, eos_token_ids=tuple(tokenizer.eos_ids))
    check_fits(tokenizer, config)
    return config, tokenizer


def write_base(section: ModelSection, seed: int, run: Path, keep: bool = False) -> ModelSection:
    """Write RUN/base and return the section that loads it; `keep` the one that is there, when a run is resumed."""
    folder = run / BASE
    if not (keep and (folder / RANDOM).is_file()):
        config, tokenizer = describe(section)
        with atomic_folder(folder) as staging:
            write_random(staging, config, seed)
            tokenizer.save(staging)
    return replace(section, path=str(folder), init="weights", tokenizer=None, revision=None)


def base_in(run: Path) -> Path | None:
    """RUN/base, where the run began from random weights."""
    folder = run / BASE
    return folder if (folder / RANDOM).is_file() else None


def check_trains_all(section: ModelSection, model: Llama, adapter: Adapter) -> None:
    """Raise ConfigError where random weights would stay as they are."""
    own = {id(parameter) for parameter in adapter.base.values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if is_random(section) and not all(id(parameters[name]) in own for name in model.config.weight_shapes()):
        raise ConfigError(
            f"model.init: random weights are noise, and {adapter.kind} would leave most of them as they are; set "
            "adapter.kind=full"
        )


def _config(section: ModelSection) -> ModelConfig:
    """From a shape's name, a configuration file, a folder (whose weights are not looked at), or a model."""
    if section.path in shapes() and not Path(section.path).exists():
        return shape(section.path)
    path = Path(section.path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return ModelConfig.from_hf(read_json(file), str(file))
    if not path.exists() and "/" not in section.path and section.path not in CATALOG:
        return shape(section.path)  # raises, with the names that there are
    return load_config(resolve_model(section.path, revision=section.revision))


def _tokenizer_path(section: ModelSection) -> Path:
    if section.tokenizer is not None:
        return resolve_model(section.tokenizer)
    path = Path(section.path).expanduser()
    if section.path in shapes() or path.suffix == ".json":
        raise ConfigError(
            f"model.tokenizer: {section.path} is a configuration and has none; name the model or folder whose "
            "tokenizer is to be used"
        )
    return path if path.is_dir() else resolve_model(section.path, revision=section.revision)
