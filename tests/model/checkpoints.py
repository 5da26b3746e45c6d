"""Small random checkpoints of every family, written by transformers or, in llama.cpp's layout, by gguf's writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (transformers' class, settings beyond the sizes): one for each flag of ModelConfig.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-all-heads": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


def reference(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' model of this family with random weights, norms and biases included."""
    import transformers

    kind, settings = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**_SIZES | settings | changes)
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _ExactNorm(module)
    return model.eval()


class _ExactNorm:
    """transformers' RMSNorm goes through float32 whatever the model's dtype: 2e-7 off in a float64 model."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.variance_epsilon) * self.norm.weight


def write_gguf(
    path: Path, model: Any, quant: str = "F32", extra: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Write `model` as llama.cpp's converter does; returns each tensor after quantization, by HF's name."""
    config = model.config
    arch = {"llama": "llama", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))
    for key, value in (extra or {}).items():
        natural = type(value) is int and value >= 0  # llama.cpp reads ids and sizes as unsigned only
        kind = gguf.GGUFValueType.UINT32 if natural else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    worth = {
        name: _add(writer, name, tensor, config, arch, quant)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def _add(writer: Any, name: str, tensor: torch.Tensor, config: Any, arch: str, quant: str) -> np.ndarray:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    stem, kind = name.rsplit(".", 1)
    values = tensor.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.rsplit(".", 1)[-1])
    if arch == "llama" and heads:  # convert_hf_to_gguf.py, LlamaModel.permute
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    chosen = gguf.GGMLQuantizationType[quant if values.ndim > 1 else "F32"]
    stored = gguf.quantize(np.ascontiguousarray(values), chosen)
    writer.add_tensor(f"{names.get_name(stem)}.{kind}", stored, raw_dtype=chosen)
    worth = gguf.dequantize(stored, chosen)
    if arch == "llama" and heads:
        worth = worth.reshape(heads, -1, 2, *worth.shape[1:]).swapaxes(1, 2).reshape(worth.shape)
    return worth


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """convert_hf_to_gguf.py, generate_extra_tensors: what llama.cpp divides each frequency by."""
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    wavelength = 2 * np.pi / frequency
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / wavelength - low) / (high - low)
    middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, rope["factor"], middle))
    return factors.astype(np.float32)
