"""One way of holding a base: perplexity of a text, bits that are resident, and what reading and training cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from bench.children.common import spec, tell, timed
from tunesmith.adapters import attach
from tunesmith.data.catalog import resolve_model
from tunesmith.export.gptq import Gptq, quantize_columns, quantize_gptq
from tunesmith.hardware import describe
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.native import select
from tunesmith.model.quantize import block_linears, quantize, resident_bits
from tunesmith.quant.storage import Spec
from tunesmith.tokenizer import load_tokenizer

LORA = {"kind": "lora", "rank": 8}


def main() -> None:
    """Measure what the specification asks for, and tell."""
    wanted = spec()
    torch.set_num_threads(wanted["threads"])
    kernels, _ = select("auto")
    path = resolve_model(wanted["model"])
    if wanted["part"] == "perplexity":
        found = perplexity_of(path, wanted)
    else:
        found = speed_of(path, wanted)
    about = describe()
    versions = {"tunesmith": about["tunesmith"], "commit": about["revision"], "torch": torch.__version__}
    tell(
        "quant", kernels=kernels, **found,
        about={"cpu": about["cpu"], "memory": about["memory"], "system": about["system"], "versions": versions},
    )  # fmt: skip


def windows_of(path: Path, wanted: dict[str, Any], file: str) -> list[list[int]]:
    """The first windows of a text: no BOS, one after the other, what is left over dropped."""
    ids = load_tokenizer(path).encode(Path(file).read_text(encoding="utf-8"))
    length, count = wanted["length"], wanted["windows"]
    starts = range(0, len(ids) - length + 1, length)[:count]
    if len(starts) < count:
        raise SystemExit(f"{file} holds {len(ids)} tokens: too few for {count} windows of {length}")
    return [ids[start : start + length] for start in starts]


def perplexity_of(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """exp of the mean loss over the predicted tokens of all windows, and the resident bits."""
    held = wanted["held"]
    model = load_model(path, quant=Spec(**held["spec"]) if held and "spec" in held else None)
    if held and "gptq" in held:
        windows = windows_of(path, {**wanted, "windows": wanted["calibration_windows"]}, wanted["calibration"])
        quantize_gptq(model, windows, Gptq(**held["gptq"]))
    if held and "nearest" in held:
        for name, linear in block_linears(model):  # inputs that have nothing to do with one another: no error is moved
            apart = torch.eye(linear.in_features)
            linear.hold(*quantize_columns(linear.weight.float(), apart, Gptq(**held["nearest"]), name))
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows_of(path, wanted, wanted["text"]):
            tokens = torch.tensor(ids)
            ctx = model.context(Layout.single(len(ids)))
            hidden = model.run(tokens, ctx)[:-1]
            for rows, logits in model.logits_in_parts(hidden, ctx):
                total += float(functional.cross_entropy(logits, tokens[1:][rows], reduction="sum"))
            count += len(ids) - 1
    return {"perplexity": math.exp(total / count), "predicted_tokens": count, "bits": resident_bits(model)}


def speed_of(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a LoRA step on a dense and on the quantized base, in turn, and GB/s of reading the largest linear."""
    dtype, spec_ = getattr(torch, wanted["dtype"]), Spec(**wanted["held"]["spec"])
    steps = {}
    for name, quant in (("dense", None), ("quantized", spec_)):
        model = load_model(path, dtype=dtype, quant=quant)
        attach(model, LORA)
        steps[name] = step_of(model.train(), wanted["length"])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(wanted["repeats"]):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {
        "step_s": {name: median(found) for name, found in seconds.items()},
        "ratio": median(a / b for a, b in zip(seconds["quantized"], seconds["dense"], strict=True)),
        **reading(path, dtype, spec_, wanted["repeats"]),
    }


def step_of(model: Llama, length: int) -> Callable[[], None]:
    """Forward and backward of one row of random tokens, without a head."""
    tokens = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        ctx = model.context(Layout.single(length))
        model.run(tokens, ctx).float().square().mean().backward()

    return step


def reading(path: Path, dtype: torch.dtype, quant: Spec, repeats: int) -> dict[str, float]:
    """GB/s of what is written: all linears of the first blocks made dense, and the same matrices copied."""
    model = load_model(path, dtype=dtype)
    held = quantize(load_model(path, dtype=dtype), quant)
    dense = [linear.weight for _, linear in block_linears(model)]
    packed = [linear for _, linear in block_linears(held)]
    written = sum(w.numel() * w.element_size() for w in dense) / 1e9

    def copy() -> None:
        for weight in dense:
            weight.clone()

    def read() -> None:
        for linear in packed:
            linear.dense_weight(dtype)

    copy(), read()
    pairs = [(timed(copy), timed(read)) for _ in range(repeats)]
    return {"copy_gbps": written / median(a for a, _ in pairs), "read_gbps": written / median(b for _, b in pairs)}


if __name__ == "__main__":
    main()
