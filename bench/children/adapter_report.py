"""Held-out loss of adapters under full and sparse attention, one after another (bench/adapter_report.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.children.common import spec, tell
from bench.children.rate_worker import attempt
from bench.children.trial import Bench, prepare
from tunesmith.config import AttentionSettings
from tunesmith.data.encode import Example
from tunesmith.hardware import describe
from tunesmith.model.layout import Layout
from tunesmith.model.sparse import Pattern, count_pairs, pattern_of


def main() -> None:
    """Carry out every case of the specification, and tell of each as it ends."""
    wanted = spec()
    bench = prepare(wanted)
    found = describe()
    tell("about", about={
        "cpu": found["cpu"], "memory": found["memory"], "system": found["system"],
        "versions": {"tunesmith": found["tunesmith"], "commit": found["revision"], "python": found["python"],
                     "torch": torch.__version__},
    }, longest=bench.data.train.report.longest)  # fmt: skip
    for case in wanted["cases"]:
        tell("case", **case, **carry_out(bench, case))


def carry_out(bench: Bench, case: Mapping[str, Any]) -> dict[str, Any]:
    """Train and measure with the case's attention; the base is then as it was."""
    settings = AttentionSettings(**case["attention"]) if case["attention"] else None
    model = bench.loaded.model
    model.pattern = pattern_of(settings, model.config.num_key_value_heads)
    share = share_of_pairs(bench.data.train.examples, model.pattern, model.config.num_key_value_heads)
    began = time.process_time()
    done = attempt(bench, case["adapter"], case["rate"])
    model.pattern = None
    return {**done, "cpu_s": round(time.process_time() - began, 1), "pairs": share}


def share_of_pairs(examples: Sequence[Example], pattern: Pattern | None, kv_heads: int) -> float:
    """Pairs that a head sees of those that full attention sees, over all examples."""
    if pattern is None:
        return 1.0
    layout = Layout.of([len(example.ids) for example in examples])
    seen = sum(
        (high - low) * count_pairs(layout.tiles(None, rule))
        for low, high, part in pattern.split(kv_heads)
        for rule in part.rules
    )
    return seen / kv_heads / count_pairs(layout.tiles())


if __name__ == "__main__":
    main()
