"""The weights of a Hugging Face folder: config.json beside model.safetensors, or beside an index of several."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import read_json
from tunesmith.quant.files import Layout
from tunesmith.quant.storage import Storage

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MOST_HEADER = 100 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` and `size` in bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class FolderWeights:
    """Config, shapes and tensors of a Hugging Face folder; see `load.Weights`."""

    kind = "safetensors"
    keeps = "what bitsandbytes and tunesmith quantize write"

    def __init__(self, path: Path) -> None:
        self.path = path
        files = _weight_files(path)
        said = read_json(path / "config.json")
        quantized = said.get("quantization_config") if isinstance(said, dict) else None
        if quantized is not None:
            said = {key: value for key, value in said.items() if key != "quantization_config"}
        self.config = ModelConfig.from_hf(said, str(path / "config.json"))
        self._entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise ModelError(
                        f"{file}: {name[:80]} is also in {self._entries[name].file.name}; keep one of them"
                    )
                self._entries[name] = entry
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self._open: dict[Path, Any] = {}
        self._layout = None if quantized is None else Layout(quantized, self.shapes, self._stored, str(path))
        if self._layout is not None:
            kept = {name: shape for name, shape in self.shapes.items() if name not in self._layout.companions}
            self.shapes = {**kept, **self._layout.shapes}

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()

    @property
    def quantized(self) -> frozenset[str]:
        """The names of the weights that are stored in few bits, for `held`."""
        return frozenset() if self._layout is None else frozenset(self._layout.shapes)

    def held(self, name: str) -> tuple[torch.Tensor, Storage]:
        """Return the packed numbers of a quantized weight, and their storage."""
        if self._layout is None:
            raise ModelError(f"{self.path}: {name} is not quantized")
        return self._layout.held(name)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of one tensor in `dtype`."""
        entry = self._entries[name]
        if name in self.quantized:
            packed, storage = self.held(name)
            return storage.dense(packed, dtype)
        if entry.dtype not in _WIDTHS:
            raise ModelError(
                f"{entry.file}: {name} is stored as {entry.dtype}: a quantized model; use the original (F32, F16, BF16)"
            )
        return torch.empty(entry.shape, dtype=dtype).copy_(self._mapped(name))

    def _mapped(self, name: str) -> torch.Tensor:
        """A tensor over the mapped file, which may be overwritten while the model lives: copy it."""
        entry = self._entries[name]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            return self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{entry.file}: {str(error)[:120]}; download it again") from None

    def _stored(self, name: str) -> torch.Tensor:
        """A copy of a tensor as it is stored."""
        return self._mapped(name).clone()

    def sample(self, name: str) -> tuple[str, bytes]:
        """Return (stored type, a few of its bytes)."""
        parts = sorted(self._layout.parts(name)) if self._layout is not None and name in self.quantized else []
        out = b""
        for entry in (self._entries[part] for part in (name, *parts)):
            with open(entry.file, "rb") as stream:
                for at in (0, entry.size // 2, max(0, entry.size - 64)):
                    stream.seek(entry.start + at)
                    out += stream.read(min(64, entry.size - at))
        return self._entries[name].dtype, out


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors that a safetensors file says it has: 8 bytes of length, then JSON, then the data."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEADER):
                raise ModelError(
                    f"{path}: damaged or truncated safetensors (header of {length} bytes); download it again"
                )
            header = json.loads(stream.read(length))
        entries = {name: _entry(path, item, 8 + length) for name, item in header.items() if name != "__metadata__"}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: damaged safetensors header ({str(error)[:80]}); download it again") from None
    for name, entry in entries.items():
        if not name.isprintable():
            raise ModelError(f"{path}: damaged safetensors header (tensor name {name[:60]!r}); download it again")
        width = _WIDTHS.get(entry.dtype)
        if entry.start + entry.size > size or width is not None and math.prod(entry.shape) * width != entry.size:
            raise ModelError(f"{path}: {name[:80]} runs past the end of the file; is the download complete?")
    return entries


def _entry(path: Path, item: Any, base: int) -> Entry:
    shape, (start, end) = tuple(item["shape"]), item["data_offsets"]
    for number in (*shape, start, end):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{str(number)[:40]!r} is not a size")
    if end < start or len(shape) > 8:
        raise ValueError("offsets run backwards")
    return Entry(path, str(item["dtype"])[:20], shape, base + start, end - start)


def _weight_files(path: Path) -> list[Path]:
    """The folder's safetensors files; an error that says what is there instead, and the way out."""
    if (path / INDEX).is_file() and not (path / SINGLE).is_file():
        return _shards(path)
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    names = sorted(entry.name for entry in path.iterdir())
    for name in names:
        if name.endswith(".gguf"):
            raise ModelError(f"{path}: no {SINGLE} here; to use the GGUF file, give its own path: {path / name}")
    if "adapter_model.safetensors" in names:
        raise ModelError(f"{path}: an adapter, not a model; give its base model here")
    refuse_pickle(path, names)
    if any(name.endswith(".safetensors") for name in names):
        raise ModelError(f"{path}: safetensors files without {INDEX}; download the folder again, the index included")
    raise ModelError(f"{path}: a model without weights: no {SINGLE}, {INDEX} or .gguf file; download it again")


def refuse_pickle(path: Path, names: list[str]) -> None:
    """Raise ModelError where weights only exist as pickle."""
    pickles = [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"{path}: {pickles[0]} is a pickle, which can run code when opened, and is not read; convert it where "
            "you trust it: transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )


def _shards(path: Path) -> list[Path]:
    where = path / INDEX
    index = read_json(where)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{where}: no weight_map; download it again")
    files = []
    for name in sorted({str(value) for value in names.values()}):
        # A plain name only: the index must not lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{where}: {name[:80]!r} is not the name of a safetensors file in this folder")
        if not (path / name).is_file():
            raise ModelError(f"{where}: {name} is missing; the download is not complete")
        files.append(path / name)
    return files
