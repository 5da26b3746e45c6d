"""The memory of a training step, found by running it on the meta device: every tensor has its shape and no bytes.

    forward -> loss -> backward, on meta tensors, with a count of the bytes of all storages that are alive

Nothing is computed and no weight is read; and since it is the real step that runs, the count holds for every method,
pack and recomputation without a formula for each (tests/train/test_simulate.py: to the byte). What an allocator adds
is not in it, nor what torch's own attention operator holds within itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.adapters import Adapter
from tunesmith.data.pack import Pack
from tunesmith.model.llama import Attention, Llama
from tunesmith.model.native import shapes_only
from tunesmith.train.loss import pack_loss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make while it is entered: `now` alive, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """What is there already, such as weights, is not counted."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step holds beside weights and optimizer: `kept` for the backward; at the most while the `loss` is
    formed; at the `peak` of it all; at the `end` of the backward.

    Gradients are not among them, but where the step is the `first` of its batch: there they come in the backward.
    """

    kept: int
    loss: int
    peak: int
    end: int = 0
    first: bool = False


def step_bytes(
    model: Llama,
    adapter: Adapter,
    pack: Pack,
    *,
    recompute: bool | str = False,
    native: bool = True,
    dropout: float = 0.0,
    first: bool = False,
) -> StepBytes:
    """Run forward and backward of `pack` (made for the device "meta") on a model on the meta device.

    `native`: with the shapes that the CPU's native kernels make, instead of torch's. `dropout`: attention's. `first`:
    see `StepBytes`.
    """
    ctx = model.context(pack.layout, dropout=dropout)  # beforehand: positions and tiles are no bytes to speak of
    with shapes_only(native), counting(model, adapter, pack, first) as count:
        hidden = model.run(pack.tokens, ctx, recompute, pack.read)
        count.forward()
        loss = pack_loss(model, pack, ctx, hidden)
        del hidden  # a step of the loop does not hold it either
        count.loss()
        loss.backward()
    return count.found


def from_few_blocks(model: Llama, count: Callable[[], StepBytes]) -> StepBytes:
    """What `count` finds for the whole model, from few blocks where all are alike: each further one holds as much."""
    more = len(model.model.layers) - _FEW
    if more <= 1 or not alike(model):
        return count()
    found = []
    for few in (_FEW, _FEW + 1):
        with shortened(model, few):
            found.append(count())
    one, two = found
    kept, loss, peak, end = (
        getattr(one, f) + more * (getattr(two, f) - getattr(one, f)) for f in ("kept", "loss", "peak", "end")
    )
    # What the blocks keep goes while their gradients come: with many blocks the end may be higher than the beginning.
    beside = one.peak - max(one.loss, one.end)
    return StepBytes(kept, loss, max(peak, loss, kept, end + beside), end, one.first)


_FEW = 3  # blocks: no gradient goes below the first, and nothing stands above the last


def alike(model: Llama) -> bool:
    """Do all blocks hold the same, their adapters' parts and what is trained included?"""
    return model.pattern is None and len({_makeup(layer) for layer in model.model.layers}) == 1


def _makeup(layer: nn.Module) -> tuple[object, ...]:
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    buffers = [(name, b.shape, b.dtype) for name, b in layer.named_buffers()]
    windows = [m.window for m in layer.modules() if isinstance(m, Attention)]
    return (*parameters, *buffers, *(type(m) for m in layer.modules()), *windows)


@contextmanager
def shortened(model: Llama, blocks: int) -> Iterator[None]:
    """Within it the model has its first `blocks` blocks only."""
    every = model.model.layers
    model.model.layers = nn.ModuleList(list(every)[:blocks])
    try:
        yield
    finally:
        model.model.layers = every


class Count:
    """The bytes of a step, as it goes through its parts."""

    def __init__(self, live: LiveBytes, first: bool = False) -> None:
        self._live, self._highest, self._kept, self._loss = live, 0, 0, 0
        self._first, self._end = first, 0

    def forward(self) -> None:
        """The blocks have been run."""
        self._highest, self._live.peak = self._live.peak, self._live.now

    def loss(self) -> None:
        """The loss is there."""
        self._kept, self._loss = self._live.now, self._live.peak

    def backward(self) -> None:
        """The gradients are there."""
        self._end = self._live.now

    @property
    def found(self) -> StepBytes:
        """What was counted, after the backward."""
        peak = max(self._highest, self._live.peak)
        return StepBytes(self._kept, self._loss, peak, self._end, self._first)


@contextmanager
def counting(model: Llama, adapter: Adapter, pack: Pack, first: bool = False) -> Iterator[Count]:
    """Count what is made within, in training mode; weights and the pack are there, and gradients if not `first`."""
    trained = list(adapter.trainable.values())
    with _training(model), LiveBytes() as live:
        for p in trained:
            p.grad = None if first else torch.empty_like(p)
        gradients = [p.grad for p in trained if p.grad is not None]
        live.ignore([*model.parameters(), *model.buffers(), *gradients])
        live.ignore([pack.tokens, pack.read, pack.place, pack.target, pack.weight])
        live.now = live.peak = 0
        count = Count(live, first)
        try:
            yield count
        finally:
            count.backward()
            for p in trained:
                p.grad = None


@contextmanager
def _training(model: Llama) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
