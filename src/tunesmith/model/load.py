"""Load a model from a Hugging Face folder or a GGUF file: exact names, shapes and completeness, or an error.

    open_weights(path) -> check against ModelConfig.weight_shapes() -> read tensor by tensor -> Llama

A missing base weight is never replaced by a random tensor, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from tunesmith.errors import ModelError
from tunesmith.files import MARKER, damage
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_weights import GgufWeights
from tunesmith.model.hf_weights import FolderWeights, refuse_pickle
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.random_weights import RANDOM, RandomWeights
from tunesmith.quant.storage import Spec, Storage, quantize_weight

# Tensors that old files carry and that follow from the config.
_HARMLESS = re.compile(
    r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd\.weight"
)
# What a config says about tokens and limits does not change the model's function.
_BLOCK_LINEAR = re.compile(r"model\.layers\.\d+\.\w+\.\w+_proj\.weight")
_NOT_IDENTITY = ("bos_token_id", "eos_token_ids", "pad_token_id", "max_position_embeddings", "tie_word_embeddings")
_MOST_LISTED = 10


class Weights(Protocol):
    """A model's files: `shapes` by Hugging Face name, each tensor read on demand. Close it after use."""

    kind: str
    keeps: str  # the kinds of storage that `held` knows, in words
    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def quantized(self) -> frozenset[str]:
        """The weights that the file stores in few bits, in a way that a storage can keep."""

    def held(self, name: str) -> tuple[torch.Tensor, Storage]:
        """Return the packed numbers of a quantized weight, and their storage."""

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one tensor in `dtype`."""

    def sample(self, name: str) -> tuple[str, bytes]:
        """Return (stored type, a few of its bytes)."""

    def close(self) -> None:
        """Let go of the files."""


def open_weights(path: Path) -> Weights:
    """Open a Hugging Face folder or a .gguf file and check its index; ModelError says what else it is."""
    path = Path(path)
    if (path / RANDOM).is_file() and not any(path.glob("*.safetensors")):
        return RandomWeights(path)
    if path.is_dir():
        return FolderWeights(path)
    if not path.exists():
        raise ModelError(f"{path}: no such model folder or file")
    refuse_pickle(path.parent, [path.name])
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: give the folder it lies in, with its config.json")
    return GgufWeights(path)


def load_config(path: Path) -> ModelConfig:
    """Return the configuration of a model without reading its weights."""
    weights = open_weights(path)
    weights.close()
    return weights.config


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: Spec | None = None,
) -> Llama:
    """Return the model in `dtype` on `device`, frozen and in eval mode.

    `path` is a Hugging Face folder (model.safetensors, or sharded with its index) or a .gguf file, whose weights are
    dequantized. With `quant` the linears of the blocks are quantized tensor by tensor on the way in, from float32
    whatever `dtype` is. ModelError lists tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    weights = open_weights(path)
    try:
        _check_names(weights)
        _check_hashes(weights)
        tensors, held = _read_all(weights, dtype, torch.device(device), quant)
    finally:
        weights.close()
    with torch.device("meta"):
        model = Llama(weights.config)
    for name, (packed, storage) in held.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(linear, Linear):
            linear.hold(packed, storage, torch.promote_types(dtype, torch.float32))
            tensors[name] = packed
            tensors |= {name.replace(".weight", f".quant.{key}"): t for key, t in storage.state_dict().items()}
    if weights.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def is_block_linear(name: str) -> bool:
    """Is a tensor of this name the weight of a linear of a decoder block?"""
    return _BLOCK_LINEAR.fullmatch(name) is not None


def model_identity(path: Path, quant: Spec | None = None) -> dict[str, Any]:
    """Return {"kind", "sha256", "config"}: which model this is, wherever it lies; and {"quant"} if it is quantized.

    The hash covers the arithmetic of the config and each tensor's name, shape, stored type and 192 of its bytes (first,
    middle, last): sure enough to tell two models apart, and read in milliseconds.
    """
    weights = open_weights(path)
    try:
        arithmetic = {key: value for key, value in asdict(weights.config).items() if key not in _NOT_IDENTITY}
        digest = hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode())
        for name in sorted(weights.shapes):
            if not _HARMLESS.fullmatch(name):
                stored, sample = weights.sample(name)
                digest.update(json.dumps([name, weights.shapes[name], stored]).encode() + sample)
    finally:
        weights.close()
    found = {"kind": weights.kind, "sha256": digest.hexdigest(), "config": weights.config.to_hf()}
    return found if quant is None else {**found, "quant": asdict(quant)}


def _check_names(weights: Weights) -> None:
    expected = weights.config.weight_shapes()
    optional = {"lm_head.weight"} if weights.config.tie_word_embeddings else set()
    bad = [f"{name} is missing" for name in expected if name not in weights.shapes]
    for name, shape in expected.items():
        if weights.shapes.get(name, shape) != shape:
            bad.append(f"{name} has shape {list(weights.shapes[name])}, the config says {list(shape)}")
    for name in weights.shapes:
        if name not in expected and name not in optional and not _HARMLESS.fullmatch(name):
            bad.append(f"{name[:80]} is not part of a {weights.config.model_type} model")
    _refuse(weights, bad, "do weights and config belong together, and is the download complete?")


def _refuse(weights: Weights, bad: list[str], cure: str) -> None:
    if bad:
        more = f"; and {len(bad) - _MOST_LISTED} more" if len(bad) > _MOST_LISTED else ""
        raise ModelError(f"{weights.path}: {len(bad)} bad tensors: {'; '.join(bad[:_MOST_LISTED])}{more}; {cure}")


Held = tuple[torch.Tensor, Storage]


def _read_all(
    weights: Weights, dtype: torch.dtype, device: torch.device, quant: Spec | None
) -> tuple[dict[str, torch.Tensor], dict[str, Held]]:
    """Read every tensor, the largest first so that the threads end together; then look for what is not finite.

    Returns the dense tensors, and apart those that are held in a storage.
    """
    keep = kept_in_bits(weights, quant)

    def read(name: str) -> tuple[torch.Tensor | Held, bool]:
        if name in keep:
            packed, storage = weights.held(name)
            return (packed.to(device), storage.to(device)), True
        if quant is None or not is_block_linear(name):
            tensor = weights.read(name, dtype)
            return tensor.to(device), _finite(tensor)
        tensor = weights.read(name, torch.float32)
        if not (finite := _finite(tensor)):
            return tensor, finite
        packed, storage = quantize_weight(tensor.to(device), quant, f"{weights.path}: {name}")
        return (packed, storage), finite

    names = list(weights.config.weight_shapes())
    order = sorted(names, key=lambda name: -math.prod(weights.shapes[name]))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(order, pool.map(read, order), strict=True))
    bad = [f"{name} holds NaN or infinity" for name in names if not found[name][1]]
    half = dtype == torch.float16
    _refuse(weights, bad, "float16 ends at 65504: try bfloat16 or float32" if half else "the file is damaged")
    tensors = {name: value for name in names if isinstance(value := found[name][0], torch.Tensor)}
    held = {name: value for name in names if not isinstance(value := found[name][0], torch.Tensor)}
    if weights.config.tie_word_embeddings and "lm_head.weight" in weights.shapes:
        _check_tied(weights, tensors["model.embed_tokens.weight"], dtype)
    return tensors, held


def _check_hashes(weights: Weights) -> None:
    """A wrong bit of packed numbers is a valid number: a quantized folder is held against the hashes beside it."""
    if weights.kind == "safetensors" and weights.quantized and (weights.path / MARKER).is_file():
        wrong = damage(weights.path)
        if wrong is not None:
            raise ModelError(f"{wrong}; copy the folder again, or run tunesmith quantize again")


def kept_in_bits(weights: Weights, quant: Spec | None) -> frozenset[str]:
    """The weights that stay in the file's own few bits: a quantized folder's always, a GGUF's where that is asked for.

    Raises ModelError where something else is asked for than the file has.
    """
    blocks = frozenset(name for name in weights.quantized if is_block_linear(name))
    if quant is None:
        return blocks if weights.kind == "safetensors" else frozenset()
    if quant.kind != "keep":
        if weights.quantized and weights.kind == "safetensors":
            raise ModelError(f"{weights.path}: is quantized already; leave quant.kind out, or use the original")
        return frozenset()
    dense = [name for name in weights.shapes if is_block_linear(name) and name not in blocks]
    if dense:
        stored = weights.sample(dense[0])[0]
        raise ModelError(
            f"{weights.path}: quant.kind: keep knows {weights.keeps}; {dense[0]} is stored as {stored} ({len(dense)} "
            "such weights): choose quant.kind=nf4, or none"
        )
    return blocks


def _check_tied(weights: Weights, embedding: torch.Tensor, dtype: torch.dtype) -> None:
    if not torch.equal(weights.read("lm_head.weight", dtype).to(embedding.device), embedding):
        raise ModelError(
            f"{weights.path}: config.json ties lm_head to the embedding, but the file's lm_head.weight differs; "
            'set "tie_word_embeddings": false'
        )


def _finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are NaN where any is; 7 times as fast as isfinite().all()
    return bool(torch.isfinite(low) & torch.isfinite(high))
