"""A strict, bounded reader of GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Layout: magic, version, counts | metadata (key, type, value) | tensor index (name, dims, type, offset) | padding | data.

The gguf library's own reader walks whatever counts a file claims, so a damaged file makes it loop for minutes; it also
takes seconds for a vocabulary of ordinary size. Here every count is held against the bytes that are left before it is
believed, and arrays are only decoded when asked for. Dequantization stays the gguf library's.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LENGTH = struct.Struct("<Q")
_MOST_NAME = 65535
_MOST_DIMS = 4

# ggml type -> (name, weights in a block, bytes of a block); the types that llama.cpp's own quantizers have written.
QUANT_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `shape` in PyTorch's order (rows first); `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    quant: int
    start: int
    size: int

    @property
    def quant_name(self) -> str:
        """The quantization's name, such as Q4_1."""
        return QUANT_TYPES[self.quant][0]


@dataclass(frozen=True)
class _Array:
    """An array that has been walked over, not decoded."""

    kind: int
    count: int
    start: int
    end: int


@dataclass(frozen=True)
class _Index:
    """What was read of the first bytes, `index`, of a file of `size` bytes."""

    size: int
    index: bytes
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


_known: list[_Index] = []  # that of the file opened last


class GgufFile:
    """An open GGUF file: `metadata` (lazy mapping), `tensors` (by name), `raw(tensor)` (its bytes, not copied).

    A context manager. Raises ModelError, in one line, for anything that is not a complete, well-formed GGUF file.
    """

    metadata: GgufMetadata
    tensors: dict[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{path}: cannot be read ({error}); is the download complete?") from None
        self.size = len(self._map)
        try:
            self._find_index()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            self.close()
            raise self._damaged(f"{type(error).__name__}") from None
        except ModelError:
            self.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file; views handed out by `raw` must be gone, otherwise the map lives as long as they do."""
        try:
            self._map.close()
        except BufferError:  # a view is still alive; the map goes with it
            pass

    def raw(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the tensor's bytes as a read-only array over the mapped file."""
        return np.frombuffer(self._map, np.uint8, tensor.size, tensor.start)

    def _find_index(self) -> None:
        """Read the index, or take what was read of the same bytes before: a start opens its model five times."""
        for known in _known:
            if known.size == self.size and self._map[: len(known.index)] == known.index:
                self.metadata, self.tensors = GgufMetadata(self, known.values), known.tensors
                return
        self._read_index()
        _known[:] = [_Index(self.size, self._map[: self._at], self.metadata.values_as_read, self.tensors)]

    def _read_index(self) -> None:
        if self._map[:4] != _MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file (it begins with {bytes(self._map[:4])!r})")
        version, tensor_count, key_count = struct.unpack_from("<IQQ", self._map, 4)
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version} is not supported; known: 2, 3 (little-endian)")
        self._at = 24
        self._bounded(key_count, 13, "metadata keys")
        values: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string(_MOST_NAME)
            if key in values:
                raise self._damaged(f"key {key[:60]!r} twice")
            values[key] = self._value()
        self.metadata = GgufMetadata(self, values)
        self._bounded(tensor_count, 24, "tensors")
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        self.tensors = self._place(entries)

    def _value(self) -> Any:
        kind = self._unpack("<I")
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._damaged(f"unknown value type {kind}")
        return self._walk_array()

    def _walk_array(self) -> _Array:
        kind = self._unpack("<I")
        count = self._unpack("<Q")
        if kind == _STRING:
            self._bounded(count, 8, "strings of an array")
            start, at, unpack, data = self._at, self._at, _LENGTH.unpack_from, self._map
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        elif kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            self._bounded(count, width, "numbers of an array")
            start, at = self._at, self._at + count * width
        else:
            raise self._damaged(f"array of type {kind}")
        if at > self.size:
            raise self._damaged("an array runs past the end")
        self._at = at
        return _Array(kind, count, start, at)

    def decode_array(self, array: _Array) -> list[Any]:
        """Return the values of an array of the metadata; strings that are not UTF-8 keep their bytes as surrogates."""
        if array.kind != _STRING:
            dtype = np.dtype(_SCALARS[array.kind])
            return np.frombuffer(self._map, dtype, array.count, array.start).tolist()
        out: list[str] = []
        at, unpack, data = array.start, _LENGTH.unpack_from, self._map
        for _ in range(array.count):
            start = at + 8
            at = start + unpack(data, at)[0]
            out.append(data[start:at].decode("utf-8", "surrogateescape"))
        return out

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MOST_NAME)
        dims_count = self._unpack("<I")
        if not 1 <= dims_count <= _MOST_DIMS:
            raise self._damaged(f"tensor {name[:60]!r} has {dims_count} dimensions")
        dims = struct.unpack_from(f"<{dims_count}Q", self._map, self._at)
        self._at += 8 * dims_count
        quant = self._unpack("<I")
        offset = self._unpack("<Q")
        return name, tuple(reversed(dims)), quant, offset

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment {alignment!r}")
        base = -(-self._at // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for name, shape, quant, offset in entries:
            if name in placed or not name.isprintable():
                raise self._damaged(f"a tensor is called {name[:60]!r}, or two are")
            if quant not in QUANT_TYPES:
                known = ", ".join(entry[0] for entry in QUANT_TYPES.values())
                raise ModelError(f"{self.path}: tensor {name[:60]!r} is of ggml type {quant}; supported: {known}")
            kind, block, width = QUANT_TYPES[quant]
            if min(shape) < 1 or shape[-1] % block:
                raise self._damaged(f"tensor {name[:60]!r} of shape {shape} cannot be stored as {kind}")
            size = math.prod(shape) // block * width
            if offset % alignment or base + offset + size > self.size:
                raise self._damaged(f"tensor {name[:60]!r} runs past the end")
            placed[name] = GgufTensor(name, shape, quant, base + offset, size)
        return placed

    def _unpack(self, form: str) -> Any:
        value = struct.unpack_from(form, self._map, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _string(self, most: int | None = None) -> str:
        length = self._unpack("<Q")
        if length > self.size - self._at or most is not None and length > most:
            raise self._damaged(f"a string of {length} bytes")
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8")

    def _bounded(self, count: int, width: int, what: str) -> None:
        if count * width > self.size - self._at:
            raise self._damaged(f"{count} {what} in {self.size - self._at} bytes")

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: damaged or truncated GGUF ({what}); download or convert it again")


class GgufMetadata(Mapping[str, Any]):
    """The metadata by key; arrays become lists when they are asked for."""

    def __init__(self, file: GgufFile, values: dict[str, Any]) -> None:
        self._file = file
        self.values_as_read = values

    def __getitem__(self, key: str) -> Any:
        value = self.values_as_read[key]
        return self._file.decode_array(value) if isinstance(value, _Array) else value

    def __contains__(self, key: object) -> bool:
        return key in self.values_as_read

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_as_read)

    def __len__(self) -> int:
        return len(self.values_as_read)

    def count(self, key: str) -> int:
        """Return the length of an array without decoding it; 0 where there is none."""
        value = self.values_as_read.get(key)
        return value.count if isinstance(value, _Array) else 0
