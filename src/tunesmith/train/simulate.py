"""The memory of a training step, found by running it on the meta device: every tensor has its shape and no bytes.

    forward -> loss -> backward, on meta tensors, with a count of the bytes of all storages that are alive

Nothing is computed and no weight is read; and since it is the real step that runs, the count holds for every method,
pack and recomputation without a formula for each (tests/train/test_simulate.py: to the byte). What an allocator adds
is not in it, nor what torch's own attention operator holds within itself. The planner does not use it yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.adapters import Adapter
from tunesmith.data.pack import Pack
from tunesmith.model.llama import Llama
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
    """Bytes that a step holds beside weights, gradients and optimizer: `kept` for the backward; `peak` at the most."""

    kept: int
    peak: int


def step_bytes(
    model: Llama, adapter: Adapter, pack: Pack, *, recompute: bool = False, native: bool = True
) -> StepBytes:
    """Run forward and backward of `pack` (made for the device "meta") on a model on the meta device.

    `native`: with the shapes that the CPU's native kernels make, instead of torch's.
    """
    trained = list(adapter.trainable.values())
    ctx = model.context(pack.layout)  # beforehand: positions and tiles are no bytes to speak of
    with _training(model), shapes_only(native), LiveBytes() as live:
        live.ignore([*model.parameters(), *model.buffers()])
        live.ignore([pack.tokens, pack.where, pack.target, pack.weight])
        for p in trained:
            p.grad = torch.empty_like(p)
        live.ignore([p.grad for p in trained if p.grad is not None])
        live.now = live.peak = 0
        loss = pack_loss(model, pack, ctx, model.run(pack.tokens, ctx, recompute))
        kept = live.now
        loss.backward()
        for p in trained:
            p.grad = None
    return StepBytes(kept, live.peak)


@contextmanager
def _training(model: Llama) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
