"""Storages: how a frozen weight is kept in few bits. The numbers lie in the Linear's own `weight`, a Parameter, so that
they shard like any other; a storage is the small module beside it that knows how to read them.

    weight (rows, columns) -> quantize_weight(weight, spec) -> packed numbers, Storage
    storage.dense(packed, dtype) -> the matrix that they stand for
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.quant import int8
from tunesmith.quant.blockwise import dequantize_blockwise, quantize_blockwise
from tunesmith.quant.codes import KINDS, find_code
from tunesmith.quant.double import NESTED_BLOCK, nest, unnest
from tunesmith.quant.dynamic import dynamic_map


@dataclass(frozen=True)
class Spec:
    """How to quantize: `kind`, and for the codes of few bits the block size and whether absmax is quantized too."""

    kind: str
    block_size: int = 64
    double_quant: bool = True

    @property
    def bits(self) -> float:
        """Bits a weight, its scales included, short of what ends in the middle of a block."""
        if self.kind not in KINDS:
            return 8.0
        scale = (
            8 / self.block_size + 32 / (self.block_size * NESTED_BLOCK) if self.double_quant else 32 / self.block_size
        )
        return find_code(self.kind).bits + scale


class Storage(nn.Module):
    """Reads the packed numbers of one frozen weight of `shape` (rows, columns). Holds no parameters."""

    kind: str = ""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`: the formula in torch."""
        raise NotImplementedError

    def product(self, x: Tensor, packed: Tensor) -> Tensor | None:
        """W x of x (tokens, columns), where it is not that of the dense matrix; None where it is."""
        return None

    def bits(self, packed: Tensor) -> float:
        """Bits a weight that are resident: the packed numbers and every buffer that belongs to this weight alone."""
        held = [packed, *(buffer for name, buffer in self.named_buffers() if name not in SHARED)]
        return sum(8 * t.numel() * t.element_size() for t in held) / (self.shape[0] * self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move, but never change a type: `model.to(torch.bfloat16)` casts what is dense and leaves scales exact."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        """The kind and the shape."""
        return f"{self.kind}, {self.shape[0]} x {self.shape[1]}"


SHARED = ("table", "nested_table")  # the same numbers for every weight: one tensor a device


class Blockwise(Storage):
    """A code of few bits and an absmax a block (see blockwise.py), itself quantized where `nested` is there."""

    absmax: Tensor
    table: Tensor
    nested: Tensor | None
    offset: Tensor | None
    nested_table: Tensor | None

    def __init__(
        self, kind: str, shape: tuple[int, int], block: int, absmax: Tensor, nested: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(shape)
        self.kind, self.block, self.code_bits = kind, block, find_code(kind).bits
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested", None if nested is None else nested[0])
        self.register_buffer("offset", None if nested is None else nested[1])
        self.register_buffer("table", _shared(kind, absmax.device), persistent=False)
        self.register_buffer(
            "nested_table", None if nested is None else _shared("dynamic", absmax.device), persistent=False
        )

    def scales(self) -> Tensor:
        """The absmax of each block, (blocks,), float32."""
        if self.nested is None or self.offset is None or self.nested_table is None:
            return self.absmax
        return unnest(self.absmax, self.nested, self.offset, self.nested_table)

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Storage`."""
        return dequantize_blockwise(packed, self.scales(), self.table, self.code_bits, dtype).view(self.shape)


class Int8(Storage):
    """Whole numbers of eight bits and an absmax a row (see int8.py), weight only."""

    kind = "int8"
    absmax: Tensor

    def __init__(self, shape: tuple[int, int], absmax: Tensor) -> None:
        super().__init__(shape)
        self.register_buffer("absmax", absmax)

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Storage`."""
        return int8.dequantize_rows(packed, self.absmax, dtype)


class LlmInt8(Int8):
    """The same numbers with LLM.int8's product, in which a row's result depends on the rows beside it."""

    kind = "llm-int8"

    def product(self, x: Tensor, packed: Tensor) -> Tensor | None:
        """See `Storage`."""
        return int8.product(x, packed, self.absmax)


def quantize_weight(weight: Tensor, spec: Spec, name: str = "weight") -> tuple[Tensor, Storage]:
    """Return (packed numbers, storage) of a weight (rows, columns). Raises ModelError, naming `name`."""
    rows, columns = weight.shape
    if spec.kind in ("int8", "llm-int8"):
        packed, absmax = int8.quantize_rows(weight)
        return packed, (Int8 if spec.kind == "int8" else LlmInt8)((rows, columns), absmax)
    if spec.kind not in KINDS:
        raise ModelError(
            f"{name}: there is no storage {spec.kind!r}; there are {', '.join((*KINDS, 'int8', 'llm-int8'))}"
        )
    if weight.numel() % spec.block_size:
        fitting = next(
            (b for b in (1024, 512, 256, 128, 64, 32, 16, 8) if b < spec.block_size and not weight.numel() % b), 8
        )
        raise ModelError(
            f"{name}: blocks of {spec.block_size} do not divide its {rows} x {columns} weights; "
            f"set quant.block_size={fitting}"
        )
    packed, absmax = quantize_blockwise(weight, find_code(spec.kind), spec.block_size)
    if not spec.double_quant:
        return packed, Blockwise(spec.kind, (rows, columns), spec.block_size, absmax)
    indices, nested, offset = nest(absmax)
    return packed, Blockwise(spec.kind, (rows, columns), spec.block_size, indices, (nested, offset))


@cache
def _shared(name: str, device: torch.device) -> Tensor:
    """A code's table on a device, the same tensor for every weight."""
    values = dynamic_map() if name == "dynamic" else find_code(name).values
    return torch.tensor(values, dtype=torch.float32, device=device)
