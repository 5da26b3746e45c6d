"""Quantizing a model: which weights, how many bits they hold, and while it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.laws.small import build
from tests.model.checkpoints import reference

from tunesmith.errors import ModelError
from tunesmith.model.load import load_model, model_identity
from tunesmith.model.quantize import block_linears, held_weights, quantize, resident_bits
from tunesmith.model.shadow import shapes_of
from tunesmith.model.shapes import shape
from tunesmith.quant.storage import Spec
from tunesmith.train.memory import block_weights


def checkpoint(path: Path, poison: str | None = None) -> Path:
    """A small random LLaMA on disk, one weight of `poison` not a number."""
    model = reference("llama")
    with torch.no_grad():
        if poison is not None:
            model.get_parameter(poison)[1, 1] = float("nan")
    model.save_pretrained(path)
    return path


def test_the_linears_of_the_blocks_and_nothing_else() -> None:
    model, dense = quantize(build(), Spec("nf4", 32)), build()
    held = {f"{name}.weight" for name, _ in block_linears(model)}
    assert {name for name, p in model.named_parameters() if p.dtype == torch.uint8} == held
    assert held == {name for name, p in dense.named_parameters() if name.endswith("_proj.weight")}
    for name, p in dense.named_parameters():
        assert name in held or torch.equal(p, model.get_parameter(name))
    assert held_weights(model) == block_weights(model.config) == sum(dense.get_parameter(n).numel() for n in held)


def test_a_65b_model_in_4_bits_takes_34_46_gb() -> None:
    """arXiv:2305.14314's model: 4.127 bits a weight of the blocks, the rest in 16."""
    model = shapes_of(shape("llama-65b"), torch.bfloat16, Spec("nf4"))
    assert sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e9 == pytest.approx(
        34.46, abs=0.01
    )


def test_measured_bits_are_the_tensors_own() -> None:
    model = quantize(build(), Spec("nf4", 32, double_quant=False))
    assert resident_bits(model) == 4 + 32 / 32
    assert resident_bits(build(dtype=torch.bfloat16)) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_while_loaded_is_quantized_after(tmp_path, dtype: torch.dtype) -> None:
    """Codes come from the file's weights, whatever dtype the rest is held in."""
    folder = checkpoint(tmp_path)
    loaded = load_model(folder, dtype=dtype, quant=Spec("nf4", 32))
    after = quantize(load_model(folder), Spec("nf4", 32))
    assert loaded.dtype == dtype
    for (name, one), (_, other) in zip(block_linears(loaded), block_linears(after), strict=True):
        assert torch.equal(one.weight, other.weight) and not one.weight.requires_grad, name
        assert torch.equal(one.dense_weight(torch.float32), other.dense_weight(torch.float32)), name


def test_identity_says_how_it_is_quantized(tmp_path) -> None:
    folder = checkpoint(tmp_path)
    plain, held = model_identity(folder), model_identity(folder, Spec("nf4"))
    assert held == {**plain, "quant": {"kind": "nf4", "block_size": 64, "double_quant": True}}


def test_nan_is_named_before_it_is_quantized(tmp_path) -> None:
    folder = checkpoint(tmp_path, poison="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_model(folder, quant=Spec("nf4", 32))
