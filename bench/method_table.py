"""The methods that are held side by side, and the settings of each: one table for bench/rates.py and bench/methods.py.

A row is an adapter as a user writes it under `adapter:`. The first row of a kind that is searched has that method's own
default settings, and the rate that the search chooses for it is the method's default. A kind that this checkout does
not have, or a setting that its method does not know, makes a line of the page, not a failure of the command.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TASK = "Classify the sentiment of the text as negative or positive."


@dataclass(frozen=True)
class Row:
    """`centre`: where the search for the learning rate begins; None leaves it to the first row of the same kind."""

    name: str
    about: str
    centre: float | None
    adapter: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The method."""
        return str(self.adapter["kind"])


def _row(name: str, about: str, centre: float | None, kind: str, **settings: Any) -> Row:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return Row(name, about, centre, {"kind": kind, **plain})


# First every kind once, so that a search that runs out of time has been at each of them; then what varies them.
ROWS: tuple[Row, ...] = (
    _row("lora", "LoRA, rank 16 on every linear", 3e-4, "lora", rank=16, target_modules="all-linear"),
    _row("full", "full fine-tuning", 3e-5, "full"),
    _row("last-layers", "the last blocks and the final norm", 1e-4, "last_layers"),
    _row("norms", "the weights of the norms", 1e-3, "norms"),
    _row("bitfit", "added biases", 3e-3, "bitfit"),
    _row("ia3", "IA3: factors on keys, values and the MLP", 3e-3, "ia3"),
    _row("bottleneck-houlsby", "bottlenecks after attention and MLP", 1e-3, "bottleneck"),
    _row("llama-adapter", "LLaMA-Adapter v1, one gate a head", 1e-2, "llama_adapter"),
    _row("llama-adapter-v2", "v1 with norms, scale and bias on every linear", 1e-3, "llama_adapter_v2"),
    _row("prompt", "prompt tuning from random tokens' embeddings", 1e-2, "prompt"),
    _row("prefix", "keys and values in every layer", 1e-2, "prefix"),
    _row("loreft", "LoReFT: orthonormal rows, first and last positions", 1e-3, "reft"),
    _row("dora", "LoRA of direction, with a learned magnitude", 3e-4, "dora"),
    _row("adalora", "LoRA that shares out its ranks while it is trained", 1e-3, "adalora"),
    _row("lora-r8-qv", "LoRA, rank 8 on queries and values", 1e-3, "lora", rank=8, target_modules=QV),
    _row("rslora", "LoRA scaled by the root of its rank", 1e-4, "lora", rank=16, rslora=True),
    _row("lora-plus", "LoRA whose B learns 16 times faster", 1e-4, "lora", rank=16, lora_plus_ratio=16.0),
    _row("pissa", "LoRA from the principal singular vectors", 1e-4, "lora", rank=16, init="pissa"),
    _row(
        "longlora", "LoRA on attention, norms and embeddings trained too", 1e-4, "lora",
        rank=8, target_modules=ATTENTION, train_norms=True, train_embeddings=True,
    ),
    _row("bottleneck-pfeiffer", "bottlenecks after the MLP", None, "bottleneck", variant="pfeiffer"),
    _row("bottleneck-parallel", "bottlenecks beside the MLP", 1e-3, "bottleneck", variant="parallel", scale=4.0),
    _row("prompt-text", "prompt tuning from the embeddings of a text", None, "prompt", init_text=TASK),
    _row("prompt-normal", "prompt tuning from random numbers", None, "prompt", init="normal"),
    _row("prefix-embedding", "virtual tokens before the text and before the answer", 1e-2, "prompt", infix_tokens=8),
    _row("prefix-mlp", "prefix tuning through an MLP that is dropped afterwards", 1e-3, "prefix", reparam=512),
    _row("llama-adapter-tanh", "v1, the gate's tanh", None, "llama_adapter", gate="tanh"),
    _row("llama-adapter-scalar", "v1, one gate a layer", None, "llama_adapter", gate="scalar"),
    _row("llama-adapter-rand-init", "v1, gates start at 1 (the ablation)", 1e-2, "llama_adapter", init="random"),
    _row("noreft", "LoReFT without orthonormal rows", None, "reft", variant="noreft"),
    _row("direft", "ReFT that adds a low-rank change directly", 1e-3, "reft", variant="direft"),
    _row(  # not searched: its parts keep their own rates
        "prefix-and-lora", "prefix tuning and LoRA trained together", None, "mixed",
        parts=({"kind": "prefix"}, {"kind": "lora", "rank": 8, "target_modules": list(QV)}),
    ),
)  # fmt: skip


def leads(row: Row, rows: Sequence[Row] = ROWS) -> bool:
    """Is it the first row of its kind, whose rate is the method's default?"""
    return row.centre is not None and next(other for other in rows if other.kind == row.kind) is row


def chosen(words: str | None, rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows that a list of names or kinds means, in the table's order; None is all. Raises ValueError.

    A word that is a row's name means that row, though it be a kind as well.
    """
    if not words:
        return list(rows)
    asked = [word.strip() for word in words.split(",") if word.strip()]
    known = [*(row.name for row in rows), *dict.fromkeys(row.kind for row in rows)]
    for word in asked:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--methods: there is no row or kind {word!r}{hint} (there are {', '.join(known)})")
    names = {row.name for row in rows}
    return [row for row in rows if row.name in asked or row.kind in set(asked) - names]


def grid(centre: float, count: int) -> list[float]:
    """`count` rates about `centre`, a factor of about 3 apart: 1 and 3 times each power of ten, rising."""
    middle = _index(centre)
    return [_rate(index) for index in range(middle - (count - 1) // 2, middle + count // 2 + 1)]


def beyond(rates: Iterable[float], up: bool) -> float:
    """The next rate above (or below) all of `rates`."""
    indices = [_index(rate) for rate in rates]
    return _rate(max(indices) + 1 if up else min(indices) - 1)


def label(rate: float) -> str:
    """A rate in two or three characters more than its digits: 0.0003 is 3e-4."""
    digits, _, exponent = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _index(rate: float) -> int:
    return round(2 * math.log10(rate))


def _rate(index: int) -> float:
    return float(f"{(1, 3)[index % 2]}e{index // 2}")
