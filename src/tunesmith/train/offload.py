"""Where the optimizer's states lie: beside their parameters, in main memory, or in a mapped file of the run's folder.

A step brings a slice at a time to the parameter's device, so where states lie changes no bit of what a step does. The
mapped file has no name and is gone with the process, however that ends: what is to last is in the checkpoints.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ConfigError, DiskError

ALIGNMENT = 64  # bytes; every tensor of a mapped file begins at a multiple
PLACES = ("none", "cpu", "disk")


class Place(Protocol):
    """Where states are made."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A state of a parameter on `device`."""

    def fetch(self, state: Tensor, device: torch.device) -> Tensor:
        """The same numbers on `device`: the state itself where it is there."""

    def store(self, state: Tensor, numbers: Tensor) -> None:
        """Write what `fetch` gave, changed, back; the state's own memory is then of no more use for now."""

    def settle(self, device: torch.device) -> None:
        """Wait until all that was stored is there."""


class Beside:
    """On the parameter's own device."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Place`."""
        return torch.zeros(*shape, dtype=dtype, device=device)

    def fetch(self, state: Tensor, device: torch.device) -> Tensor:
        """See `Place`."""
        return state

    def store(self, state: Tensor, numbers: Tensor) -> None:
        """See `Place`."""
        if numbers.data_ptr() != state.data_ptr():
            state.copy_(numbers)

    def settle(self, device: torch.device) -> None:
        """See `Place`: nothing was on its way."""


class InMain:
    """In main memory, pinned where a GPU reads it."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Place`."""
        return torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")

    def fetch(self, state: Tensor, device: torch.device) -> Tensor:
        """See `Place`."""
        return state.to(device, non_blocking=True)

    def store(self, state: Tensor, numbers: Tensor) -> None:
        """See `Place`."""
        if numbers.data_ptr() != state.data_ptr():
            state.copy_(numbers, non_blocking=True)

    def settle(self, device: torch.device) -> None:
        """See `Place`."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class InFile(InMain):
    """In one mapped file in `folder`, of `size` bytes, all of which are taken from the disk at once.

    Raises DiskError where they are not there: written later, a full disk would kill the process without a word.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._used = 0
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="optimizer-") as file:
                _reserve(file.fileno(), max(size, 1))
                self._map = mmap.mmap(file.fileno(), max(size, 1))
        except OSError as error:
            raise DiskError(
                f"{folder}: no room for the optimizer's states ({size:,} bytes needed): {error.strerror or error}; "
                "free some space, put output_dir on another disk, or set train.offload=cpu"
            ) from error
        self._bytes = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Place`. Raises ValueError beyond the `size` that was asked for."""
        count = math.prod(shape)
        start, self._used = self._used, self._used + aligned(count * dtype.itemsize)
        if self._used > len(self._bytes):
            raise ValueError(f"{self._used} bytes of states in a file of {len(self._bytes)}")
        return self._bytes[start : start + count * dtype.itemsize].view(dtype).view(*shape)

    def store(self, state: Tensor, numbers: Tensor) -> None:
        """See `Place`: the pages stay in the file and leave this process."""
        if numbers.data_ptr() != state.data_ptr():
            state.copy_(numbers)  # not pinned: done when this returns
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = state.data_ptr() - self._bytes.data_ptr()
        end = start + state.numel() * state.element_size()
        start -= start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def aligned(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in a mapped file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place_for(offload: str, folder: Path | None, size: int) -> Place:
    """The place that `train.offload` names; `size`: bytes of all states, each aligned.

    Raises DiskError, ConfigError.
    """
    if offload == "disk":
        if folder is None:
            raise ConfigError("train.offload: disk needs a run folder to put the file in")
        return InFile(folder, size)
    return InMain() if offload == "cpu" else Beside()


def _reserve(descriptor: int, size: int) -> None:
    """Make the file `size` bytes of zeros that have their place on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    chunk = bytes(1 << 20)
    for start in range(0, size, len(chunk)):
        os.write(descriptor, chunk[: size - start])
