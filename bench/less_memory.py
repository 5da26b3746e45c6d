"""What the ways to need less memory save, counted by shape: nothing is computed, and no weights are needed.

python -m bench.less_memory                      smollm2-135m and llama-7b
python -m bench.less_memory --shapes llama-65b   another shape; --tokens: of the one pack of four rows that is counted
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch

from bench.table import grid
from tunesmith.adapters import attach
from tunesmith.data.encode import Example
from tunesmith.data.pack import plan_packs
from tunesmith.model.llama import Llama
from tunesmith.model.shapes import shape
from tunesmith.train.optim import OPTIMIZERS, state_bytes
from tunesmith.train.simulate import step_bytes

METHODS = ("lora", "prefix", "full")
WAYS: dict[str, bool | str] = {"false": False, "selective": "selective", "true": True}
ROWS = 4


def model_of(name: str, kind: str) -> Llama:
    """A published shape on the meta device, in bfloat16; in float32 where its own weights are trained."""
    with torch.device("meta"):
        model = Llama(shape(name)).to(torch.float32 if kind == "full" else torch.bfloat16)
    return model.requires_grad_(False)


def activations(name: str, tokens: int) -> Iterator[list[str]]:
    """Rows of a table: MB that forward and backward hold at the most, by recomputation."""
    for kind in METHODS:
        model = model_of(name, kind)
        adapter = attach(model, {"kind": kind})
        rows = [
            Example(np.full(tokens // ROWS, i, np.int32), np.ones(tokens // ROWS, bool), "row") for i in range(ROWS)
        ]
        (pack,) = plan_packs(rows, budget=tokens, device="meta", needs=model.needs())
        found = [step_bytes(model, adapter, pack, recompute=way) for way in WAYS.values()]
        yield [
            name,
            kind,
            *(f"{step.kept / 1e6:,.0f}" for step in found),
            *(f"{step.peak / 1e6:,.0f}" for step in found),
        ]


def states(name: str) -> list[str]:
    """A row of a table: MB of an optimizer's states where every weight is trained."""
    parameters = attach(model_of(name, "full"), {"kind": "full"}).trainable
    return [name, *(f"{state_bytes(parameters, kind) / 1e6:,.0f}" for kind in OPTIMIZERS)]


def main(words: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.less_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default="smollm2-135m,llama-7b", metavar="NAME,...")
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args(words)
    names = given.shapes.split(",")
    head = ["model", "method", *(f"kept, {way}" for way in WAYS), *(f"peak, {way}" for way in WAYS)]
    out = [f"MB of one pack of {given.tokens} tokens, by train.recompute", ""]
    out += [grid(head, [row for name in names for row in activations(name, given.tokens)])]
    out += ["", "MB of the optimizer's states, all weights trained, by train.optimizer", ""]
    out += [grid(["model", *OPTIMIZERS], [states(name) for name in names])]
    sys.stdout.write("\n".join(out) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
