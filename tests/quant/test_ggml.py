"""GGUF's own blocks: bit for bit the gguf library's numbers, and a file that is trained on without being expanded."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.laws.small import logits_of, sample_row
from tests.model.checkpoints import reference, write_gguf

from tunesmith.errors import ModelError
from tunesmith.model import native
from tunesmith.model.load import load_model
from tunesmith.model.product import dense, product
from tunesmith.model.quantize import block_linears, resident_bits
from tunesmith.quant.ggml import KINDS, Ggml
from tunesmith.quant.storage import Spec

BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}


def packed_rows(kind: str, rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, np.ndarray]:
    """A random weight in blocks of this kind, and what the gguf library reads there."""
    weight = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    weight[3, :32] = 0
    quant = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(weight, quant)
    return torch.from_numpy(raw).view(rows, -1), gguf.dequantize(raw, quant)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_it_reads_what_the_gguf_library_reads(kind: str, kernels: str) -> None:
    packed, expected = packed_rows(kind)
    storage = Ggml(kind, expected.shape)
    native.select(kernels)
    try:
        assert np.array_equal(dense(packed, storage, torch.float32).numpy(), expected)
        x = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(0))
        truth = x.double() @ torch.from_numpy(expected).double().T
        assert (product(x, packed, storage) - truth).abs().max() < 1e-6 * truth.abs().max()
        half = dense(packed, storage, torch.bfloat16)
        assert torch.equal(half, torch.from_numpy(expected).bfloat16())
    finally:
        native.select("auto")
    assert storage.bits(packed) == BITS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_kept_is_the_file_expanded(kind: str, tmp_path: Path) -> None:
    """The rows of q and k are reordered in their packed form."""
    model = reference("llama")
    write_gguf(tmp_path / "m.gguf", model, quant=kind)
    kept, expanded = load_model(tmp_path / "m.gguf", quant=Spec("keep")), load_model(tmp_path / "m.gguf")
    assert resident_bits(kept) == BITS[kind]
    for (name, one), (_, other) in zip(block_linears(kept), block_linears(expanded), strict=True):
        assert torch.equal(one.dense_weight(), other.weight), name
    found, expected = (logits_of(m, *sample_row()) for m in (kept, expanded))
    assert torch.equal(found, expected)


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", reference("llama"), quant="F16")
    with pytest.raises(ModelError, match=r"keep knows Q4_0, Q4_1 and Q8_0; .* is stored as F16 \(21 such weights\)"):
        load_model(tmp_path / "m.gguf", quant=Spec("keep"))


def test_scales_of_nan_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, reference("llama"), quant="Q8_0")
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.reshape(-1)[:2] = [0, 0x7E]  # float16's NaN
    reader.data.flush()
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_model(file, quant=Spec("keep"))
