"""Where the time of Tunesmith's step goes: torch.profiler's own times, sorted into parts by a table.

An operation belongs to the part whose pattern fits it or, failing that, the nearest of the calls around it: a product
within attention is attention's. What no operation accounts for is Python's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.children.common import spec, tell

# In this order: the first pattern that fits a call, or the nearest call around it, decides.
ENCLOSING = (
    ("packing", r"^bench: packing"),
    ("optimizer and clipping", r"^bench: update|^Optimizer"),
    ("head and loss", r"Loss|cross_entropy|log_softmax|nll"),
    ("attention", r"Atten|_Native|tiled|scaled_dot"),
    ("norms, rotary, SwiGLU", r"RMSNorm|Rotate|SwiGLU|Norm|silu"),
)
ALONE = (
    ("linears", r"\b(mm|addmm|linear|matmul|_linear_pointwise|mkldnn_linear)\b|mkldnn"),
    ("attention", r"\b(bmm|baddbmm|softmax|_softmax)\b"),
    ("embedding, sums, copies", r"^aten::|^torch::"),
)
PYTHON = "Python and what the profiler does not see"


def main() -> None:
    """Time some steps, profile one, and tell."""
    wanted = spec()
    import torch
    from torch.profiler import ProfilerActivity

    trainer, rows = build(wanted)
    packs = trainer._packs(rows)
    trainer._step()  # buffers, thread pools and compiled parts are there from now on
    times = []
    for _ in range(wanted["steps"]):
        began = time.perf_counter()
        trainer._step()
        times.append(time.perf_counter() - began)
        trainer.progress.step = 0  # the same rows again
    step = sorted(times)[len(times) // 2]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        trainer._step()
        wall = (time.perf_counter() - began) * 1e3
    parts = sort(profiler.events())
    parts[PYTHON] = max(0.0, wall - sum(parts.values()))
    config = trainer.model.config
    ceiling = ceiling_seconds(
        config, wanted["gflops"], sum(len(p.tokens) for p in packs), sum(len(p.where) for p in packs)
    )
    tokens = sum(len(row.ids) for row in rows)
    tell(
        "profile",
        parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
        step_s=step,
        ceiling_s=ceiling,
        share=ceiling / step,
        tokens=tokens,
        distinct_tokens=sum(len(p.tokens) for p in packs),
        tokens_per_s=tokens / step,
    )


def build(wanted: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """A Trainer as `tunesmith train` makes it, whose packing and update are marked for the profiler; and its rows."""
    from torch.profiler import record_function

    from tunesmith.config import load_run
    from tunesmith.footprint import chosen, work_of
    from tunesmith.model import allocator
    from tunesmith.prepare import attach_adapter, load_base, load_data, template_for
    from tunesmith.train.loop import Trainer
    from tunesmith.train.steps import make_plan

    class Marked(Trainer):
        """The Trainer, its parts under names."""

        def batch(self, step: int) -> list[int]:
            return super().batch(0)

        def _packs(self, rows: Any) -> Any:
            with record_function("bench: packing"):
                return super()._packs(rows)

        def _update(self, rate: float, updates: int) -> float:
            with record_function("bench: update"):
                return super()._update(rate, updates)

    class Silent:
        """A reporter that reports nothing."""

        def step(self, values: Any) -> None:
            return

        def say(self, line: str) -> None:
            return

    flags = {"model.path": wanted["model"], "data.train": wanted["rows"], **wanted["settings"]}
    run, _ = load_run(None, [], flags)
    allocator.use()  # as the command does
    loaded = load_base(run.model)
    loaded.template = template_for(run, loaded.tokenizer)
    data = load_data(run, loaded.tokenizer, loaded.template)
    adapter = attach_adapter(run, loaded)
    choice = chosen(work_of(run, data.train.examples, loaded.tokenizer.encode, loaded.path))
    plan = make_plan(
        run.train, len(data.train.examples), learning_rate=run.train.learning_rate or 1e-4,
        pack_tokens=choice.pack_tokens, dropout=False, eval_steps=None,
    )  # fmt: skip
    trainer = Marked(loaded.model, adapter, data.train.examples, run.train, plan, Path(wanted["out"]), Silent())
    loaded.model.train()
    return trainer, [data.train.examples[i] for i in trainer.batch(0)]


def sort(events: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of each part, from the own time of every call."""
    parts: dict[str, float] = {}
    for event in events:
        own = event.self_cpu_time_total / 1e3
        if own > 0:
            part = part_of(event)
            parts[part] = parts.get(part, 0.0) + own
    return parts


def part_of(event: Any) -> str:
    """The part that a call belongs to."""
    around = event
    while around is not None:
        for part, pattern in ENCLOSING:
            if re.search(pattern, around.name):
                return part
        around = around.cpu_parent
    for part, pattern in ALONE:
        if re.search(pattern, event.name):
            return part
    return PYTHON


def ceiling_seconds(config: Any, gflops: dict[str, float], tokens: int, targets: int) -> float:
    """Seconds that the step's products must take at the measured speeds: W x and W^T dy of every frozen linear.

    Tokens that examples share count once; the head counts for targets only. Attention's products and LoRA's own are
    left out, so the share that is reached is stated too low rather than too high.
    """
    d, f, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    work = {"attention": (2 * d * q + 2 * d * k) * layers, "up": 2 * d * f * layers, "down": d * f * layers}
    seconds = sum(4 * size * tokens / (gflops[name] * 1e9) for name, size in work.items())
    return seconds + 4 * d * vocab * targets / (gflops["head"] * 1e9)


if __name__ == "__main__":
    main()
