"""Fold an adapter into its base and write a Hugging Face folder, measured before it is kept:

    W + D in float64 -> round to the output dtype -> write -> load again -> compare with base + adapter -> keep or not

Rounding can swallow a small delta whole (bfloat16 keeps 8 bits), so every layer reports what of its D survived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters import Adapter
from tunesmith.errors import CannotMerge, ConfigError, VerificationError
from tunesmith.export.fold import LayerLoss, Originals, merged_weights
from tunesmith.export.hf import DTYPES, SHARD, dtype_name, narrowest, write_model
from tunesmith.export.probe import built_in_rows
from tunesmith.export.subject import (
    Reference,
    agreement,
    check_out,
    divergence,
    log_probabilities,
    reference_of,
)
from tunesmith.files import atomic_folder, atomic_write_json
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.sparse import evaluated, said
from tunesmith.tokenizer import Tokenizer

__all__ = ["LayerLoss", "MergeReport", "merge_adapter", "merged_weights"]

EXACT = ("float32", "bfloat16", "float16", "F32", "BF16", "F16")  # the others round every weight, delta or not
LEAST_SURVIVED = 0.5  # of a layer's delta, along its own direction
MOST_KL = 0.1  # of the merged model from base + adapter, as a share of that of the base from it
MOST_DRIFT = 0.5  # likewise where quantization comes in: of the result, or of the base that it was trained on


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept: per layer, and of the model's answers on probe rows.

    `kl` is the mean KL divergence of the merged model from base + adapter, `kl_base` that of the bare base (None where
    there is no adapter, or the method trained the base itself); `top1_agreement` the share of places with the same
    likeliest token. `kl_as_trained` and `top1_as_trained`: from the adapter on the quantized base that it was trained
    on. `base` names the base that it was folded into, its hash, and how it was told to be the right one.
    """

    dtype: str
    layers: tuple[LayerLoss, ...]
    top1_agreement: float
    kl: float
    kl_base: float | None
    kl_as_trained: float | None = None
    top1_as_trained: float | None = None
    base: Mapping[str, Any] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """Why this merge is not what was trained, worst first; empty where it is."""
        lost = sorted((layer for layer in self.layers if layer.survived < LEAST_SURVIVED), key=lambda at: at.survived)
        named = ", ".join(f"{layer.name} ({layer.survived:.0%} of its delta survived)" for layer in lost[:3])
        found = [f"rounding to {self.dtype} lost {len(lost)} of {len(self.layers)} deltas: {named}"] if lost else []
        if self.layers and self.kl_base is not None:
            moves = f"where the whole adapter moves the base's by {self.kl_base:.3g}"
            most = MOST_KL if self.dtype in EXACT else MOST_DRIFT
            if self.kl > most * self.kl_base:
                found.append(f"its answers moved by KL {self.kl:.3g}, {moves}")
            if self.kl_as_trained is not None and self.kl_as_trained > MOST_DRIFT * self.kl_base:
                found.append(
                    f"on this base its answers are KL {self.kl_as_trained:.3g} from those on the quantized one that it "
                    f"was trained on, {moves}"
                )
        return found

    def summary(self) -> dict[str, Any]:
        """The report without its layers, the worst one named."""
        worst = min(self.layers, key=lambda layer: layer.survived, default=None)
        quantized = {"kl_as_trained": self.kl_as_trained, "top1_as_trained": self.top1_as_trained}
        return {
            "dtype": self.dtype,
            "merged_layers": len(self.layers),
            "least_survived": None if worst is None else worst.survived,
            "least_survived_layer": None if worst is None else worst.name,
            "elements_changed": sum(layer.changed for layer in self.layers) / max(1, len(self.layers)),
            "top1_agreement": self.top1_agreement,
            "kl": self.kl,
            "kl_base": self.kl_base,
            **(quantized if self.kl_as_trained is not None else {}),
            **{f"base_{key}": value for key, value in self.base.items()},
        }

    def write(self, folder: Path) -> None:
        """Write the whole report as FOLDER/merge.json."""
        details = {"layers": [asdict(layer) for layer in self.layers]}
        atomic_write_json(folder / "merge.json", {**self.summary(), "faults": self.faults(), **details})


@dataclass(frozen=True)
class Merge:
    """How a merge is to be made, beside model, adapter and place.

    `dtype` auto is the narrowest that holds the base exactly. `rows` of token ids are what the merged model is compared
    on (default: the tokenizer's golden texts). `as_trained` is what the adapter computed on the quantized base that it
    was trained on. `base`, `originals`, `dequantize` and `sampling`: see `MergeReport`, `fold.merged_weights` and
    `hf.write_model`. `shard` bytes go into a file. `force` keeps a merge that lost much. `check` may look at what was
    written, as files and loaded again, before it is kept.
    """

    dtype: str = "auto"
    force: bool = False
    rows: Sequence[Sequence[int]] | None = None
    as_trained: Reference | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    originals: Originals | None = None
    dequantize: bool = False
    sampling: Mapping[str, Any] | None = None
    shard: int = SHARD
    check: Callable[[Path, Llama, Reference], None] | None = None


def merge_adapter(
    model: Llama,
    adapter: Adapter | None,
    tokenizer: Tokenizer,
    out: Path,
    how: Merge | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write `model` with `adapter` (if any) folded in to the folder `out`; returns `MergeReport.summary()`.

    `model` should be loaded in float32, and stays as it is. `how` or its fields as `settings` say how. OUT/merge.json
    holds the whole report. Raises CannotMerge; ConfigError for an `out` that is there or a dtype that is not known;
    VerificationError for a merge that lost too much: nothing is kept then.
    """
    how = how or Merge(**settings)
    out = Path(out)
    check_attention(model, how.force)
    check_out(out, how.force)
    chosen = output_dtype(model, how.dtype)
    tensors, layers, config = merged_weights(model, adapter, chosen, dequantize=how.dequantize, originals=how.originals)
    reference = reference_of(model, adapter, how.rows or built_in_rows(tokenizer, model.config))
    with atomic_folder(out) as folder:
        write_model(folder, config, tensors, tokenizer, chosen, sampling=how.sampling, shard=how.shard)
        del tensors
        again = load_model(folder, dtype=model.dtype, device=model.device)
        report = compared(again, reference, layers, dtype_name(chosen), how)
        refuse_lossy(report, out, how.force)
        if how.check is not None:
            how.check(folder, again, reference)
        if adapter is not None:
            report.write(folder)
    return report.summary()


def refuse_lossy(report: MergeReport, out: Path, force: bool) -> None:
    """Raise VerificationError for a merge that is not what was trained, unless `force`."""
    if report.faults() and not force:
        raise VerificationError(
            f"{out}: this merge is not what was trained, and was not kept: {'; '.join(report.faults())}; write it "
            "in more bits (--dtype float32, --type F32), keep the adapter beside its base, or use --force"
        )


def compared(merged: Llama, reference: Reference, layers: tuple[LayerLoss, ...], dtype: str, how: Merge) -> MergeReport:
    """Hold what was written and loaded again against base + adapter, in the base's own dtype."""
    now = log_probabilities(merged, reference.probe)
    drift = how.as_trained
    there = now if drift is None else log_probabilities(merged, drift.probe)
    return MergeReport(
        dtype=dtype,
        layers=layers,
        top1_agreement=agreement(reference.trained, now),
        kl=divergence(reference.trained, now),
        kl_base=None if reference.base is None else divergence(reference.trained, reference.base),
        kl_as_trained=None if drift is None else divergence(drift.trained, there),
        top1_as_trained=None if drift is None else agreement(drift.trained, there),
        base=how.base,
    )


def check_attention(model: Llama, force: bool) -> None:
    """Raise CannotMerge where the model attends in a way that other tools' files cannot say, unless `force`."""
    if evaluated(model.pattern) and not force:
        raise CannotMerge(
            f"attention: it was trained with sparse attention ({said(model.pattern)}), which a plain model's files "
            "cannot say: other tools would compute full attention; keep the adapter beside its base, or use --force"
        )


def output_dtype(model: Llama, name: str) -> torch.dtype:
    """The dtype of this name; auto is the narrowest that holds the base exactly. Raises ConfigError."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype: {name!r} is not known; use auto, {', '.join(DTYPES)}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = [parameters[key] for key in model.config.weight_shapes()]
    if not all(p.is_floating_point() for p in own):
        return torch.float32  # what few bits stand for is a product, which 16 bits do not hold
    return narrowest(own)
