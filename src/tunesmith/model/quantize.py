"""Put the linears of a model's blocks into a storage of few bits. Embedding, head and norms stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tunesmith.config import QuantSection, validate_section
from tunesmith.errors import ConfigError
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.quant.storage import Spec, quantize_weight


def block_linears(model: Llama) -> Iterator[tuple[str, Linear]]:
    """Every Linear of the decoder blocks with its name: what a quantized base has quantized."""
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, Linear):
            yield name, module


def quantize(model: Llama, spec: Spec) -> Llama:
    """Quantize the linears of `model` in place, one at a time, and return it. Raises ModelError.

    A weight that is quantized already, or that trains, is refused by name.
    """
    for name, linear in block_linears(model):
        if linear.quant is None:
            wide = torch.promote_types(linear.weight.dtype, torch.float32)
            linear.hold(*quantize_weight(linear.weight, spec, f"{name}.weight"), wide)
    return model


def spec_of(quant: QuantSection) -> Spec | None:
    """A `quant` section as the storages take it; None where nothing is quantized."""
    return None if quant.kind == "none" else Spec(quant.kind, quant.block_size, quant.double_quant)


def quant_of(identity: Mapping[str, Any] | None, where: str) -> Spec | None:
    """How the base of a `model_identity` is quantized. Raises ConfigError for what is no such setting."""
    said = (identity or {}).get("quant")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ConfigError(f"{where}: quant should be an object, not {str(said)[:60]!r}")
    return spec_of(validate_section(QuantSection, said, f"{where}: quant"))


def resident_bits(model: Llama) -> float:
    """Bits a weight that the linears of the blocks hold in memory, measured on their tensors."""
    held = [(_bits(linear), linear.in_features * linear.out_features) for _, linear in block_linears(model)]
    return sum(bits * size for bits, size in held) / sum(size for _, size in held)


def held_weights(model: Llama) -> int:
    """How many weights the storages stand for: their Parameters are bytes, which nobody counts as parameters."""
    return sum(m.in_features * m.out_features for _, m in block_linears(model) if m.quant is not None)


def _bits(linear: Linear) -> float:
    held = 8.0 * linear.weight.element_size()
    return held if linear.quant is None else linear.quant.bits(linear.weight)
