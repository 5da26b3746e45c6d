"""Tries (adapter, learning rate) after (adapter, learning rate) on one base, as its parent asks on standard input.

A line in: {"adapter": {...} or null for the bare base, "rate": 3e-4}. A line out: what came of it. It ends with its
input, so that a killed parent leaves nothing behind but the pair at hand.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from bench.children.common import spec, tell
from bench.children.trial import Bench, attach, prepare, take_off, train
from tunesmith.errors import NumericalError, TunesmithError
from tunesmith.evaluate.run import measure
from tunesmith.workflow import subject_of


def main() -> None:
    """Load once, then serve."""
    bench = prepare(spec())
    for line in sys.stdin:
        job = json.loads(line)
        tell("pair", **attempt(bench, job["adapter"], job["rate"]))


def attempt(bench: Bench, adapter: Mapping[str, Any] | None, rate: float | None) -> dict[str, Any]:
    """Train and measure; {"loss", "train_loss", "seconds"}, or {"diverged": why}, or {"error": why}."""
    began = time.perf_counter()
    try:
        found = _measured(bench, adapter, rate)
    except NumericalError as error:
        found = {"diverged": str(error)}
    except TunesmithError as error:
        found = {"error": str(error)}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _measured(bench: Bench, adapter: Mapping[str, Any] | None, rate: float | None) -> dict[str, Any]:
    if adapter is None or rate is None:
        return _loss(bench)
    kept = attach(bench, adapter)
    try:
        done = train(bench, rate)
        return {**_loss(bench), "train_loss": done["train_loss"], "said": done["said"]}
    finally:
        take_off(bench, kept)


def _loss(bench: Bench) -> dict[str, Any]:
    value = measure(subject_of(bench.run, bench.loaded, bench.data), ["eval_loss"])["eval_loss"]
    return {"loss": value} if math.isfinite(value) else {"diverged": f"the held-out loss is {value}"}


if __name__ == "__main__":
    main()
