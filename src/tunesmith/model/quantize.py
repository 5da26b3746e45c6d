"""Put the linears of a model's blocks into a storage of few bits. Embedding, head and norms stay as they are."""

from __future__ import annotations

from collections.abc import Iterator

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
            linear.hold(*quantize_weight(linear.weight, spec, f"{name}.weight"))
    return model


def resident_bits(model: Llama) -> float:
    """Bits a parameter that the linears of the blocks hold in memory, measured on their tensors."""
    bits, count = 0.0, 0
    for _, linear in block_linears(model):
        size = linear.in_features * linear.out_features
        held = 8 * linear.weight.element_size() * linear.weight.numel()
        bits += held if linear.quant is None else linear.quant.bits(linear.weight) * size
        count += size
    return bits / count
