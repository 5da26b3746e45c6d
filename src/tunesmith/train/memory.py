"""How much memory a run will take, from its configuration alone, and how much it took.

    weights      every base parameter once (a tied head is the embedding)
    adapter      4 bytes a parameter that is added to the base's
    gradients    4 bytes a trainable parameter; optimizer 8 (AdamW's two moments); all float32
    activations  tokens x what one layer keeps for its backward x layers
                 (recomputing: one layer's worth, and every layer's input), and the adapter's copies in a half dtype
    logits       one chunk of targets x vocabulary, three copies: the head's output, float32, its gradient
    workspace    what lives within one layer's backward, attention's tiles included
    process      Python and torch themselves

One layer keeps, in values a token (d = hidden, q = query heads x head_dim, k = KV heads x head_dim, f = MLP width):

    d    input of input_layernorm             d    input of q/k/v_proj, if one of them has an adapter
    q    queries, rotated                     2k   keys, rotated, and values
    q    input of o_proj, if adapted          d    input of post_attention_layernorm
    d    input of gate/up_proj, if adapted    2f   outputs of gate_proj and up_proj
    f    input of down_proj, if adapted       r    x A of every adapted linear

and in float32 a scale a norm; with QK-norm, q + k more. Attention keeps, with native kernels, the probabilities of
tiles of up to KEPT_KEYS keys (as many values a query head as the tile has keys), with torch's its output and in
float32 a log-sum-exp a query head. A frozen linear keeps nothing: its backward needs W only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tunesmith.errors import OutOfMemory
from tunesmith.hardware import memory
from tunesmith.model.config import ModelConfig
from tunesmith.model.native_attention import KEPT_KEYS

GIB = 2**30
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROCESS = int(0.35 * GIB)  # an interpreter that has imported torch
CHUNK = 128  # targets whose logits exist at a time
TILE = 256  # queries that attention works on at a time
SPARE = 0.9  # share of the available memory that a plan may use
STEP = 256  # packs are sized in multiples of this many tokens
MOST = {"cpu": 4096, "cuda": 16384}  # longer packs bring no more speed


@dataclass(frozen=True)
class Job:
    """What memory depends on: the model, what trains, and how large a pack is. Bytes are those of one value."""

    config: ModelConfig
    trainable: int  # parameters
    pack_tokens: int
    of_base: int = 0  # how many of them are the base's own, so already among its weights
    weight_bytes: float = 2
    activation_bytes: int = 2
    targets: frozenset[str] = frozenset(LINEARS)  # adapted linears, by the last part of their names
    rank: int = 16
    supervised: float = 1.0  # share of a pack's tokens
    longest: int | None = None  # tokens of the longest row (None: a pack may be one row)
    recompute: bool = False
    device: str = "cpu"
    native: bool = True  # element-wise work by native kernels (on a CPU)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, in the order in which they are printed."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def lines(self, measured: int | None = None) -> list[str]:
        """Give the plan as lines of text, next to the peak that was measured (bytes) when there is one."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items())
        beside = "" if measured is None else f", measured {measured / GIB:.2f} GiB ({measured / self.total:.0%} of it)"
        return [f"memory: planned {self.total / GIB:.2f} GiB{beside}", f"  GiB: {parts}"]


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


def layer_bytes_per_token(job: Job) -> int:
    """Give the bytes that one layer keeps for its backward, a token (the table at the head of this file)."""
    config, targets = job.config, job.targets
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    values = 2 * d + q + 2 * k + 2 * f
    values += d * bool(targets & {"q_proj", "k_proj", "v_proj"}) + d * bool(targets & {"gate_proj", "up_proj"})
    values += f * ("down_proj" in targets) + job.rank * len(targets & set(LINEARS))
    scalars = 2
    if job.native:
        values += q * ("o_proj" in targets) + config.num_attention_heads * min(_longest(job), KEPT_KEYS)
    else:
        values += q
        scalars += config.num_attention_heads
    if config.qk_norm:
        values += q + k
        scalars += config.num_attention_heads + config.num_key_value_heads
    return values * job.activation_bytes + 4 * scalars


def plan(job: Job) -> MemoryPlan:
    """Give the memory plan of a job, by the formula at the head of this file."""
    config, tokens = job.config, job.pack_tokens
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kept = layer_bytes_per_token(job) * tokens
    copies = job.trainable * job.activation_bytes if job.activation_bytes < 4 else 0
    inputs = layers * d * job.activation_bytes * tokens
    targets = int(tokens * job.supervised)
    longest = _longest(job)
    in_backward = (3 * f + 4 * d) * job.activation_bytes * tokens
    tiles = 3 * 4 * config.num_attention_heads * min(TILE, longest) * longest
    return MemoryPlan(
        {
            "weights": int(parameter_count(config) * job.weight_bytes),
            "adapter": 4 * (job.trainable - job.of_base),
            "gradients": 4 * job.trainable,
            "optimizer": 8 * job.trainable,
            "activations": (kept + inputs if job.recompute else layers * kept) + copies,
            "logits": min(CHUNK, targets) * config.vocab_size * (job.activation_bytes + 8)
            + 2 * targets * d * job.activation_bytes,
            "workspace": in_backward + tiles,
            "process": PROCESS,
        }
    )


def _longest(job: Job) -> int:
    return min(job.longest or job.pack_tokens, job.pack_tokens)


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


def check_pack_fits(job: Job, available: int) -> None:
    """Raise OutOfMemory if a pack of the size that was configured needs more than there is."""
    if plan(job).total > available:
        raise OutOfMemory(f"train.pack_tokens: {_does_not_fit(job, available)}, or a smaller train.pack_tokens")


def choose_pack_tokens(job: Job, available: int, longest_row: int) -> tuple[int, str]:
    """Give the largest pack that fits `available` bytes, and a line that says why; `job.pack_tokens` is ignored.

    A pack is a multiple of STEP tokens, holds the longest row, and is never longer than brings speed. Raises
    OutOfMemory with the plan and the ways out if not even one row fits.
    """
    job = replace(job, longest=longest_row)
    least = -(-longest_row // STEP) * STEP
    most = max(MOST.get(job.device, MOST["cpu"]), least)
    budget = int(available * SPARE)
    fitting = [size for size in range(least, most + 1, STEP) if plan(replace(job, pack_tokens=size)).total <= budget]
    if not fitting:
        raise OutOfMemory(_does_not_fit(replace(job, pack_tokens=least), budget))
    size = fitting[-1]
    reason = "longer packs bring no more speed" if size == most else f"{budget / GIB:.2f} GiB may be used"
    if size == least and size > MOST.get(job.device, MOST["cpu"]):
        reason = f"the longest row has {longest_row}"
    return size, f"packs of {size} tokens: {reason}"


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


def _does_not_fit(job: Job, budget: int) -> str:
    config = job.config
    smaller = plan(replace(job, recompute=True))
    cures: Iterable[str] = (
        *(["train.recompute=true"] if smaller.total <= budget and not job.recompute else []),
        *(["model.dtype=bfloat16"] if job.weight_bytes > 2 else []),
        "a smaller data.cutoff",
        "a smaller model",
    )
    needed = plan(job)
    largest = max(needed.parts, key=lambda part: needed.parts[part])
    return (
        f"a pack of {job.pack_tokens} tokens of this {parameter_count(config) / 1e6:,.0f}M model needs "
        f"{needed.total / GIB:.2f} GiB ({largest} {needed.parts[largest] / GIB:.2f}) and {budget / GIB:.2f} may be "
        f"used; try {', or '.join(cures)}"
    )
