"""A model without numbers, on torch's meta device: what memory is planned and parameters are counted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.load import Held, kept_in_bits, open_weights
from tunesmith.model.quantize import block_linears
from tunesmith.quant.storage import Spec, quantize_weight


def load_shapes(path: Path, dtype: torch.dtype = torch.float32, quant: Spec | None = None) -> Llama:
    """What `load_model` returns, on the meta device: shapes and types without numbers. Raises ModelError."""
    weights = open_weights(path)
    try:
        kept = {name: weights.held(name) for name in kept_in_bits(weights, quant)}
    finally:
        weights.close()
    return shapes_of(weights.config, dtype, None if kept else quant, kept)


def shapes_of(
    config: ModelConfig, dtype: torch.dtype, quant: Spec | None = None, held: Mapping[str, Held] | None = None
) -> Llama:
    """A model of these sizes on the meta device, frozen; its block linears quantized, or `held` as they are given."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for name, linear in block_linears(model):
        if held and f"{name}.weight" in held:
            packed, storage = held[f"{name}.weight"]
            linear.hold(packed.to("meta"), storage.to("meta"), wide)
        elif quant is not None and quant.kind != "keep":
            kind = "int8" if quant.kind == "llm-int8" else quant.kind  # outliers are few, and known with numbers only
            weight = linear.weight.to(wide)
            linear.hold(*quantize_weight(weight, replace(quant, kind=kind), f"{name}.weight"), wide)
    return model.requires_grad_(False).eval()
