"""What every child shares: its specification, the encoded rows, padded batches, and a way to tell of itself.

Rows are encoded once, by Tunesmith's own encoder, and every side trains on those ids:
{"ids": [...], "labels": [...]} a line, -100 where a token is no target.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MARK = "@bench "
IGNORE = -100
UNKNOWN = -1  # a token of an answer whose id its decoder does not tell
# The LoRA of every job: the names of the linears, by what the job calls them.
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def spec() -> dict[str, Any]:
    """The child's specification, from the JSON file that its command line names."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def tell(event: str, **values: Any) -> None:
    """Tell the parent of `event`; `t` is seconds since this process was started."""
    t = time.monotonic() - float(os.environ.get("TUNESMITH_BENCH_T0", time.monotonic()))
    print(MARK + json.dumps({"event": event, "t": t, **values}), flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_examples(path: str) -> list[dict[str, list[int]]]:
    """The encoded rows of a file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def count(rows: Sequence[dict[str, list[int]]]) -> tuple[int, int]:
    """Tokens of rows, and how many of them are targets."""
    tokens = sum(len(row["ids"]) for row in rows)
    return tokens, sum(label != IGNORE for row in rows for label in row["labels"])


def padded(rows: Sequence[dict[str, list[int]]], pad: int = 0) -> dict[str, Any]:
    """Rows as one batch of tensors, padded on the right to the longest of them."""
    import torch

    width = max(len(row["ids"]) for row in rows)

    def fill(key: str, value: int) -> Any:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
    return {"input_ids": fill("ids", pad), "labels": fill("labels", IGNORE), "attention_mask": mask}


def batches(rows: Sequence[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """The rows of each optimizer step, in a random order that `seed` fixes."""
    import random

    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for first in range(0, len(order), size):
        yield [rows[i] for i in order[first : first + size]]


def synchronise(device: str) -> None:
    """Wait until the device has done all that was asked of it, so that a time taken now is true."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_peak(device: str) -> int:
    """The most bytes that were allocated on a GPU; 0 on a CPU, where the operating system's account is used."""
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def timed_decoding(wanted: dict[str, Any], decode: Callable[[list[list[int]], int], list[list[int]]]) -> None:
    """Time `decode(prompts, new tokens)` at every batch size, prompt included, after a short call that does not count.

    Each repetition has prompts of its own, so that nothing can be answered from a cache.
    """
    for size in wanted["batches"]:
        decode(wanted["prompts"][:size], 4)
        for number in range(wanted["repeats"]):
            prompts = [wanted["prompts"][(number + i) % len(wanted["prompts"])] for i in range(size)]
            began = time.perf_counter()
            answers = decode(prompts, wanted["new_tokens"])
            seconds = time.perf_counter() - began
            tokens = sum(map(len, answers))
            if tokens != size * wanted["new_tokens"]:
                raise SystemExit(f"batch {size}: {tokens} tokens came, {size * wanted['new_tokens']} were asked for")
            tell(
                "decoded", batch=size, tokens=tokens, seconds=seconds, ids=[i for i in answers[0][:16] if i != UNKNOWN]
            )
