"""A model as a Hugging Face folder: what transformers, and whatever reads its layout, loads as it is.

config.json  generation_config.json  tokenizer.json | tokenizer.model  tokenizer_config.json (with the chat template)
model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json above SHARD bytes
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.files import atomic_save_safetensors, atomic_write_json
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import read_json
from tunesmith.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = 5 * 10**9  # bytes of a file, as transformers cuts

# What generation_config.json may say beside the tokens: how the model's authors would sample. Plain numbers and flags.
_SAMPLING: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "max_new_tokens": (int,),
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def narrowest(tensors: Collection[Tensor]) -> torch.dtype:
    """The first of bfloat16, float16 and float32 that holds all of these exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in tensors):
            return dtype
    return torch.float32


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    also: Mapping[str, Any] | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> None:
    """Write a model folder in Hugging Face's layout.

    `also` goes into config.json, `sampling` (see `sampling_of`) into generation_config.json. Weights of more than
    `shard` bytes lie in several files. Raises DiskError.
    """
    name = dtype_name(dtype)
    said = config.to_hf()
    atomic_write_json(folder / "config.json", {**said, "dtype": name, "torch_dtype": name, **(also or {})})
    eos = list(tokenizer.eos_ids) or list(config.eos_token_ids)
    ends = {"bos_token_id": said["bos_token_id"], "eos_token_id": eos or None, "pad_token_id": said["pad_token_id"]}
    told = {**(sampling or {}), **{key: value for key, value in ends.items() if value is not None}}
    atomic_write_json(folder / "generation_config.json", told)
    parts = list(_shards(tensors, shard))
    if len(parts) == 1:
        atomic_save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    else:
        _write_shards(folder, parts, tensors)
    tokenizer.save(folder)


def sampling_of(path: Path) -> dict[str, Any]:
    """The sampling settings that a model folder recommends; empty where it has none, or is a .gguf file."""
    file = Path(path) / "generation_config.json"
    said = read_json(file) if file.is_file() else None
    if not isinstance(said, dict):
        return {}
    return {key: said[key] for key, kinds in _SAMPLING.items() if type(said.get(key)) in kinds and _finite(said[key])}


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names in order, cut before a file would exceed `most` bytes; a tensor is never cut."""
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + _size(tensor) > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += _size(tensor)
    yield names


def _write_shards(folder: Path, parts: list[list[str]], tensors: Mapping[str, Tensor]) -> None:
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        atomic_save_safetensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = {"total_size": sum(map(_size, tensors.values()))}
    atomic_write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
