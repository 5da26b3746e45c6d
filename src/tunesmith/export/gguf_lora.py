"""A LoRA as a GGUF file beside a GGUF base, for llama.cpp's --lora and Ollama's ADAPTER.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha;  BASE_TENSOR.lora_a (rank, in), .lora_b (out, rank)

llama.cpp computes W x + (alpha / rank) B A x, with each pair's own rank. Rows of q's and k's B lie in the order of the
base's rows. On the embedding, A is transposed: (vocabulary, rank).
"""

from __future__ import annotations

from pathlib import Path

import gguf
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.adapters.targets import EMBEDDING
from tunesmith.errors import CannotExchange, ConfigError, DiskError
from tunesmith.export.gguf import ARCHITECTURES, EXACT, in_pairs, quantized
from tunesmith.export.plain_lora import common_alpha, pairs_of
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_weights import gguf_name

WHERE = "--to gguf-lora"


def write_lora(path: Path, adapter: Adapter, config: ModelConfig, kind: str, name: str) -> int:
    """Write the file; returns the number of pairs. Raises CannotExchange for what it cannot say, DiskError."""
    if kind not in EXACT:
        raise ConfigError(f"--type: {kind} is not for an adapter, whose numbers are few; use {', '.join(EXACT)}")
    tensors, alpha = lora_tensors(adapter, config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_string("general.name", name)
        for key, tensor in tensors.items():
            writer.add_tensor(key, quantized(key, tensor, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        needed = sum(tensor.numel() * 4 for tensor in tensors.values())
        raise DiskError(f"{path}: could not be written ({needed:,} bytes needed): {error.strerror}") from error
    finally:
        writer.close()
    return len(tensors) // 2


def lora_tensors(adapter: Adapter, config: ModelConfig) -> tuple[dict[str, Tensor], float]:
    """(tensors by llama.cpp's names, alpha). Raises CannotExchange."""
    pairs = pairs_of(adapter, WHERE)
    tied = sorted(pairs.keys() & {EMBEDDING, "lm_head"}) if config.tie_word_embeddings else []
    if tied:
        raise CannotExchange(
            f"{WHERE}: {tied[0]} is tied to another use of the same weight in this base, and llama.cpp would change "
            "both; merge it instead: --to gguf"
        )
    alpha = common_alpha(pairs)
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        base = gguf_name(f"{path}.weight")
        A, B = pair.A, in_pairs(f"{path}.weight", pair.at(alpha), config)
        tensors[f"{base}.lora_a"] = A.T.contiguous() if path == EMBEDDING else A.contiguous()
        tensors[f"{base}.lora_b"] = B.contiguous()
    return tensors, alpha
