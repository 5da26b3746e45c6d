"""A model as a GGUF file, for llama.cpp and what is built on it: weights, sizes, tokenizer and chat template inside.

The names and units are llama.cpp's. Its llama architecture rotates neighbouring pairs where Hugging Face rotates
halves, so the rows of q and k are written in that order; Llama 3's rotary scaling is written as its factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ConfigError, DiskError, ModelError, did_you_mean
from tunesmith.files import atomic_file
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_weights import gguf_name
from tunesmith.model.rope_scaling import llama3_factors

Array = np.ndarray[Any, Any]

# --type -> (llama.cpp's number of the file type, the type of embedding and head, whose errors cost most)
TYPES: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q5_1": (9, "Q8_0"),
    "Q5_0": (8, "Q8_0"),
    "Q4_1": (3, "Q8_0"),
    "Q4_0": (2, "Q8_0"),
}
EXACT = ("F32", "F16", "BF16")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_BLOCK = 32  # weights of a row that share a scale, in every quantized type above
_WHOLE = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class GgufModel:
    """What goes into the file: sizes, weights by Hugging Face's names in float32, the tokenizer's fields."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    vocabulary: Mapping[str, Any]
    name: str = "model"


def check_type(kind: str | None, default: str = "F16") -> str:
    """The type of this name, in capitals. Raises ConfigError."""
    chosen = (kind or default).upper()
    if chosen not in TYPES:
        raise ConfigError(
            f"--type: {kind!r} is not known{did_you_mean(chosen, TYPES)}; there are {', '.join(TYPES)} (K-quants: let "
            "llama.cpp's llama-quantize make them from F16 or F32)"
        )
    return chosen


def write_gguf(path: Path, model: GgufModel, kind: str) -> list[str]:
    """Write the file, one tensor at a time; returns the names of the tensors that stay in F16 for their odd rows.

    Raises ModelError for what llama.cpp cannot compute or the type cannot hold, DiskError.
    """
    metadata = metadata_of(model.config)
    plan = {name: stored_as(name, tuple(tensor.shape), kind) for name, tensor in _renamed(model)}
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[model.config.model_type])
        try:
            writer.add_string("general.name", model.name)
            writer.add_file_type(TYPES[kind][0])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in {**metadata, **model.vocabulary}.items():
                add_value(writer, key, value)
            for name, tensor in _renamed(model):
                _announce(writer, name, tuple(tensor.shape), plan[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in _renamed(model):
                writer.write_tensor_data(quantized(name, tensor, plan[name]))
        except OSError as error:
            needed = sum(_bytes(tuple(tensor.shape), plan[name]) for name, tensor in _renamed(model))
            raise DiskError(f"{path}: could not be written ({needed:,} bytes needed): {error.strerror}") from error
        finally:
            writer.close()
    return [name for name, stored in plan.items() if stored == "F16" and kind not in EXACT]


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp's keys for these sizes. Raises ModelError for a model that it would compute otherwise."""
    arch = ARCHITECTURES[config.model_type]
    _check_computes(config, arch)
    window = config.sliding_window
    # llama.cpp sees everything where Mistral sees a window: up to its length that is the same
    context = config.max_position_embeddings if window is None else min(window, config.max_position_embeddings)
    values: dict[str, Any] = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if window is not None:
        values["attention.sliding_window"] = window
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    return {f"{arch}.{key}": value for key, value in values.items()}


def _check_computes(config: ModelConfig, arch: str) -> None:
    if arch != "llama" and config.sliding_window is not None:
        raise ModelError(f"llama.cpp's {arch} has no sliding window, and would compute something else; not exported")
    if arch != "llama" and config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        raise ModelError(f"llama.cpp's {arch} does not read Llama 3's rotary scaling; not exported")
    if arch != "llama" and (config.o_bias or config.mlp_bias):
        raise ModelError(f"llama.cpp's {arch} has no biases on o_proj and the MLP; not exported")


def _renamed(model: GgufModel) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, weight in its order of rows) of every tensor."""
    config = model.config
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        yield "rope_freqs.weight", torch.tensor(llama3_factors(scaling, config.rope_theta, config.head_dim))
    for name, tensor in model.tensors.items():
        yield gguf_name(name), in_pairs(name, tensor, config)


def in_pairs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """q's and k's rows as llama.cpp's llama architecture has them: rotary halves become neighbouring pairs."""
    if ARCHITECTURES[config.model_type] != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return tensor
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def stored_as(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type that a tensor gets: vectors F32, embedding and head their own, rows without whole blocks F16."""
    if len(shape) == 1:
        return "F32"
    wanted = TYPES[kind][1] if name in _WHOLE else kind
    return wanted if wanted in EXACT or shape[-1] % _BLOCK == 0 else "F16"


def quantized(name: str, tensor: Tensor, stored: str) -> Array:
    """The tensor's bytes or numbers in the file. Raises ModelError for what the type cannot hold."""
    values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    with np.errstate(over="ignore"):
        made: Array = gguf.quantize(values, gguf.GGMLQuantizationType[stored])
    if made.dtype != np.uint8 and not np.isfinite(made).all():
        raise ModelError(f"{name} does not fit into {stored}, which ends at 65504: use --type F32 or BF16")
    return made


def rounded(name: str, tensor: Tensor, kind: str) -> Tensor:
    """What a file of this type holds of a weight, by its Hugging Face name, in float64."""
    stored = stored_as(gguf_name(name), tuple(tensor.shape), kind)
    made = gguf.dequantize(quantized(name, tensor, stored), gguf.GGMLQuantizationType[stored])
    return torch.from_numpy(made.copy()).double().reshape(tensor.shape)


def read_back(path: Path, model: GgufModel, kind: str) -> str:
    """Open the file with the gguf library and hold every weight against what was meant. Raises ModelError."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    meant = dict(_renamed(model))
    if found.keys() != meant.keys():
        raise ModelError(f"{path}: the gguf library finds other tensors: {sorted(found.keys() ^ meant.keys())[:3]}")
    for name, tensor in meant.items():
        stored = gguf.GGMLQuantizationType[stored_as(name, tuple(tensor.shape), kind)]
        values = gguf.dequantize(found[name].data, found[name].tensor_type).reshape(tensor.shape)
        wanted = gguf.dequantize(quantized(name, tensor, stored.name), stored).reshape(tensor.shape)
        if not np.array_equal(values, wanted):
            raise ModelError(f"{path}: the gguf library reads other numbers for {name} than were written")
    return f"gguf {_version()}: {len(found)} tensors, each as written"


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a key: a whole number from 0 on is unsigned, as llama.cpp reads sizes and ids; lists of them signed."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _announce(writer: Any, name: str, shape: tuple[int, ...], stored: str) -> None:
    kind = gguf.GGMLQuantizationType[stored]
    if stored in ("F32", "F16"):
        dtype = np.dtype(np.float32 if stored == "F32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, _bytes(shape, stored), raw_dtype=kind)
        return
    packed = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, packed, np.dtype(np.uint8), _bytes(shape, stored), raw_dtype=kind)


def _bytes(shape: tuple[int, ...], stored: str) -> int:
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
    return int(np.prod(shape)) // block * width


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
