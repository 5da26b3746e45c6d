"""What a block's backward runs again instead of keeping it.

    False        nothing: every value that the backward needs is kept
    True         the block: its input is kept, and it is run again   (arXiv:1604.06174)
    "selective"  all but the products W x, which are kept (with what LoRA adds): norms, rotary embedding,
                 attention, SwiGLU and what other adapters add are run again
                 (after arXiv:2205.05198, section 5, for frozen weights)

The products are most of a block's work and, with the block's input, all that the rest can be made from. Since the rest
is run again by the same kernels on the same numbers, the gradients are those of keeping everything, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.errors import ModelError
from tunesmith.model.matmul import back, back_weight, plain
from tunesmith.model.product import dense, product
from tunesmith.model.seam import Context
from tunesmith.quant.storage import Storage

if TYPE_CHECKING:
    from tunesmith.model.llama import Block

SELECTIVE = "selective"


def run_block(block: Block, h: Tensor, ctx: Context, recompute: bool | str, end: Context | None = None) -> Tensor:
    """The block's output, (tokens, hidden_size) or of the rows of `end`, keeping what `recompute` says.

    Raises ModelError for another word.
    """
    if recompute == SELECTIVE:
        kept = Kept(block.mlp.down_proj.weight if block.ends_plainly else None)
        ctx, end = replace(ctx, kept=kept), None if end is None else replace(end, kept=kept)
        return checkpoint(block, h, ctx, end, use_reentrant=False, context_fn=kept.phases)
    if isinstance(recompute, str):
        raise ModelError(f"recompute: {recompute!r} is not one of False, True, {SELECTIVE!r}")
    return checkpoint(block, h, ctx, end, use_reentrant=False) if recompute else block(h, ctx, end)


class Kept:
    """The products of one block, in their order: kept in the forward, given in the recomputation, each once.

    `unread`: a weight whose product nothing in the backward reads, so it is neither kept nor computed again.
    """

    def __init__(self, unread: Tensor | None = None) -> None:
        self.unread = unread
        self._found: dict[int, Tensor] = {}
        self._next, self._again = 0, False

    def phases(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the forward and of the recomputation, for torch.utils.checkpoint."""
        return _Phase(self, again=False), _Phase(self, again=True)

    def begin(self, again: bool) -> None:
        """Count products from the first; `again`: give those that were kept."""
        self._next, self._again = 0, again

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, storage: Storage | None) -> Tensor:
        """W x + b for x (tokens, in_features); W is `weight`, or what `storage` reads in it."""
        return _KeptProduct.apply(x, weight, bias, storage, self)

    def value(self, x: Tensor, weight: Tensor, rows: int, compute: Callable[[], Tensor]) -> Tensor:
        """The next product, (tokens, rows): computed and kept, or given."""
        at, self._next = self._next, self._next + 1
        if weight is self.unread:
            return x.new_empty(len(x), rows) if self._again else compute()
        if self._again and at in self._found:
            return self._found.pop(at)
        y = compute()
        if not self._again:
            self._found[at] = y.detach()  # without its history, which would hold itself alive
        return y


class _Phase(AbstractContextManager[None]):
    """One pass over the block; may be entered again, where a graph is gone through twice."""

    def __init__(self, kept: Kept, again: bool) -> None:
        self.kept, self.again = kept, again

    def __enter__(self) -> None:
        self.kept.begin(self.again)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing: how the pass ended is torch's affair."""


class _KeptProduct(torch.autograd.Function):
    """The product with torch's own gradients; it saves the same tensors whether y is computed or given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, storage: Storage | None, kept: Kept
    ) -> Tensor:
        ctx.storage = storage
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if storage is None:
            return kept.value(x, weight, len(weight), lambda: plain(x, weight, bias))
        return kept.value(x, weight, storage.shape[0], lambda: product(x, weight, storage))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        whole = weight if ctx.storage is None else dense(weight, ctx.storage, grad.dtype)
        return (
            back(grad, whole) if needs_x else None,
            back_weight(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
            None,
        )
