"""One block for one new token of each of a few sequences, in one native call (token_step.cpp).

An answer is made a token at a time. In torch a block is some forty operations on vectors, and what they cost is mostly
the way to them. The call does what `Block.forward` does, in float from its input to its output. It is taken where
nothing but low-rank updates edits the block; everything else goes through the seams.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.model.linear import Linear
from tunesmith.model.native import kernels_for
from tunesmith.model.product import EIGHT, FEW, reading
from tunesmith.model.seam import Context, Seam
from tunesmith.quant.storage import Storage

if TYPE_CHECKING:
    from tunesmith.model.llama import Block

_EACH = 6  # of a linear: weight, bias, storage; A, B and scale of its update
_NO_UPDATE = (None, None, 0.0)
_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
# way of reading -> its number in token_step.cpp, and what its tensors and sizes are there
_WAYS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "blockwise": (1, ("packed", "code", "absmax", "nested", "map", "offset"), ("detail", "block")),
    "ggml": (2, ("packed",), ("detail",)),
    "rows": (3, ("packed", "absmax"), ()),
}


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns", "detail", "block", "rank")),
        *(
            (name, ctypes.c_void_p)
            for name in ("packed", "code", "absmax", "nested", "map", "offset", "bias", "A", "B")
        ),
        ("scale", ctypes.c_double),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "heads", "kv_heads", "width", "inner", "window")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in _NAMES),
    )


@dataclass(frozen=True)
class _Plan:
    """A block as the native code is told of it, and what that was made from: other tensors make it invalid."""

    given: tuple[Any, ...]
    addresses: tuple[int, ...]
    told: _Block


class TokenStep:
    """One block's call. `step(h, ctx)` is its output, or None where the call cannot do it."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._plan: _Plan | None = None

    def __call__(self, h: Tensor, ctx: Context) -> Tensor | None:
        """(sequences, hidden_size) -> (sequences, hidden_size)."""
        cache = ctx.cache
        if cache is None or not cache.single or len(h) > FEW or ctx.pattern is not None or ctx.by_row or ctx.extra:
            return None
        kernels = kernels_for(h, ctx.cos, ctx.sin)
        index = self._block.self_attn.index
        keys, values = cache.keys[index], cache.values[index]
        if kernels is None or torch.is_grad_enabled() or keys.dtype != h.dtype:
            return None
        given = self._given(ctx)
        if given is None:
            return None
        told = self._told(given, h.dtype)
        if told is None:
            return None
        out = torch.empty_like(h)
        lengths = cache.starts
        address = ctypes.addressof(told)
        kernels.call(
            "token_step", h.dtype, address, h, out, len(h), keys, values, keys.shape[2], lengths, ctx.cos, ctx.sin
        )
        return out

    def _given(self, ctx: Context) -> tuple[Any, ...] | None:
        """All tensors and storages that the call reads, and scales of updates; None where another edit acts."""
        linears, norms, seams = self._parts
        if any(len(seam) and seam.acting(ctx) for seam in seams):
            return None
        given: list[Any] = [norm.weight for norm in norms]
        for linear in linears:
            acts = len(linear.edit) and linear.edit.acting(ctx)
            update = linear.edit.low_rank(ctx) if acts else _NO_UPDATE
            if update is None:
                return None
            given += (linear.weight, linear.bias, linear.quant, *update)
        return tuple(given)

    @cached_property
    def _parts(self) -> tuple[tuple[Linear, ...], tuple[Any, ...], tuple[Seam, ...]]:
        """The block's linears in the order of _NAMES, its norms, and all seams but the linears' `edit`."""
        block, attention, mlp = self._block, self._block.self_attn, self._block.mlp
        linears = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        own = (attention.q_norm, attention.k_norm)
        norms = (block.input_layernorm, block.post_attention_layernorm, *(norm for norm in own if norm is not None))
        seams = (attention.past, attention.mix, block.after_attn, block.after_mlp, block.resid)
        return linears, norms, (*seams, *(norm.edit for norm in norms), *(linear.input for linear in linears))

    def _told(self, given: tuple[Any, ...], dtype: torch.dtype) -> _Block | None:
        """What the native code is told, made anew where anything of it has changed; None where it cannot read it."""
        plan = self._plan
        addresses = tuple([x.data_ptr() for x in given if isinstance(x, Tensor)])
        if plan is not None and plan.addresses == addresses and all(map(_same, plan.given, given)):
            return plan.told
        told = self._tell(given, dtype)
        self._plan = None if told is None else _Plan(given, addresses, told)
        return told

    def _tell(self, given: tuple[Any, ...], dtype: torch.dtype) -> _Block | None:
        linears, norms, _ = self._parts
        attention, weights = self._block.self_attn, given[: len(norms)]
        if attention.head_dim % EIGHT or any(weight.dtype != dtype for weight in weights):
            return None
        told = _Block(
            size=linears[0].in_features,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            width=attention.head_dim,
            inner=linears[-1].in_features,
            window=attention.window or 0,
            eps=norms[0].eps,
        )
        for name, weight in zip(("input_norm", "post_norm", "q_norm", "k_norm"), weights, strict=False):
            setattr(told, name, weight.data_ptr())
        each = [given[at : at + _EACH] for at in range(len(norms), len(given), _EACH)]
        for name, linear, (weight, bias, storage, *update) in zip(_NAMES, linears, each, strict=True):
            matrix = _matrix(linear, weight, bias, storage, dtype)
            if matrix is None or not _add(matrix, *update):
                return None
            setattr(told, name, matrix)
        return told

    def __getstate__(self) -> dict[str, Any]:
        """A copy is told anew: addresses are not its own."""
        return {"_block": self._block, "_plan": None}


def _same(one: Any, other: Any) -> bool:
    return one is other or isinstance(one, float) and one == other


def _matrix(
    linear: Linear, weight: Tensor, bias: Tensor | None, storage: Storage | None, dtype: torch.dtype
) -> _Matrix | None:
    """A Linear's weight and bias; None where the native code cannot read them."""
    matrix = _Matrix(rows=linear.out_features, columns=linear.in_features)
    if bias is not None:
        if bias.dtype != dtype:
            return None
        matrix.bias = bias.data_ptr()
    if storage is None:
        if weight.dtype != dtype or not weight.is_contiguous() or linear.in_features % EIGHT:
            return None
        matrix.packed = weight.data_ptr()
        return matrix
    found = reading(weight, storage)
    if found is None:
        return None
    matrix.kind, tensors, sizes = _WAYS[found[0]]
    for name, tensor in zip(tensors, found[1], strict=True):
        setattr(matrix, name, tensor.data_ptr())
    for name, size in zip(sizes, found[2], strict=True):
        setattr(matrix, name, size)
    return matrix


def _add(matrix: _Matrix, A: Tensor | None, B: Tensor | None, scale: float) -> bool:
    """Let the low-rank update scale * B A be added; False where it cannot be read."""
    if A is None or B is None:
        return True
    if A.dtype != torch.float32 or B.dtype != torch.float32 or not (A.is_contiguous() and B.is_contiguous()):
        return False
    matrix.A, matrix.B, matrix.rank, matrix.scale = A.data_ptr(), B.data_ptr(), len(A), scale
    return matrix.columns % EIGHT == 0
