"""How much main memory or GPU memory there is, how much this process has taken, and whether weights fit into it."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch

from tunesmith.errors import OutOfMemory
from tunesmith.hardware import memory
from tunesmith.model import allocator
from tunesmith.model.config import ModelConfig

GIB = 2**30


def parameter_count(config: ModelConfig) -> int:
    """Give the number of parameters of a model; a tied head counts once."""
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = 2 * d * q + 2 * d * k + 3 * d * f + 2 * d
    layer += (q + 2 * k) * config.qkv_bias + d * config.o_bias + (2 * f + d) * config.mlp_bias
    layer += 2 * config.head_dim * config.qk_norm
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings + d


def block_weights(config: ModelConfig) -> int:
    """Give the number of weights of the blocks' linears, biases not counted."""
    d, f, width = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return config.num_hidden_layers * (2 * d * width * (heads + kv_heads) + 3 * d * f)


def available_memory(device: str | torch.device = "cpu") -> int:
    """Give the bytes that this process may still take on `device` (a control group's limit included)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory()[1]


def usable_memory(device: str | torch.device = "cpu") -> int:
    """Give the bytes that a plan may count on: what is available, and what this process holds already.

    A plan counts weights and process too, and by the time it is made they may be there.
    """
    device = torch.device(device)
    held = torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_memory()[0]
    return available_memory(device) + held


def check_weights_fit(
    config: ModelConfig, dtype: torch.dtype, device: str | torch.device, bits: float | None = None
) -> None:
    """Raise OutOfMemory if a model's weights alone are more than there is, before anything of them is read.

    `bits`: of each weight of the blocks, where they are quantized.
    """
    needed, there = parameter_count(config) * dtype.itemsize, usable_memory(device)
    if bits is not None:
        needed -= int(block_weights(config) * (dtype.itemsize - bits / 8))
    if needed > there:
        smaller = "set model.dtype=bfloat16, or " if dtype.itemsize > 2 else ""
        raise OutOfMemory(
            f"the weights of this {parameter_count(config) / 1e6:,.0f}M model take {needed / GIB:.2f} GiB in "
            f"{str(dtype).removeprefix('torch.')} and {there / GIB:.2f} GiB may be used; {smaller}use a smaller model"
        )


def give_back_memory() -> None:
    """Give memory that no tensor is in back to the system: after a step that had too little, and after the last."""
    gc.collect()
    allocator.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident_memory() -> tuple[int, int]:
    """Give the bytes of main memory that this process holds now, and the most that it ever held."""
    import psutil

    now = psutil.Process().memory_info()
    return now.rss, max(now.rss, _peak(now))


def peak_memory(device: str | torch.device = "cpu") -> int:
    """Give the most bytes in use so far: allocated on a CUDA device, resident in main memory otherwise."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory()[1]


def _peak(info: object) -> int:
    try:  # ru_maxrss of a child starts at its parent's peak; Linux's own high-water mark does not
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if os.name == "nt":
        return int(getattr(info, "peak_wset", 0))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
