"""The fixed jobs and who takes part: tables, no logic beyond reading them.

A job fixes rows, model, adapter, batch and arithmetic; a mode is one way in which one side carries it out. Where a
side has several modes, `tune` tries each on a few rows first and the fastest goes on to the rounds, so that ours is
compared with a peer at its best. Modes that `always` run are bars of their own (the default of alpaca-lora; the
leanest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MODEL = "smollm2-135m-instruct"
INSTRUCTION = "Classify the sentiment of the movie review as positive or negative."


@dataclass(frozen=True)
class Mode:
    """One way to carry out a job: `side` is the environment, `child` the module (None: the `tunesmith` command)."""

    name: str
    side: str
    child: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    always: bool = False  # in the rounds whether or not it is the side's fastest
    ours: bool = False


@dataclass(frozen=True)
class Job:
    """One fixed piece of work. `kind` is "train" or "decode"; a train job's data are made by children/prepare.py."""

    name: str
    about: str
    kind: str = "train"
    source: str = "alpaca"
    dtype: str = "bfloat16"
    rows: int = 512
    cutoff: int = 512
    batch_size: int = 16
    template: str = "alpaca"
    targets: str = "qv"
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 3e-4
    modes: tuple[str, ...] = ()


def _hf(micro: int, group: bool = False, **settings: Any) -> Mode:
    """Hugging Face Trainer + PEFT; at micro-batch 1 nothing is padded, so there is nothing to group."""
    name = f"hf-mb{micro}" + ("-group" if group else "") + ("-amp" if settings.get("autocast") else "")
    chosen = {"micro_batch": micro, "group": group, **settings}
    return Mode(name, "hf", "train_hf", chosen, always=(not group and micro in (1, 4) and not settings))


def _shape_hf(attention: str, micro: int) -> Mode:
    """transformers and PEFT on random weights with one of transformers' attentions, rows grouped by length."""
    settings = {"micro_batch": micro, "group": micro > 1, "attention": attention}
    return Mode(f"hf-{attention.split('_')[0]}-mb{micro}", "hf", "train_hf", settings)


HF = (
    *(_hf(1), _hf(4), _hf(4, True), _hf(16), _hf(16, True)),
    *(_hf(1, autocast=True), _hf(16, True, autocast=True)),  # autocast: LoRA's own products in bf16 too
)
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("ours", "ours", None, ours=True),
        Mode("ours-lean", "ours", None, {"train.pack_tokens": 512}, ours=True, always=True),
        *HF,
        Mode("trl", "trl", "train_trl", {}),
        Mode("litgpt-mb1", "litgpt", "train_litgpt", {"micro_batch": 1}),
        Mode("litgpt-mb4", "litgpt", "train_litgpt", {"micro_batch": 4}),
        Mode("decode-ours", "ours", "decode_ours", {"dtype": "auto"}, ours=True),
        Mode("decode-transformers", "hf", "decode_hf", {"dtype": "bfloat16"}, always=True),
        Mode("decode-transformers-fp32", "hf", "decode_hf", {"dtype": "float32"}, always=True),
        Mode("decode-llamacpp", "llamacpp", "decode_llamacpp", {}),
        Mode("shape-ours", "ours", "train_shape", ours=True),
        *(_shape_hf(attention, micro) for attention in ("sdpa", "flash_attention_2") for micro in (1, 4, 16)),
    )
}
_PLAIN = tuple(mode.name for mode in HF if not mode.settings.get("autocast"))
_BF16 = tuple(mode.name for mode in HF)
JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "alpaca",
            "Alpaca, LoRA r=8 on q_proj and v_proj, bf16, global batch 16, cut-off 512",
            modes=("ours", "ours-lean", *_BF16, "trl", "litgpt-mb1", "litgpt-mb4"),
        ),
        Job(
            "alpaca-fp32",
            "The same in fp32",
            dtype="float32",
            modes=("ours", *_PLAIN),
        ),
        Job(
            "alpaca-all",
            "The same in bf16, LoRA r=16 on all linears",
            targets="all",
            rank=16,
            alpha=32,
            modes=("ours", *_BF16),
        ),
        Job(
            "reviews",
            "Movie reviews to classify, Alpaca template, LoRA r=8 on q_proj and v_proj, bf16, global batch 16",
            source="reviews",
            modes=("ours", *_BF16, "trl"),
        ),
        Job(
            "long",
            "Rows of 2,048 tokens (reviews end to end), every token a target, bf16, global batch 4",
            source="long",
            rows=32,
            cutoff=2048,
            batch_size=4,
            template="plain",
            modes=("ours", "hf-mb1", "hf-mb4"),
        ),
        Job(
            "decode",
            "Greedy decoding, batch 1 and 8",
            kind="decode",
            source="reviews",
            rows=16,
            modes=("decode-ours", "decode-transformers", "decode-transformers-fp32", "decode-llamacpp"),
        ),
    )
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA with random weights, as config.json has them, and the work to do with it."""

    config: Mapping[str, Any]
    rows: int
    longest: int
    batch_size: int


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, theta: float) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": theta,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


SHAPES = {
    "tiny": Shape(_llama(64, 160, 2, 4, 2, 512, 1e4), rows=16, longest=48, batch_size=8),
    "135m": Shape(_llama(576, 1536, 30, 9, 3, 49152, 1e5), rows=128, longest=512, batch_size=16),
    "8b": Shape(_llama(4096, 14336, 32, 32, 8, 128256, 5e5), rows=512, longest=1024, batch_size=16),
}


def shape_job(name: str) -> Job:
    """The job on random weights of shape `name`; its rows are random tokens, half of each row targets."""
    shape = SHAPES[name]
    return Job(
        f"shape-{name}",
        f"Random weights of {name} shape, LoRA r=16 on all linears, rows of up to {shape.longest} tokens",
        source="random",
        rows=shape.rows,
        cutoff=shape.longest,
        batch_size=shape.batch_size,
        targets="all",
        rank=16,
        alpha=32,
        modes=("shape-ours", *(name for name in MODES if name.startswith(("hf-sdpa", "hf-flash")))),
    )


def in_float32(job: Job) -> Job:
    """The training job in float32, for a processor that only emulates bf16; a job without bf16 as it is."""
    if job.kind != "train" or job.dtype == "float32":
        return job
    modes = tuple(name for name in job.modes if not MODES[name].settings.get("autocast"))
    about = job.about.replace("bf16", "fp32")
    return replace(job, name=f"{job.name}-fp32", about=about, dtype="float32", modes=modes)


def small(job: Job, rows: int | None) -> Job:
    """The job on fewer rows."""
    return job if rows is None else replace(job, rows=min(rows, job.rows))


def run_settings(job: Job) -> dict[str, Any]:
    """The job in the keys of Tunesmith's own configuration, seed and places left out."""
    from bench.children.common import TARGETS

    return {
        "model.dtype": job.dtype,
        "model.device": "cpu",
        "data.template": job.template,
        "data.cutoff": job.cutoff,
        **({"data.instruction": INSTRUCTION} if job.source == "reviews" else {}),
        "adapter.kind": "lora",
        "adapter.rank": job.rank,
        "adapter.alpha": job.alpha,
        "adapter.dropout": 0.0,
        "adapter.target_modules": TARGETS[job.targets],
        "train.epochs": 1,
        "train.batch_size": job.batch_size,
        "train.learning_rate": job.learning_rate,
        "train.schedule": "constant",
        "train.weight_decay": 0.0,
        "train.max_grad_norm": 1.0,
        "evaluate.samples": 0,
    }
