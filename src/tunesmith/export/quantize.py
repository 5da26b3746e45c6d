"""Write a quantized copy of a model: a Hugging Face folder that loads as it is, here and in transformers.

open weights -> tensor by tensor: quantize the linears of the blocks, copy the rest -> model.safetensors, config.json,
tokenizer, COMPLETE with every file's SHA-256
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.export.gptq import Gptq, quantize_gptq
from tunesmith.export.hf import DTYPES, narrowest, write_model
from tunesmith.files import atomic_folder
from tunesmith.model.load import Held, Weights, is_block_linear, load_model, model_identity, open_weights
from tunesmith.model.quantize import block_linears
from tunesmith.quant.files import quantization_config, to_tensors
from tunesmith.quant.storage import Spec, quantize_weight
from tunesmith.tokenizer import load_tokenizer

Quantizer = Callable[[str, Tensor], Held]


def quantize_model(
    path: Path, out: Path, spec: Spec, *, dtype: str = "auto", force: bool = False, by: Quantizer | None = None
) -> dict[str, Any]:
    """Write the model at `path`, its blocks' linears quantized by `spec`, to the folder `out`; returns what it holds.

    `dtype` is that of the other weights (auto: float32 only where they need it). `by` makes each weight's numbers
    instead of rounding to nearest. Raises ModelError, ConfigError for an `out` that is there.
    """
    path, out = Path(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ConfigError(f"--out: {out} is there already; choose another folder, or --force to replace it")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    if spec.kind in ("keep", "none"):
        raise ConfigError(f"--kind: {spec.kind} quantizes nothing; choose nf4 or another code")
    tokenizer = load_tokenizer(path)
    weights = open_weights(path)
    try:
        if weights.kind == "safetensors" and weights.quantized:
            raise ModelError(f"{path}: is quantized already; quantize the original")
        tensors, chosen, bits = _tensors(weights, spec, dtype, by)
    finally:
        weights.close()
    name = str(chosen).removeprefix("torch.")
    with atomic_folder(out) as folder:
        made_from = {"name": str(path), "sha256": model_identity(path)["sha256"]}
        said = {"quantization_config": quantization_config(spec, name), "quantized_from": made_from}
        write_model(folder, weights.config, tensors, tokenizer, chosen, said)
        size = (folder / "model.safetensors").stat().st_size
    return {"out": str(out), "kind": spec.kind, "dtype": name, "bits_per_weight": bits, "file_bytes": size}


def calibrated(path: Path, text: Path, settings: Gptq, windows: int, length: int = 2048) -> Quantizer:
    """A quantizer that has seen the first `windows` of `length` tokens of a text file run through the model at `path`.

    Raises DataError for a text that cannot be read, ConfigError for one shorter than a window.
    """
    try:
        words = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from None
    model = load_model(path)
    ids = load_tokenizer(path).encode(words)
    length = min(length, model.config.max_position_embeddings)
    starts = range(0, len(ids) - length + 1, length)[:windows]
    quantize_gptq(model, [ids[start : start + length] for start in starts], settings)
    linears = dict(block_linears(model))

    def held(name: str, weight: Tensor) -> Held:
        linear = linears[name.removesuffix(".weight")]
        if linear.quant is None:
            raise ModelError(f"{name} was not quantized")
        return linear.weight.detach(), linear.quant

    return held


def _tensors(
    weights: Weights, spec: Spec, dtype: str, by: Quantizer | None
) -> tuple[dict[str, Tensor], torch.dtype, float]:
    """All tensors of the file, the dtype of the dense ones, and the bits that a quantized weight takes."""
    held: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    bits, count = 0.0, 0
    for name in weights.config.weight_shapes():
        if name not in weights.shapes:
            raise ModelError(f"{weights.path}: {name} is missing; is the download complete?")
        tensor = weights.read(name, torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{weights.path}: {name} holds NaN or infinity; the file is damaged")
        if not is_block_linear(name):
            dense[name] = tensor
            continue
        packed, storage = by(name, tensor) if by else quantize_weight(tensor, spec, f"{weights.path}: {name}")
        held |= to_tensors(name, packed, storage)
        bits, count = bits + storage.bits(packed) * tensor.numel(), count + tensor.numel()
    chosen = DTYPES[dtype] if dtype != "auto" else narrowest(dense.values())
    return {**held, **{name: tensor.to(chosen) for name, tensor in dense.items()}}, chosen, bits / count
