"""Published models by name: their sizes, as in their public config.json, so that one can count without any weights.

shape("llama-7b").num_hidden_layers        # 32
"""

from __future__ import annotations

from typing import Any

from tunesmith.errors import ModelError, did_you_mean
from tunesmith.model.config import ModelConfig
from tunesmith.model.rope_scaling import RopeScaling

# name: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-33b": (6656, 17920, 60, 52, 52, 32000),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000),  # v0.1; v0.3 has 32,768 tokens and no window
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152),
    # Not GPT-3: a LLaMA of its width and depth. Three matrices of 8d/3 hold as much as its two of 4d.
    "gpt3-shaped": (12288, 32768, 96, 96, 96, 50257),
}

_LLAMA_1 = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_ids": (2,)}
_LLAMA_2 = _LLAMA_1 | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_LLAMA_3: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_ids": (128001,),
}
_LONG = {"max_position_embeddings": 131072}
_LLAMA_31 = _LLAMA_3 | _LONG | {"rope_scaling": RopeScaling("llama3", 8.0)}
_LLAMA_32 = _LLAMA_3 | _LONG | {"rope_scaling": RopeScaling("llama3", 32.0), "tie_word_embeddings": True}
_QWEN = {"rope_theta": 1e6, "bos_token_id": 151643, "eos_token_ids": (151643,)}
_QWEN_2 = _QWEN | {"model_type": "qwen2", "qkv_bias": True, "max_position_embeddings": 32768}
_QWEN_3 = _QWEN | {"model_type": "qwen3", "qk_norm": True, "head_dim": 128, "max_position_embeddings": 32768}
_SMOLLM_2 = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_ids": (0,),
}

# What else a model has, beyond its sizes and the defaults of ModelConfig.
_REST: dict[str, dict[str, Any]] = {
    "llama-7b": _LLAMA_1,
    "llama-13b": _LLAMA_1,
    "llama-33b": _LLAMA_1,
    "llama-65b": _LLAMA_1 | {"rms_norm_eps": 1e-5},
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": _LLAMA_2,
    "llama-2-70b": _LLAMA_2,
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": _LLAMA_3,
    "llama-3.1-8b": _LLAMA_31,
    "llama-3.1-70b": _LLAMA_31,
    "llama-3.1-405b": _LLAMA_31,
    "llama-3.2-1b": _LLAMA_32,
    "llama-3.2-3b": _LLAMA_32,
    "tinyllama-1.1b": _LLAMA_1 | {"rms_norm_eps": 1e-5},
    "mistral-7b": _LLAMA_2
    | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    | {"window_layers": tuple(range(32))},
    "qwen2.5-0.5b": _QWEN_2 | {"tie_word_embeddings": True},
    "qwen2.5-7b": _QWEN_2 | {"max_position_embeddings": 131072},
    "qwen3-0.6b": _QWEN_3 | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN_3,
    "smollm2-135m": _SMOLLM_2,
    "smollm2-360m": _SMOLLM_2,
    "smollm2-1.7b": _SMOLLM_2 | {"rope_theta": 130000.0},
}


def shapes() -> list[str]:
    """The names that `shape` knows."""
    return list(_SIZES)


def shape(name: str) -> ModelConfig:
    """The configuration of the published base model `name`. Raises ModelError with the nearest name."""
    if name not in _SIZES:
        raise ModelError(
            f"no model shape is called {name!r}{did_you_mean(name, _SIZES)}; there are {', '.join(_SIZES)}"
        )
    hidden, inner, layers, heads, kv_heads, vocab = _SIZES[name]
    sizes = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }
    return ModelConfig(**{**sizes, **_REST.get(name, {})})
