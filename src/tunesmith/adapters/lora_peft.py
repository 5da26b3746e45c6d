"""The LoRA family in PEFT's files: peft_type LORA, DoRA with `use_dora`.

    PATH.lora_A.weight (rank, in)     PATH.lora_B.weight (out, rank)     PATH.lora_magnitude_vector (out,)
    model.embed_tokens.lora_embedding_A (rank, vocabulary), .lora_embedding_B (hidden, rank)
    PATH.weight of the norms, embedding and head that are trained whole: modules_to_save

A base whose head is tied to its embedding trains both as one. PEFT does so with `ensure_weight_tying`, and then writes
the weight under both names, which older versions load as two equal copies: the same logits everywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, weight_path
from tunesmith.adapters.norms import select_norms
from tunesmith.adapters.peft_targets import known_names
from tunesmith.adapters.targets import EMBEDDING, by_pattern, select_targets
from tunesmith.errors import AdapterError
from tunesmith.model.linear import Linear
from tunesmith.model.llama import MLP, Attention, Block, Decoder, Llama, RMSNorm

if TYPE_CHECKING:
    from tunesmith.adapters.lora import LoRASettings

logger = logging.getLogger(__name__)

# A delta's own tensors: what PEFT calls them, on a linear and on the embedding.
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_NAMES = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
# Keys of adapter_config.json: those that are read, those that only say how it was trained, and, of others, the values
# that change nothing beside null, false and empty.
_READ = frozenset(
    "r lora_alpha lora_dropout target_modules layers_to_transform rank_pattern alpha_pattern use_rslora "
    "modules_to_save ensure_weight_tying".split()
)
_HARMLESS = frozenset("qalora_group_size eva_config loftq_config lora_ga_config corda_config".split())
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layers_pattern": ("layers", ["layers"]),
    # The other starts (pissa, olora, loftq, corda, ...) make PEFT change the base weights when it loads the file.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_MODULES = (Linear, RMSNorm, nn.Embedding, MLP, Attention, Block, Decoder)  # what modules_to_save can name here


def named(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A delta's tensors (see NAMES) by PEFT's keys, without the prefix."""
    names = EMBEDDING_NAMES if path == EMBEDDING else NAMES
    return {f"{path}.{names[key]}": tensor for key, tensor in tensors.items()}


def whole_weights(adapter: Adapter) -> dict[str, Tensor]:
    """The base weights that the adapter trains, by PEFT's keys; a tied one under both of its names."""
    tensors: dict[str, Tensor] = dict(adapter.base)
    if _tied(adapter):
        tensors["lm_head.weight"] = tensors[f"{EMBEDDING}.weight"]
    return tensors


def peft_config(adapter: Adapter, ranks: int = 1) -> dict[str, Any]:
    """The keys of adapter_config.json; `ranks`: the exported rank over the trained one, at the same scale."""
    settings: LoRASettings = adapter.settings
    alphas = math.sqrt(ranks) if settings.rslora else ranks
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    targets, layers = peft_targets(settings, [weight_path(place) for place in adapter.deltas])
    whole = {name.removesuffix(".weight").rpartition(".")[2] for name in whole_weights(adapter)}
    return {
        "r": ranks * settings.rank,
        "lora_alpha": _number(alphas * alpha),
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {key: ranks * rank for key, rank in settings.rank_pattern.items()},
        "alpha_pattern": {key: _number(alphas * value) for key, value in settings.alpha_pattern.items()},
        "use_rslora": settings.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": sorted(whole) or None,
        "init_lora_weights": True,  # PiSSA's start is in the tensors: PEFT must not take it from the base again
        **({"ensure_weight_tying": True} if _tied(adapter) else {}),
    }


def _tied(adapter: Adapter) -> bool:
    return adapter.tied and f"{EMBEDDING}.weight" in adapter.base


def peft_targets(settings: Any, paths: list[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that select exactly `paths` in PEFT as well.

    A regular expression is spelled out: PEFT would try it on modules that are no Linear, and not take layers beside it.
    """
    if not isinstance(settings.target_modules, str):
        layers = settings.layers_to_transform
        return list(settings.target_modules), None if layers is None else list(layers)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    if settings.target_modules == "all-linear":
        return names, None if settings.layers_to_transform is None else list(settings.layers_to_transform)
    return sorted(paths), None


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str, *, dora: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `Exchangeable`."""
    peft.check_keys(config, _READ | {"use_dora"} if dora else _READ, _HARMLESS, where, **_NEUTRAL)
    targets, layers = read_targets(config, model, where)
    ranks, alphas = (peft.patterns(config, key, where) for key in ("rank_pattern", "alpha_pattern"))
    rank = peft.whole(config, "r", where)
    settings = {
        "rank": rank,
        "alpha": peft.number(config, "lora_alpha", where, 8, least=1e-30),
        "dropout": peft.number(config, "lora_dropout", where, 0),
        "target_modules": targets,
        "layers_to_transform": layers,
        "rank_pattern": {key: peft.whole(ranks, key, f"{where}: rank_pattern") for key in ranks},
        "alpha_pattern": {key: peft.number(alphas, key, f"{where}: alpha_pattern", 0) for key in alphas},
        "rslora": peft.flag(config, "use_rslora", where),
    }
    found = peft.plain_keys(tensors, where)
    modules = dict(select_targets(model, targets, layers, where))
    if dora and EMBEDDING in modules:
        raise AdapterError(f"{where}: use_dora on embed_tokens is not supported; merge it with the tool that made it")
    drop_copies(found, model)
    flags, whole = _whole(config, found, modules, model, where)
    expected, keys = dict(whole), {name: name for name in whole}
    for path, module in modules.items():
        shapes = _shapes(module, by_pattern(ranks, path, rank), dora)
        place = "model.embed" if path == EMBEDDING else f"{path}.edit"
        for letter, shape in shapes.items():
            name = f"{path}.{(EMBEDDING_NAMES if path == EMBEDDING else NAMES)[letter]}"
            expected[name], keys[f"{place}.{letter}"] = shape, name
    peft.check_tensors(expected, found, where)
    state = {key: found[name][1] for key, name in keys.items()}
    if flags["train_norms"]:  # a file may hold some of the norms only: the others are the base's
        norms = (f"{path}.weight" for path in select_norms(model))
        state |= {name: model.get_parameter(name).detach() for name in norms if name not in state}
    return settings | flags, state


def read_targets(config: Mapping[str, Any], model: Llama, where: str) -> tuple[list[str] | str, list[int] | None]:
    """target_modules and layers_to_transform of a file. Raises AdapterError."""
    targets = peft.names(config, "target_modules", where)
    if isinstance(targets, list):
        linears = [path for path, module in model.named_modules() if isinstance(module, Linear)]
        targets = known_names(targets, [EMBEDDING, *linears], where)
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or None
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise AdapterError(f"{where}: layers_to_transform={str(layers)[:60]!r} should list layer numbers")
    return targets, layers


def drop_copies(found: dict[str, tuple[str, Tensor]], model: Llama) -> None:
    """Forget the copies that PEFT adds of an embedding or head that it adapts, where they are the base's own."""
    for path in (EMBEDDING, "lm_head"):
        name, weight = f"{path}.base_layer.weight", model.get_parameter(f"{path}.weight")
        if name in found and torch.equal(found[name][1].to(weight), weight):
            del found[name]


def _shapes(module: nn.Module, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a delta on `module`."""
    if isinstance(module, Linear):
        shapes: dict[str, tuple[int, ...]] = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        return shapes | ({"magnitude": (module.out_features,)} if dora else {})
    vocabulary, hidden = module.get_parameter("weight").shape
    return {"A": (rank, vocabulary), "B": (hidden, rank)}


def _whole(
    config: Mapping[str, Any],
    found: dict[str, tuple[str, Tensor]],
    adapted: Mapping[str, nn.Module],
    model: Llama,
    where: str,
) -> tuple[dict[str, bool], dict[str, tuple[int, ...]]]:
    """What is trained whole: settings, and the shape of each weight by name; a tied head leaves `found`."""
    paths = _saved_modules(config, model, where)
    tying = peft.flag(config, "ensure_weight_tying", where)
    if model.config.tie_word_embeddings and tying and adapted.keys() & {EMBEDDING, "lm_head"}:
        raise AdapterError(f"{where}: ensure_weight_tying with an adapted embedding or head is not supported")
    if model.config.tie_word_embeddings and paths & {EMBEDDING, "lm_head"}:
        embedding, head = (found.get(f"{path}.weight") for path in (EMBEDDING, "lm_head"))
        together = tying or {EMBEDDING, "lm_head"} <= paths
        if not together or (embedding and head and not torch.equal(embedding[1], head[1])):
            raise AdapterError(
                f"{where}: modules_to_save trains embedding and head apart, which are one weight in this base: use a "
                "base with the head untied, or train with ensure_weight_tying"
            )
        paths = paths - {"lm_head"} | {EMBEDDING}
        found.pop("lm_head.weight", None)
        if head and not embedding:
            found[f"{EMBEDDING}.weight"] = head
    flags = {
        "train_norms": bool(paths - {EMBEDDING, "lm_head"}),
        "train_embeddings": EMBEDDING in paths,
        "train_head": "lm_head" in paths,
    }
    return flags, {f"{path}.weight": tuple(model.get_parameter(f"{path}.weight").shape) for path in paths}


def _saved_modules(config: Mapping[str, Any], model: Llama, where: str) -> set[str]:
    """Paths of the modules that modules_to_save names: as in PEFT, by the end of their path, at a dot or not."""
    if not config.get("modules_to_save"):
        return set()
    names = peft.names(config, "modules_to_save", where)
    names = [names] if isinstance(names, str) else names
    modules = {path: module for path, module in model.named_modules() if path and isinstance(module, _MODULES)}
    paths = {path for path in modules if path.endswith(tuple(names))}
    for path in sorted(paths):
        if not isinstance(modules[path], RMSNorm) and path not in (EMBEDDING, "lm_head"):
            raise AdapterError(
                f"{where}: modules_to_save={str(names)[:60]!r} trains {path} whole; only norms, embed_tokens and "
                "lm_head are supported beside an adapter"
            )
    unknown = [name for name in names if not any(path.endswith(name) for path in modules)]
    if unknown:
        logger.warning("%s: modules_to_save: %s: no such module in this model, passed over", where, unknown)
    return paths


def _number(value: float) -> float:
    """A whole number without its point, as PEFT writes alpha."""
    return int(value) if value == int(value) else value
