"""Builds, loads and calls kernels.cpp, the CPU's element-wise work in one pass where torch makes several;
attention.cpp; quantized.cpp and few_rows.cpp, which read frozen weights of few bits (called from product.py); and
token_step.cpp.

The machine's own C++ compiler builds it once (a few seconds) into the cache folder, under a name that tells source,
flags, compiler and processor apart. Where there is no compiler the torch formulas of fused.py and attention.py do the
same work, slower; `select` says which it is and why. They differ in the last bits, so a run records its choice.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ConfigError
from tunesmith.model.build import NO_COMPILER, build, compiler, reason

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        *("kernels.cpp", "attention.cpp", "quantized.cpp", "few_rows.cpp", "token_step.cpp"),
        *("bf16.h", "dots.h", "expand.h", "exponential.h"),
    )
)
Tiles = tuple[Tensor, Tensor, Tensor]  # queries, keys, visible
_PANEL, _ROWS = 64, 48  # attention.cpp's; its panels are narrower on some processors
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),  # none of these touches NaN or infinity
)


class Kernels:
    """The functions of the sources over tensors.

    All are contiguous, on the CPU, of one dtype unless it says otherwise.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[tuple[str, torch.dtype], Any] = {}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """y = x / rms(x) * weight over the last dimension, and 1 / rms(x) in float32, (rows,)."""
        size = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.numel() // size, dtype=torch.float32)
        self.call("rms_norm", x.dtype, x, weight, y, scale, x.numel() // size, size, eps)
        return y, scale

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The gradient of x."""
        dx = torch.empty_like(x)
        self.call("rms_norm_backward", x.dtype, grad, x, weight, scale, dx, scale.numel(), x.shape[-1])
        return dx

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        out = torch.empty_like(gate)
        self.call("swiglu", gate.dtype, gate, up, out, gate.numel())
        return out

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self.call("swiglu_backward", gate.dtype, grad, gate, up, dgate, dup, gate.numel())
        return dgate, dup

    def swiglu_wide(self, gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Turn `gate`, float32, into silu(gate) * up; returns gate and up in `dtype`."""
        kept = torch.empty_like(gate, dtype=dtype), torch.empty_like(up, dtype=dtype)
        self.call("swiglu_wide", dtype, gate, up, *kept, gate.numel())
        return kept

    def swiglu_backward_wide(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Turn `grad`, float32, into that of gate; returns that of up, float32."""
        dup = torch.empty_like(grad)
        self.call("swiglu_backward_wide", gate.dtype, grad, gate, up, dup, gate.numel())
        return dup

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Rotary embedding of x (tokens, heads, d) by cos and sin (tokens, d / 2); sign -1 turns back."""
        out = torch.empty_like(x)
        self.call("rotate", x.dtype, x, cos, sin, out, *x.shape[:2], x.shape[2] // 2, sign)
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, out: Tensor, sums: Tensor | None = None) -> None:
        """Write attention over a batch of tiles (`Layout.tiles`) to its rows of `out`, (tokens, heads, d).

        `sums`: where to write their scores' log-sum-exp, (tokens, heads, 1), float32.
        """
        sizes, work, _ = _attention_memory(q, k, tiles, copies=2, scores=1)
        self.call("attention", q.dtype, q, k, v, *tiles, out, or_null(sums), work, sizes)

    def attention_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        tiles: Tiles,
        sums: Tensor,
        inner: Tensor | None,
        found: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Of the gradients in `found`, write the batch's rows of that of q, and add to those of k and v, in float32.

        Of every row, (tokens, heads, 1), float32: `sums`, what the forward wrote, over all keys that it sees; `inner`,
        the sum of p dp, where it runs over more keys than these.
        """
        sizes, work, each = _attention_memory(q, k, tiles, copies=3, scores=2)
        keys = work.new_empty(2 * len(tiles[1]) * k.shape[1] * each)
        self.call("attention_backward", q.dtype, q, k, v, grad, sums, or_null(inner), *tiles, *found, keys, work, sizes)

    def cross_entropy(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted losses (rows,), float32, of logits (rows, size), which become their own gradient."""
        loss = logits.new_empty(len(logits), dtype=torch.float32)
        self.call("cross_entropy", logits.dtype, logits, target, weight, loss, *logits.shape)
        return loss

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
        """Call `name` for `dtype`: tensors go as their addresses."""
        function = self._functions.get((name, dtype))
        if function is None:
            function = self._library[f"{name}_{str(dtype).removeprefix('torch.')}"]
            kinds: dict[type, Any] = {Tensor: ctypes.c_void_p, int: ctypes.c_int64, float: ctypes.c_float}
            function.argtypes = [next(c for k, c in kinds.items() if isinstance(a, k)) for a in arguments]
            function.restype = None
            self._functions[name, dtype] = function
        function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def or_null(x: Tensor | None) -> Tensor:
    """A tensor, or one whose address is 0."""
    return torch.empty(0) if x is None else x


def _attention_memory(q: Tensor, k: Tensor, tiles: Tiles, copies: int, scores: int) -> tuple[Tensor, Tensor, int]:
    """Sizes for attention.cpp, the scratch space of all its threads, and the floats that a tile's keys take.

    A thread has so many `copies` of a tile's keys, and so many blocks of `scores`.
    """
    (batch, n), m, (_, kv_heads, width) = tiles[0].shape, tiles[1].shape[1], k.shape
    wide, long = (-(-size // _PANEL) * _PANEL for size in (width, m))
    each = copies * long * wide + _ROWS * (scores * (long + _PANEL) + (scores + 1) * wide)
    threads = min(torch.get_num_threads(), batch * kv_heads)
    sizes = torch.tensor([batch, n, m, kv_heads, q.shape[1] // kv_heads, width, threads, each])
    return sizes, q.new_empty(threads * each, dtype=torch.float32), long * wide


class ShapeKernels(Kernels):
    """Kernels for the meta device: they make what the real ones make, and compute nothing."""

    def __init__(self) -> None:
        """No library is needed."""

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
        """Nothing."""


@contextmanager
def shapes_only(native: bool) -> Iterator[None]:
    """Within it, `kernels_for` has kernels for the meta device (`native`), so that memory is planned for them."""
    _process.shapes = ShapeKernels() if native else None
    try:
        yield
    finally:
        _process.shapes = None


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The kernels, where they can act on these tensors; None where torch must."""
    first = tensors[0]
    if first.dtype not in (torch.bfloat16, torch.float32) or torch.compiler.is_compiling():
        return None
    if _process.shapes and first.device.type == "meta":
        return _process.shapes
    for t in tensors:
        if not t.is_cpu or t.dtype != first.dtype or not t.is_contiguous():
            return None
    return None if _process.torch_only else built()[0]


def select(choice: str) -> tuple[str, str]:
    """Choose for this process, like the number of threads: "native", "torch", or "auto" (native where they can be
    built).

    Returns what is now in use, "native" or "torch", and a line that says why. Raises ConfigError where native kernels
    are asked for and cannot be had.
    """
    if choice == "torch":
        _process.torch_only = True
        return "torch", "kernels: torch, as configured"
    kernels, why = built()
    if kernels is None and choice == "native":
        raise ConfigError(f"train.kernels: native cannot be had: {why}; use auto or torch")
    _process.torch_only = kernels is None
    return ("native" if kernels else "torch"), f"kernels: {why}"


@dataclass
class _Process:
    """The one choice that a process makes."""

    torch_only: bool = False
    shapes: Kernels | None = None


_process = _Process()


@cache
def built() -> tuple[Kernels | None, str]:
    """The kernels if this machine can build them, and a line that says so or why not."""
    command = compiler()
    if command is None:
        return None, f"torch, which is slower: {NO_COMPILER}"
    try:
        return Kernels(ctypes.CDLL(str(build(command, SOURCES, FLAGS)))), "native"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"torch, which is slower: the kernels could not be built ({reason(error)})"
