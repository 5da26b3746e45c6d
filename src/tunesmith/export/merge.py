"""Fold an adapter into its base and write a Hugging Face folder, measured before it is kept:

    W + D in float64 -> round to the output dtype -> write -> load again -> compare with base + adapter -> keep or not

Rounding can swallow a small delta whole (bfloat16 keeps 8 bits), so every layer reports what of its D survived.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.adapters.base import weight_path
from tunesmith.errors import CannotMerge, ConfigError, VerificationError
from tunesmith.export.probe import Probe, built_in_rows, logits_at, make_probe
from tunesmith.files import atomic_folder, atomic_save_safetensors, atomic_write_json
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.sparse import evaluated, said
from tunesmith.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST_SURVIVED = 0.5  # of a layer's delta, along its own direction
MOST_KL = 0.1  # of the merged model from base + adapter, as a share of that of the base from it


@dataclass(frozen=True)
class LayerLoss:
    """What rounding did to one weight W and its delta D; R is the rounding to the output dtype.

    `delta` = |D| / |W|;  `lost` = |R(W + D) - (W + D)| / |D|;  `survived` = <R(W + D) - R(W), D> / |D|^2, 1 where the
    delta arrived whole and 0 where nothing of it did;  `changed`: share of the elements with R(W + D) != R(W).
    """

    name: str
    delta: float
    lost: float
    survived: float
    changed: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept: per layer, and of the model's answers on probe rows.

    `kl` is the mean KL divergence of the merged model from base + adapter, `kl_base` that of the bare base (0 where the
    method trained the base itself); `top1_agreement` the share of places with the same likeliest token.
    """

    dtype: str
    layers: tuple[LayerLoss, ...]
    top1_agreement: float
    kl: float
    kl_base: float

    def faults(self) -> list[str]:
        """Why this merge is not what was trained, worst first; empty where it is."""
        lost = sorted((layer for layer in self.layers if layer.survived < LEAST_SURVIVED), key=lambda at: at.survived)
        named = ", ".join(f"{layer.name} ({layer.survived:.0%} of its delta survived)" for layer in lost[:3])
        found = [f"rounding to {self.dtype} lost {len(lost)} of {len(self.layers)} deltas: {named}"] if lost else []
        if self.layers and self.kl > MOST_KL * self.kl_base:
            found.append(
                f"its answers moved by KL {self.kl:.3g}, where the whole adapter moves the base's by {self.kl_base:.3g}"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """The report without its layers, the worst one named."""
        worst = min(self.layers, key=lambda layer: layer.survived, default=None)
        return {
            "dtype": self.dtype,
            "merged_layers": len(self.layers),
            "least_survived": None if worst is None else worst.survived,
            "least_survived_layer": None if worst is None else worst.name,
            "elements_changed": sum(layer.changed for layer in self.layers) / max(1, len(self.layers)),
            "top1_agreement": self.top1_agreement,
            "kl": self.kl,
            "kl_base": self.kl_base,
        }


def merge_adapter(
    model: Llama,
    adapter: Adapter,
    tokenizer: Tokenizer,
    out: Path,
    *,
    dtype: str = "auto",
    force: bool = False,
    rows: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Write `model` with `adapter` folded in to the folder `out`; returns `MergeReport.summary()`.

    `model` should be loaded in float32, and stays as it is. `dtype` auto is the narrowest that holds the base exactly.
    `rows` of token ids are what the merged model is compared on (default: the tokenizer's golden texts). OUT/merge.json
    holds the whole report. Raises CannotMerge; ConfigError for an `out` that is there or a dtype that is not known;
    VerificationError for a merge that lost too much. `force` writes it all the same.
    """
    out = Path(out)
    if evaluated(model.pattern) and not force:
        raise CannotMerge(
            f"attention: it was trained with sparse attention ({said(model.pattern)}), which a plain model's files "
            "cannot say: other tools would compute full attention; keep the adapter beside its base, or use --force"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ConfigError(f"--out: {out} is there already; choose another folder, or --force to replace it")
    chosen = _output_dtype(model, dtype)
    tensors, layers, config = merged_weights(model, adapter, chosen)
    probe = make_probe(rows if rows is not None else built_in_rows(tokenizer, model.config))
    with atomic_folder(out) as folder:
        write_model(folder, config, tensors, tokenizer, chosen)
        del tensors
        report = _compare(model, adapter, folder, probe, layers, chosen)
        if report.faults() and not force:
            raise VerificationError(
                f"{out}: this merge is not what was trained, and was not kept: {'; '.join(report.faults())}; write it "
                "with --dtype float32, keep the adapter beside its base, or use --force"
            )
        details = {"layers": [asdict(layer) for layer in report.layers]}
        atomic_write_json(folder / "merge.json", {**report.summary(), "faults": report.faults(), **details})
    return report.summary()


def merged_weights(
    model: Llama, adapter: Adapter, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[LayerLoss, ...], ModelConfig]:
    """Return weights in `dtype` (on the CPU) with the adapter folded in, what each layer lost, and the config.

    Head and embedding are untied where the adapter changes one of them. Raises CannotMerge where a delta cannot be
    folded.
    """
    folded, layers = {}, []
    for name, weight, whole in _folded(model, adapter):
        folded[name] = whole.to(dtype).cpu()
        if weight is not None:
            layers.append(_loss(name, weight, whole, dtype))
    config = _with_biases(model.config, folded, adapter.kind)
    if config.tie_word_embeddings and not folded.keys().isdisjoint({"lm_head.weight", "model.embed_tokens.weight"}):
        config = replace(config, tie_word_embeddings=False)
    own = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    own |= folded
    tensors = {
        name: own[name].to("cpu", dtype) if name in own else torch.zeros(shape, dtype=dtype)
        for name, shape in config.weight_shapes().items()  # zeros: biases that come with those that the adapter adds
    }
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        cure = "float16 ends at 65504: use bfloat16 or float32" if dtype == torch.float16 else "the adapter is damaged"
        raise CannotMerge(f"{bad[0]} is not finite after the merge ({len(bad)} weights); {cure}")
    return tensors, tuple(layers), config


def _folded(model: Llama, adapter: Adapter) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Yield (name, W, W + D) of every weight, and (name, None, b) of every bias, that the adapter changes."""
    on: dict[str, list[str]] = {}  # a Linear may be edited at its output and, by another part, at its input
    for place in adapter.deltas:
        on.setdefault(weight_path(place), []).append(place)
    for path, places in on.items():
        host = model.get_submodule(path)
        weight, bias = getattr(host, "weight", None), getattr(host, "bias", None)
        if not isinstance(weight, Tensor):
            raise CannotMerge(
                f"{places[0]}: {adapter.kind} acts where there is no weight: keep the adapter beside its base"
            )
        if (quant := getattr(host, "quant", None)) is not None:
            raise CannotMerge(
                f"{path}: its weight is quantized ({quant.kind}), and a delta folded in would be rounded away: keep "
                "the adapter beside its base"
            )
        wide = weight.detach().double()  # so that W + D - W gives D back
        new, shift = wide, None if bias is None else bias.detach().double()
        for place in places:
            new, shift = adapter.deltas[place].fold(new, shift)
        yield f"{path}.weight", wide, new.detach()
        if shift is not None:
            yield f"{path}.bias", None, shift.detach()


# family -> (linears, flags of ModelConfig): biases that a key of its config.json switches on, all of them at once
_BIASES: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "llama": (
        (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_bias", "o_bias")),
        (("gate_proj", "up_proj", "down_proj"), ("mlp_bias",)),
    ),
    "qwen3": ((("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_bias", "o_bias")),),
}


def _with_biases(config: ModelConfig, folded: Collection[str], kind: str) -> ModelConfig:
    """The configuration with the biases that a merge adds. Raises CannotMerge where the family cannot have them."""
    for name in folded:
        if not name.endswith(".bias") or name in config.weight_shapes():
            continue
        module = name.split(".")[-2]
        flags = next((flags for linears, flags in _BIASES.get(config.model_type, ()) if module in linears), None)
        if flags is None:
            raise CannotMerge(
                f"{name}: {kind} adds a bias, which a {config.model_type} model cannot have there: keep the adapter "
                "beside its base"
            )
        added: dict[str, Any] = dict.fromkeys(flags, True)
        config = replace(config, **added)
    return config


def _loss(name: str, weight: Tensor, whole: Tensor, dtype: torch.dtype) -> LayerLoss:
    delta, arrived, plain = whole - weight, whole.to(dtype).double(), weight.to(dtype).double()
    size = float(delta.norm())
    if size == 0:
        return LayerLoss(name, 0.0, 0.0, 1.0, 0.0)
    return LayerLoss(
        name,
        delta=size / max(float(weight.norm()), 1e-300),
        lost=float((arrived - whole).norm()) / size,
        survived=float(((arrived - plain) * delta).sum()) / size**2,
        changed=float((arrived != plain).double().mean()),
    )


def _output_dtype(model: Llama, name: str) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype: {name!r} is not known; use auto, {', '.join(DTYPES)}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return narrowest([parameters[key] for key in model.config.weight_shapes()])


def narrowest(tensors: Collection[Tensor]) -> torch.dtype:
    """The first of bfloat16, float16 and float32 that holds all of these exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in tensors):
            return dtype
    return torch.float32


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder in Hugging Face's layout; `also` goes into config.json."""
    name = str(dtype).removeprefix("torch.")
    said = config.to_hf()
    atomic_write_json(folder / "config.json", {**said, "dtype": name, "torch_dtype": name, **(also or {})})
    eos = list(tokenizer.eos_ids) or list(config.eos_token_ids)
    ends = {"bos_token_id": said["bos_token_id"], "eos_token_id": eos or None, "pad_token_id": said["pad_token_id"]}
    atomic_write_json(
        folder / "generation_config.json", {key: value for key, value in ends.items() if value is not None}
    )
    atomic_save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    tokenizer.save(folder)


def _compare(
    model: Llama, adapter: Adapter, folder: Path, probe: Probe, layers: tuple[LayerLoss, ...], dtype: torch.dtype
) -> MergeReport:
    """Load what was written and hold it against base + adapter, in the base's own dtype."""
    trained = logits_at(model, probe, (adapter.name,)).double().log_softmax(-1)
    base = logits_at(model, probe, ()).double().log_softmax(-1)
    merged = logits_at(load_model(folder, dtype=model.dtype, device=model.device), probe, ()).double().log_softmax(-1)
    return MergeReport(
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        top1_agreement=float((trained.argmax(-1) == merged.argmax(-1)).double().mean()),
        kl=_kl(trained, merged),
        kl_base=_kl(trained, base),
    )


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())
