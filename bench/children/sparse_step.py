"""One sequence of one length under one attention: time of attention and of a LoRA step, and the step's peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.children.common import spec, tell, timed
from tunesmith.adapters import attach
from tunesmith.config import AttentionSettings
from tunesmith.hardware import describe
from tunesmith.model.attention import attend
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.native import select
from tunesmith.model.shapes import shape
from tunesmith.model.sparse import Pattern, count_products, pattern_of
from tunesmith.train.memory import resident_memory

VOCABULARY = 256  # the head is no part of this
LORA = {"kind": "lora", "rank": 8, "target_modules": ["q_proj", "v_proj"]}


def main() -> None:
    """Measure what the specification asks for, and tell."""
    wanted = spec()
    torch.set_num_threads(wanted["threads"])
    kernels, _ = select("auto")
    settings = AttentionSettings(**wanted["attention"]) if wanted["attention"] else None
    model = random_model(wanted)
    pattern = pattern_of(settings, model.config.num_key_value_heads)
    model.pattern = pattern
    step = step_of(model, wanted["length"])
    step()  # caches, and memory that is asked for once
    held, _ = resident_memory()
    seconds = [timed(step) for _ in range(wanted["repeats"])]
    _, peak = resident_memory()
    alone = attention_of(model, wanted["length"], pattern)
    alone()
    found = describe()
    tell(
        "sparse", step_s=median(seconds), peak_bytes=peak, held_bytes=held, kernels=kernels,
        attention_s=median(timed(alone) for _ in range(wanted["repeats"])),
        **counts(wanted["length"], pattern, model.config.num_key_value_heads),
        about={
            "cpu": found["cpu"], "memory": found["memory"], "system": found["system"],
            "versions": {"tunesmith": found["tunesmith"], "commit": found["revision"], "python": found["python"],
                         "torch": torch.__version__},
        },
    )  # fmt: skip


def random_model(wanted: Mapping[str, Any]) -> Llama:
    """The first layers of a model of the named shape, with random weights and a LoRA, ready to train."""
    config = replace(shape(wanted["shape"]), num_hidden_layers=wanted["layers"], vocab_size=VOCABULARY)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").to(getattr(torch, wanted["dtype"]))
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else parameter.fill_(1)
    model.requires_grad_(False)
    attach(model, LORA)
    return model.train()


def step_of(model: Llama, length: int) -> Callable[[], None]:
    """Forward and backward of one sequence; the loss is a sum of squares, so that no head takes part."""
    tokens = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))

    def step() -> None:
        ctx = model.context(Layout.single(length))
        model.run(tokens, ctx).float().square().mean().backward()

    return step


def attention_of(model: Llama, length: int, pattern: Pattern | None) -> Callable[[], None]:
    """Forward and backward of one layer's attention alone; its tiles are cut once, as for all layers of a step."""
    config, layout = model.config, Layout.single(length)
    draw = torch.Generator().manual_seed(length)

    def drawn(heads: int) -> Tensor:
        return torch.randn(length, heads, config.head_dim, generator=draw).to(model.dtype)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    given, grad = [drawn(n).requires_grad_() for n in (heads, kv_heads, kv_heads)], drawn(heads)

    def run() -> None:
        torch.autograd.grad(attend(*given, layout, None, pattern), given, grad)

    return run


def counts(length: int, pattern: Pattern | None, kv_heads: int) -> dict[str, float]:
    """Of one head on the average: pairs that are seen, and scores that are computed for them."""
    layout = Layout.single(length)
    if pattern is None:
        return {"pairs": length * (length + 1) / 2, "products": count_products(layout.tiles())}
    seen = pattern.pairs(length)
    made = [sum(count_products(layout.tiles(None, rule)) for rule in part.rules) for part in pattern.fields]
    heads = [high - low for low, high, _ in pattern.split(kv_heads)]
    return {
        "pairs": sum(n * h for n, h in zip(seen, heads, strict=True)) / kv_heads,
        "products": sum(n * h for n, h in zip(made, heads, strict=True)) / kv_heads,
    }


if __name__ == "__main__":
    main()
