"""Fold an adapter into the weights of its base, and say of each weight what rounding to the output type took away.

W + D in float64 -> R(W + D), R the rounding to the output type
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.adapters.base import weight_path
from tunesmith.errors import CannotMerge
from tunesmith.model.config import ModelConfig
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama

Rounding = Callable[[str, Tensor], Tensor]  # (name, weight) -> what a file of the output type holds of it, in float64
Originals = Callable[[str], Tensor]  # name -> the weight before it was trained


@dataclass(frozen=True)
class LayerLoss:
    """What rounding did to one weight W and its delta D; R is the rounding to the output type.

    `delta` = |D| / |W|;  `lost` = |R(W + D) - (W + D)| / |D|;  `survived` = <R(W + D) - R(W), D> / |D|^2, 1 where the
    delta arrived whole and 0 where nothing of it did;  `changed`: share of the elements with R(W + D) != R(W).
    """

    name: str
    delta: float
    lost: float
    survived: float
    changed: float


def merged_weights(
    model: Llama,
    adapter: Adapter | None,
    dtype: torch.dtype,
    *,
    rounding: Rounding | None = None,
    dequantize: bool = False,
    originals: Originals | None = None,
) -> tuple[dict[str, Tensor], tuple[LayerLoss, ...], ModelConfig]:
    """Return weights in `dtype` (on the CPU) with the adapter folded in, what each layer lost, and the config.

    `rounding` is what a layer's loss is measured by (default: to `dtype`). Linears that hold few bits become what their
    bits stand for; to fold into those is refused, unless `dequantize` says that it is meant. `originals` gives the
    weights that a method trained in place, as they were: D is the difference. Head and embedding are untied where the
    adapter changes one of them. Raises CannotMerge where a delta cannot be folded.
    """
    rounds = rounding or (lambda _, weight: weight.to(dtype).double())
    changed, layers = {}, []
    for name, weight, whole in _folded(model, adapter, dequantize):
        changed[name] = whole.to(dtype).cpu()
        if weight is not None:
            layers.append(_loss(name, weight, whole, rounds))
    if adapter is not None and originals is not None:
        for name, parameter in adapter.base.items():
            layers.append(_loss(name, originals(name).double(), parameter.detach().cpu().double(), rounds))
    config = model.config if adapter is None else _with_biases(model.config, changed, adapter.kind)
    if config.tie_word_embeddings and not changed.keys().isdisjoint({"lm_head.weight", "model.embed_tokens.weight"}):
        config = replace(config, tie_word_embeddings=False)
    tensors = {
        name: changed[name] if name in changed else _own(model, name, shape, dtype)
        for name, shape in config.weight_shapes().items()
    }
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        cure = "float16 ends at 65504: use bfloat16 or float32" if dtype == torch.float16 else "the adapter is damaged"
        raise CannotMerge(f"{bad[0]} is not finite after the merge ({len(bad)} weights); {cure}")
    return tensors, tuple(layers), config


def _own(model: Llama, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The model's own tensor of this name; zeros for a bias that came with those that an adapter adds."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, Linear):
        return module.dense_weight().detach().to("cpu", dtype)
    tensor = getattr(module, leaf, None)
    return tensor.detach().to("cpu", dtype) if isinstance(tensor, Tensor) else torch.zeros(shape, dtype=dtype)


def _folded(model: Llama, adapter: Adapter | None, dequantize: bool) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Yield (name, W, W + D) of every weight, and (name, None, b) of every bias, that the adapter changes."""
    if adapter is None:
        return
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
        if isinstance(host, Linear) and host.quant is not None:
            if not dequantize:
                raise CannotMerge(
                    f"{path}: its weight is quantized ({host.quant.kind}), and a delta folded in would be rounded "
                    "away: keep the adapter beside its base, or merge onto the 16-bit base with --onto"
                )
            weight = host.dense_weight(torch.float32)
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


def _with_biases(config: ModelConfig, changed: Collection[str], kind: str) -> ModelConfig:
    """The configuration with the biases that a merge adds. Raises CannotMerge where the family cannot have them."""
    for name in changed:
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


def _loss(name: str, weight: Tensor, whole: Tensor, rounds: Rounding) -> LayerLoss:
    delta, arrived, plain = whole - weight, rounds(name, whole), rounds(name, weight)
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
