"""How much memory a run will take, before it begins: every tensor of its heaviest step is counted, by its shape.

    weights      the base's, as they are held (a tied head is the embedding; a quantized linear its packed numbers)
    adapter      what is added to the base: float32 parameters and buffers
    gradients    of every trainable parameter, in its own type. Where base weights are trained and a batch is one pack,
                 they come as activations go, and only what they take beyond those is counted
    optimizer    the states that build_optimizer makes
    activations  what forward and loss keep for the backward
    logits       the most that the loss holds beside them
    workspace    what the heaviest moment of all holds beyond these: within a block's backward, or the optimizer's step
    allocator    what the allocator may hold beside live tensors
    process      an interpreter that has imported torch, its threads' buffers, the tokenizer

Activations, logits and workspace come from the step itself, which is run on the meta device with the batches that will
need the most (simulate.py). So there is no formula for a method, a storage or a kernel that could be out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.config import TrainSection
from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.errors import OutOfMemory
from tunesmith.model.allocator import SLACK
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import block_linears
from tunesmith.train.memo import Memo
from tunesmith.train.memory import GIB, parameter_count
from tunesmith.train.optim import state_bytes, workspace_bytes
from tunesmith.train.order import heaviest_batches
from tunesmith.train.simulate import StepBytes, from_few_blocks, step_bytes

Recompute = bool | Literal["selective"]  # train.recompute
# An interpreter that has imported all that a run needs. CUDA's libraries are resident even where no GPU is.
IMPORTS = (600 if torch.version.cuda else 250) << 20
RUNTIME = 130 << 20  # tokenizer, rows, threads' buffers, small tensors
FRAGMENTS = 0.4  # malloc's heap holds this share more than live tensors, measured on packs of changing size
SPARE = 0.95  # share of the available memory that a plan may use
STEP = 256  # packs are sized in multiples of this many tokens
MOST = {"cpu": 4096, "cuda": 16384}  # longer packs bring no more speed


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, in the order in which they are printed."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def lines(self, measured: int | None = None) -> list[str]:
        """Give the plan as lines of text, next to the peak that was measured (bytes) when there is one."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items())
        beside = "" if measured is None else f", measured {measured / GIB:.2f} GiB ({measured / self.total:.0%} of it)"
        return [f"memory: planned {self.total / GIB:.2f} GiB{beside}", f"  GiB: {parts}"]


@dataclass(frozen=True)
class Work:
    """What a run does, as far as memory depends on it. `model`, with its adapter attached, is on the meta device."""

    model: Llama
    adapter: Adapter
    examples: Sequence[Example]
    train: TrainSection
    share_prefix: bool = True
    device: str = "cpu"
    native: bool = True  # element-wise work by native kernels (on a CPU)
    blocks: bool = True  # large tensors from allocator.cpp (on a CPU)
    memo: Memo | None = None  # where counts are kept
    _steps: dict[tuple[int, Recompute], StepBytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((len(e.ids) for e in self.examples), default=1)

    def batches(self, pack_tokens: int) -> list[list[Pack]]:
        """The packs of each of the batches that need the most memory, on the meta device."""
        settings = self.train
        heaviest = heaviest_batches([len(e.ids) for e in self.examples], settings)
        return [
            plan_packs(
                [self.examples[i] for i in rows],
                budget=pack_tokens,
                max_rows=settings.micro_batch,
                share=self.share_prefix,
                device="meta",
                needs=self.model.needs(),
            )
            for rows in heaviest
        ]

    def step(self, pack_tokens: int, recompute: Recompute) -> StepBytes:
        """The most that a step holds, over the heaviest packs (remembered)."""
        key = pack_tokens, recompute
        if key not in self._steps:
            batches = self.batches(pack_tokens)
            packs = [pack for batch in batches for pack in batch]
            heavy = {max(packs, key=size).examples: max(packs, key=size) for size in _SIZES} if packs else {}
            # A batch's later packs find gradients there. Those of an adapter are too small to tell the cases apart.
            first = bool(self.adapter.base) and all(len(batch) == 1 for batch in batches)
            found = [self._one(pack, recompute, first) for pack in heavy.values()]
            self._steps[key] = max(found, key=lambda s: s.peak, default=StepBytes(0, 0, 0))
        return self._steps[key]

    def _one(self, pack: Pack, recompute: Recompute, first: bool) -> StepBytes:
        count = partial(
            step_bytes,
            self.model,
            self.adapter,
            pack,
            recompute=recompute,
            native=self.native,
            dropout=self.train.attention_dropout,
            first=first,
        )
        if self.memo is None:
            return from_few_blocks(self.model, count)
        return self.memo.step(pack, recompute, first, count=partial(from_few_blocks, self.model, count))


def _pairs(pack: Pack) -> int:
    return max(int(n) for n in pack.layout.lengths)


_SIZES: tuple[Callable[[Pack], int], ...] = (lambda pack: pack.layout.tokens, _pairs, lambda pack: len(pack.read))


def plan(work: Work, pack_tokens: int, recompute: Recompute | None = None) -> MemoryPlan:
    """The memory plan of `work` with packs of at most `pack_tokens` tokens; `recompute` instead of what it names."""
    return with_step(work, work.step(pack_tokens, work.train.recompute if recompute is None else recompute))


def with_step(work: Work, step: StepBytes) -> MemoryPlan:
    """The memory plan of `work` whose heaviest step holds `step`."""
    base, added = _held(work)
    settings = work.train
    gradients = sum(p.numel() * p.element_size() for p in work.adapter.trainable.values())
    in_update = workspace_bytes(work.adapter.trainable, settings.optimizer, settings.offload, work.device)
    most = max(step.peak, in_update + gradients * step.first)
    logits = min(step.loss, most) - step.kept if step.loss > step.kept else 0
    beside = most - step.kept - logits
    if step.first:  # they are in `beside`, as far as there was no room for them yet where activations had been
        gradients = min(gradients, beside)
        beside -= gradients
    live = {
        "weights": base,
        "adapter": added,
        "gradients": gradients,
        "optimizer": _states(work),
        "activations": step.kept,
        "logits": logits,
        "workspace": beside,
    }
    return MemoryPlan(live | {"allocator": _spare(work, live), "process": IMPORTS + RUNTIME})


def _held(work: Work) -> tuple[int, int]:
    """Bytes of the base, and of what is added to it: each tensor once."""
    added = {id(t) for delta in work.adapter.deltas.values() for t in (*delta.parameters(), *delta.buffers())}
    tensors: dict[int, Tensor] = {id(t): t for t in (*work.model.parameters(), *work.model.buffers())}
    sizes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
    new = sum(size for key, size in sizes.items() if key in added)
    return sum(sizes.values()) - new, new


def _states(work: Work) -> int:
    """Bytes of optimizer states that lie where the model does; a mapped file's pages are the system's to take back."""
    settings = work.train
    elsewhere = settings.offload == "disk" or (settings.offload == "cpu" and work.device != "cpu")
    if elsewhere:
        return 0
    wide = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in work.adapter.trainable.items()}
    return state_bytes(wide, settings.optimizer)  # float32, whatever the parameters are


def _spare(work: Work, live: dict[str, int]) -> int:
    if work.device != "cpu":
        return 0
    moving = live["activations"] + live["logits"] + live["workspace"]
    return min(SLACK, moving) if work.blocks else int(FRAGMENTS * moving)


@dataclass(frozen=True)
class Choice:
    """What a run will use, with its plan, and a line that says why."""

    pack_tokens: int
    recompute: Recompute
    memory: MemoryPlan
    why: str


def choose(work: Work, available: int) -> Choice:
    """The fastest setting of pack size and recomputation that fits `available` bytes.

    What the settings name is kept: `pack_tokens`, and a `recompute` that is on. Otherwise the largest pack that fits,
    at most as long as brings speed; where not even the longest row fits, with recomputation. Raises OutOfMemory with
    the plan and the ways out.
    """
    settings, budget = work.train, int(available * SPARE)
    ways: list[Recompute] = [settings.recompute]
    if settings.memory == "auto" and settings.recompute is not True:
        ways += [True] if settings.recompute else ["selective", True]
    for recompute in ways:
        tokens = _largest(work, recompute, budget)
        if tokens is None:
            continue
        why = _why(work, tokens, budget)
        if recompute != settings.recompute:
            how = f"train.recompute={str(recompute).lower()}"
            why += f"; blocks are recomputed in the backward ({how}), or it would not fit"
        return Choice(tokens, recompute, plan(work, tokens, recompute), why)
    raise OutOfMemory(_does_not_fit(work, budget))


def least(work: Work) -> int:
    """Tokens of the smallest pack that holds the longest row, a multiple of STEP."""
    return -(-work.longest // STEP) * STEP


def _bounds(work: Work) -> tuple[int, int]:
    return least(work), max(MOST.get(work.device, MOST["cpu"]), least(work))


def _largest(work: Work, recompute: Recompute, budget: int) -> int | None:
    """The largest pack that fits, a multiple of STEP, found by halving; None where not even the longest row fits."""
    if work.train.pack_tokens:
        fits = plan(work, work.train.pack_tokens, recompute).total <= budget
        return work.train.pack_tokens if fits else None
    low, most = _bounds(work)
    if plan(work, most, recompute).total <= budget:
        return most
    if plan(work, low, recompute).total > budget:
        return None
    good, bad = low // STEP, most // STEP
    while bad - good > 1:
        middle = (good + bad) // 2
        if plan(work, middle * STEP, recompute).total <= budget:
            good = middle
        else:
            bad = middle
    return good * STEP


def _why(work: Work, tokens: int, budget: int) -> str:
    if work.train.pack_tokens:
        return f"packs of {tokens} tokens, as configured"
    low, most = _bounds(work)
    reason = "longer packs bring no more speed" if tokens == most else f"{budget / GIB:.2f} GiB may be used"
    if tokens == low and tokens > MOST.get(work.device, MOST["cpu"]):
        reason = f"the longest row has {work.longest}"
    return f"packs of {tokens} tokens: {reason}"


def _does_not_fit(work: Work, budget: int) -> str:
    settings = work.train
    tokens = settings.pack_tokens or least(work)
    needed = plan(work, tokens)
    cures: Iterable[str] = (
        *(["train.recompute=true"] if not settings.recompute and plan(work, tokens, True).total <= budget else []),
        *(["a smaller train.pack_tokens"] if settings.pack_tokens and tokens > least(work) else []),
        *(["model.dtype=bfloat16"] if work.model.dtype.itemsize > 2 else []),
        *(["quant.kind=nf4"] if not any(m.quant for m in _linears(work.model)) else []),
        "a smaller data.cutoff",
        "a smaller model",
    )
    largest = max(needed.parts, key=lambda part: needed.parts[part])
    where = "train.pack_tokens: " if settings.pack_tokens else ""
    return (
        f"{where}a pack of {tokens} tokens of this {parameter_count(work.model.config) / 1e6:,.0f}M model needs "
        f"{needed.total / GIB:.2f} GiB ({largest} {needed.parts[largest] / GIB:.2f}) and {budget / GIB:.2f} may be "
        f"used; try {', or '.join(cures)}"
    )


def _linears(model: Llama) -> list[Linear]:
    return [linear for _, linear in block_linears(model)]
