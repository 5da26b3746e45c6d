"""The settings of a run: frozen, strict, one section for each function that takes one.

Each field carries the description that `docs/configuration.md` is generated from. `adapter` stays a mapping with a
`kind`: the method's own file validates it (see `validate_section`), so that a new method needs no change here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.dataclasses import dataclass

from tunesmith.config.attention import AttentionSettings, read_attention
from tunesmith.config.source import Located, dump

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# Measured from the loss; the others are task metrics, and the first of those chooses the best checkpoint.
LOSS_METRICS = ("eval_loss", "perplexity", "mean_token_accuracy")


def _words(value: Any) -> Any:
    """One word, or a list of words, as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _trackers(value: Any) -> Any:
    """`report_to` with the ecosystem's "none" and null read as no tracker at all."""
    words = _words(value)
    return () if value is None or words == ("none",) else words


def _resume(value: Any) -> Any:
    """`true` is the latest complete checkpoint, `false` a fresh start."""
    if isinstance(value, bool):
        return "latest" if value else None
    return value


def _valid_size(value: Any) -> Any:
    if isinstance(value, float) and value >= 1:
        raise ValueError("a share must be below 1; write a whole number to hold out that many rows")
    return value


def _folder(value: Any) -> Any:
    """A name that is safe as one folder."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,127}", value):
        raise ValueError(f"should be a folder's name of letters, digits and _ . = + -, not {value[:40]!r}")
    return value


def _kind(value: Any) -> Any:
    """A mapping with a `kind`; `located` line numbers survive."""
    if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
        raise ValueError("should be a mapping of names to values, with a 'kind'")
    if not isinstance(value.get("kind", ""), str) or value.get("kind", "lora") == "":
        raise ValueError("'kind' should be the name of a method, such as lora")
    return value if "kind" in value else Located({"kind": "lora", **value}, getattr(value, "origins", None))


def _optimizer(value: Any) -> Any:
    """Other spellings of the same optimizer."""
    return _SPELLINGS.get(value, value) if isinstance(value, str) else value


_SPELLINGS = {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw"}


def _recompute(value: Any) -> Any:
    """`true`, `false`, or the one word."""
    if isinstance(value, str) and value != "selective":
        raise ValueError(f"should be true, false or selective, not {value[:40]!r}")
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Count = Annotated[int, Field(ge=1)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_trackers)]
AdapterMapping = Annotated[Any, BeforeValidator(_kind), WithJsonSchema({"type": "object"})]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """The base model: which one, and in which precision and on which device it is held."""

    path: str = Field(
        min_length=1, description="Hub name, catalog name, folder in Hugging Face layout, or a .gguf file."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub name; none is the default branch."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the frozen weights; auto is bfloat16 where the hardware is fast in it.",
    )
    init: Literal["weights", "random"] = Field(
        default="weights",
        description="random trains from scratch, with `adapter: full`: `path` is then the name of a known shape, a "
        "config.json, or a model whose sizes are taken, and the weights are drawn from `train.seed`.",
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="With `init: random`, the model or folder whose tokenizer is used."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (a GPU if there is one), cpu, cuda or cuda:N.",
    )
    attention: Annotated[AttentionSettings | None, BeforeValidator(read_attention)] = Field(
        default=None, description="Sparse attention, such as `{pattern: local, window: 256}`; none: full."
    )

    @model_validator(mode="after")
    def _own_tokenizer(self) -> Self:
        if self.tokenizer is not None and self.init != "random":
            raise ValueError("tokenizer: a model is used with its own; another one goes with init: random alone")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantSection:
    """The base's frozen linears in few bits: embedding, head and norms stay in `model.dtype`, which products use."""

    kind: Literal["none", "nf4", "nf3", "nf2", "fp4", "int4", "int8", "llm-int8", "keep"] = Field(
        default="none",
        description="Code of the weights while the base is loaded; keep leaves a GGUF file's own 4 or 8 bits as they "
        "are; none changes nothing.",
    )
    block_size: int = Field(
        default=64, ge=8, multiple_of=8, description="Weights that share a scale; int8 has one a row."
    )
    double_quant: bool = Field(default=True, description="Hold the scales of blocks in 8 bits too.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSection:
    """The data: where it is, how its rows are read, and how they become text."""

    train: str = Field(
        min_length=1, description="A file (.json .jsonl .csv .parquet .txt), a folder with train/valid/test, or a name."
    )
    valid: str | None = Field(
        default=None, description="Validation rows; none takes those of the folder, or `valid_size`."
    )
    valid_size: Annotated[int | float | None, BeforeValidator(_valid_size)] = Field(
        default=None,
        ge=0,
        description="Rows held out of `train` for validation: a number, or a share below 1; 0 holds out none.",
    )
    valid_seed: int | None = Field(
        default=None, ge=0, description="Which rows `valid_size` holds out; none takes `train.seed`."
    )
    template: str = Field(
        default="chat",
        min_length=1,
        description="chat (the model's own), alpaca, alpaca-short, llama2-chat, dolly, plain, or a string with "
        "{instruction} {input} {output} {system} {text}.",
    )
    schema: str = Field(
        default="auto", min_length=1, description="How rows are read; auto recognises the schema by its keys."
    )
    instruction: str | None = Field(
        default=None, description="Instruction put before rows that have none, such as text and label."
    )
    cutoff: int = Field(default=1024, ge=2, description="Longest example in tokens; the rest is cut off and counted.")
    cut: Literal["answer-end", "prompt-start", "drop"] = Field(
        default="answer-end",
        description="What a row over `cutoff` loses: the end of its answer, the start of its prompt, or itself.",
    )
    train_on_inputs: bool = Field(default=False, description="Also learn the prompt, not the answer alone.")
    limit: Count | None = Field(default=None, description="Use only the first rows of `train`.")
    captions: bool = Field(
        default=False, description="ScienceQA: put the captions of images behind the hint, as text in their stead."
    )
    labels: Words = Field(
        default=(), description="Labels of a classification, in order; empty takes those found in the data."
    )

    @model_validator(mode="after")
    def _one_validation_set(self) -> Self:
        if self.valid is not None and self.valid_size:
            raise ValueError("valid and valid_size both say where validation rows come from; keep one")
        if self.valid_seed is not None and not self.valid_size:
            raise ValueError(
                "valid_seed says which rows valid_size holds out, and there is none; give it, or take it out"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainSection:
    """Training: how long, in which batches, and by which optimizer. A step is an optimizer step, everywhere."""

    epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows; a fraction is allowed.")
    max_steps: Count | None = Field(
        default=None, description="Stop after this many optimizer steps, whatever `epochs` says."
    )
    batch_size: Count = Field(
        default=16, description="Rows an optimizer step, over all processes and accumulation steps."
    )
    micro_batch: Count | None = Field(
        default=None, description="Most rows in one pack; none lets `pack_tokens` decide."
    )
    pack_tokens: Count | None = Field(
        default=None, description="Most tokens in one pack; none is chosen from the memory at hand."
    )
    share_prefix: bool = Field(
        default=True, description="Compute tokens that examples begin with in common once a pack."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate; none is the method's own default."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Warm-up in optimizer steps; not together with `warmup_ratio`."
    )
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="Warm-up as a share of all optimizer steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay (AdamW).")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of attention's probabilities set to 0 at random in training."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to this norm; 0 clips nothing.")
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="Element-wise work on a CPU: by kernels that a C++ compiler builds once, or by torch, slower.",
    )
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"], BeforeValidator(_optimizer)
    ] = Field(
        default="adamw",
        description="AdamW with its states in 32 or in 8 bits, paged to main memory or not (CUDA, by bitsandbytes). "
        "adamw_torch, adamw_bnb_8bit and paged_adamw_32bit are understood.",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="Where the optimizer's states lie: with the model, in main memory, or in a file of the run folder "
        "that is mapped. The result is the same, bit for bit.",
    )
    recompute: Annotated[bool | Literal["selective"], BeforeValidator(_recompute)] = Field(
        default=False,
        description="Recompute each block in the backward pass: less memory, more time. selective keeps the products "
        "with the base's weights and recomputes the rest: between the two in both.",
    )
    memory: Literal["auto", "fixed"] = Field(
        default="auto",
        description="Make the run fit: auto recomputes where it must, and halves packs if memory runs out all the "
        "same; fixed stops instead.",
    )
    shuffle: bool = Field(default=True, description="Visit rows in a new random order each epoch.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of initialisation, shuffling and dropout.")
    save_steps: Count | None = Field(
        default=None, description="Steps between checkpoints; none saves at the end of each epoch."
    )
    keep_checkpoints: Count = Field(default=2, description="Complete checkpoints kept, newest first, beside the best.")
    resume: Annotated[str | None, BeforeValidator(_resume)] = Field(
        default=None,
        min_length=1,
        description="Go on from a checkpoint folder; latest (or true) is the last complete one of the run.",
    )

    @model_validator(mode="after")
    def _moved_once(self) -> Self:
        if self.optimizer.startswith("paged") and self.offload != "none":
            raise ValueError("optimizer pages its states and offload moves them; keep one")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio both set the warm-up; keep one")
        return self


def _best(data: dict[str, Any]) -> str:
    return next((name for name in data.get("metrics", ()) if name not in LOSS_METRICS), "eval_loss")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSection:
    """Evaluation during training, and which measure chooses the best checkpoint."""

    every_steps: Count | None = Field(
        default=None, description="Optimizer steps between evaluations; none is once an epoch."
    )
    metrics: Words = Field(default=(), description="Measured beside eval_loss, such as accuracy.")
    best: str = Field(
        default_factory=_best,
        min_length=1,
        description="Metric that chooses the best checkpoint; by default the first task metric listed, else eval_loss.",
    )
    patience: Count | None = Field(default=None, description="Stop after this many evaluations without a better one.")
    rows: Count | None = Field(default=None, description="Use only the first validation rows.")
    general: Words = Field(
        default=(),
        description="Published sets that are not trained for, as NAME=PATH (and NAME.KEY=VALUE), measured with the "
        "rest: their mean accuracy, and by how much it fell.",
    )
    general_items: Count | None = Field(default=None, description="Use only the first items of each of these sets.")
    samples: int = Field(default=3, ge=0, description="Generations shown before and after training.")

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.best not in (*self.metrics, *LOSS_METRICS):
            raise ValueError(f"best is {self.best!r}, which is not measured; add it to metrics")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogSection:
    """Experiment trackers; a run's own metrics.jsonl is always written."""

    report_to: Trackers = Field(
        default=(), description="tensorboard, wandb or trackio; empty (or none) reports nowhere."
    )
    project: str = Field(default="tunesmith", min_length=1, description="Project that trackers file the run under.")
    name: str | None = Field(
        default=None, min_length=1, description="The run's name there; none is the run's own name."
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """A whole run. Frozen: `dataclasses.replace(run, name="b")` makes another."""

    model: ModelSection = Field(description="The base model.")
    data: DataSection = Field(description="The data.")
    quant: QuantSection = Field(default_factory=QuantSection, description="The base in few bits.")
    adapter: AdapterMapping = Field(
        default_factory=lambda: {"kind": "lora"},
        description="The method: `kind` and that method's own settings.",
    )
    train: TrainSection = Field(default_factory=TrainSection, description="Training.")
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description="Evaluation.")
    log: LogSection = Field(default_factory=LogSection, description="Trackers.")
    output_dir: str = Field(default="runs", min_length=1, description="Folder that run folders are made in.")
    name: Annotated[str | None, BeforeValidator(_folder)] = Field(
        default=None,
        description="Name of the run's folder; none is made from the model, the data and the method.",
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as plain lists, mappings and scalars, ready for YAML or JSON."""
        return {name: _plain(getattr(self, name)) for name in type(self).__dataclass_fields__}

    def dump_yaml(self) -> str:
        """Return the resolved configuration as YAML; `load_run` of it gives an equal Run."""
        return dump(self.to_dict())


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "quant": QuantSection,
    "train": TrainSection,
    "evaluate": EvaluateSection,
    "log": LogSection,
}


def _plain(value: Any) -> Any:
    if isinstance(value, AttentionSettings):
        return value.to_dict()
    if type(value) in SECTIONS.values():
        return {name: _plain(getattr(value, name)) for name in type(value).__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
