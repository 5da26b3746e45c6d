"""Products with frozen weights that are kept in few bits.

y = W x, W dense for the moment of the product only:

    forward:  W' = dense(packed);  y = x W'^T;  W' is let go        backward:  W' = dense(packed) again;  dx = dy W'

Reading has three ways that give the same bits: the storage's own torch formula, a native kernel on a CPU
(quantized.cpp), and bitsandbytes' kernels on CUDA where that is installed. Few rows on a CPU need no dense matrix
(few_rows.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.model.matmul import back, plain
from tunesmith.model.native import kernels_for, or_null
from tunesmith.quant.ggml import Ggml
from tunesmith.quant.storage import Blockwise, Int8, Storage

FEW = 8  # rows of x that a native product takes at once: for more, one dense matrix is faster
EIGHT = 8  # weights that the native kernels read at once: a row is a multiple of them
_BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def product(x: Tensor, packed: Tensor, storage: Storage) -> Tensor:
    """W x for x (tokens, columns) -> (tokens, rows); gradients reach x only."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, packed, storage)
    return frozen_product(x, packed, storage)


def dense(packed: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """The matrix that a storage holds, (rows, columns), by the fastest way there is."""
    if packed.is_cuda:
        return _dense_cuda(packed, storage, dtype)
    way = None if storage.shape[1] % EIGHT else _way(storage)
    out = torch.empty(storage.shape, dtype=dtype, device=packed.device)
    kernels = None if way is None else kernels_for(out)
    if kernels is None or way is None:
        return storage.dense(packed, dtype)
    kernels.call(f"dequantize_{way.name}", dtype, *way.read(packed, storage), out, *way.sizes(storage))
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, storage: Storage) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.storage = storage
        return frozen_product(x, packed, storage)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return back(grad, dense(packed, ctx.storage, grad.dtype)), None, None


def frozen_product(x: Tensor, packed: Tensor, storage: Storage, dtype: torch.dtype | None = None) -> Tensor:
    """W x for x (tokens, columns) -> (tokens, rows), without gradients; W is made in `dtype`, x's unless given."""
    own = storage.product(x, packed)
    if own is not None:
        return own
    if len(x) <= FEW and packed.device.type == "cpu":
        y = _few_rows(x, packed, storage)
        if y is not None:
            return y
    return plain(x, dense(packed, storage, dtype or x.dtype))


def reading(packed: Tensor, storage: Storage) -> tuple[str, tuple[Tensor, ...], tuple[int, ...]] | None:
    """How native code multiplies with a storage: the name of the way, its tensors and sizes; None where it cannot."""
    way = _way(storage)
    if way is None or storage.shape[1] % 32 or type(storage).product is not Storage.product:
        return None
    return way.name, way.read(packed, storage), way.product_sizes(storage)


def _few_rows(x: Tensor, packed: Tensor, storage: Storage) -> Tensor | None:
    """The product without a dense matrix, by a native kernel; None where there is none for it."""
    found = reading(packed, storage)
    x = x.contiguous()
    kernels = None if found is None or not len(x) else kernels_for(x)
    if kernels is None or found is None:
        return None
    name, tensors, sizes = found
    y = x.new_empty(len(x), storage.shape[0])
    kernels.call(f"product_{name}", x.dtype, *tensors, x, y, len(x), *storage.shape, *sizes)
    return y


@dataclass(frozen=True)
class _Way:
    """How the native kernels called `name` are given a storage: tensors, then sizes."""

    name: str
    read: Callable[[Tensor, Any], tuple[Tensor, ...]]
    sizes: Callable[[Any], tuple[int, ...]]
    product_sizes: Callable[[Any], tuple[int, ...]]


def _blockwise(packed: Tensor, storage: Blockwise) -> tuple[Tensor, ...]:
    nested = (or_null(t) for t in (storage.nested, storage.nested_table, storage.offset))
    return packed, storage.table, storage.absmax, *nested


_WAYS: dict[type[Storage], _Way] = {
    Blockwise: _Way(
        "blockwise",
        _blockwise,
        lambda s: (s.shape[0] * s.shape[1], s.code_bits, s.block),
        lambda s: (s.code_bits, s.block),
    ),
    Ggml: _Way(
        "ggml",
        lambda packed, s: (packed,),
        lambda s: (s.shape[0] * s.shape[1] // 32, s.number),
        lambda s: (s.number,),
    ),
    Int8: _Way("rows", lambda packed, s: (packed, s.absmax), lambda s: s.shape, lambda s: ()),
}


def _way(storage: Storage) -> _Way | None:
    return next((_WAYS[kind] for kind in type(storage).__mro__ if kind in _WAYS), None)


def _dense_cuda(packed: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """By bitsandbytes where it has a kernel for this storage, else by the torch formula."""
    if (
        isinstance(storage, Blockwise)
        and storage.kind in ("nf4", "fp4")
        and storage.block in _BNB_BLOCKS
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _bitsandbytes()
    ):
        operator = torch.ops.bitsandbytes.dequantize_4bit
        return operator(packed, storage.scales(), storage.block, storage.kind, storage.shape, dtype)
    return storage.dense(packed, dtype)


@cache
def _bitsandbytes() -> bool:
    """Is bitsandbytes installed, with the operator that is needed?"""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # not installed, or not for this CUDA
        return False
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
