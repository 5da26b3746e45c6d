"""Say what a run, adapter or model folder holds, from JSON files and safetensors headers: no weight is loaded."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from tunesmith.errors import AdapterError, ModelError, TunesmithError

MAX_HEADER = 100 * 1024 * 1024  # the limit of the safetensors library itself
MAX_JSON = 32 * 1024 * 1024


def inspect_path(path: Path) -> dict[str, Any]:
    """Return a report on `path`: a run folder, an adapter folder, a model folder or one .safetensors file.

    Raises ModelError or AdapterError, one line, for what is none of these or is damaged.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return {"kind": "safetensors file", "path": str(path), **_tensors([path])}
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; give a run, an adapter or a model folder, or a .safetensors file")
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if (path / "config.yaml").is_file() or (path / "adapter").is_dir():
        return _run(path)
    if (path / "config.json").is_file():
        return _model(path)
    raise ModelError(f"{path}: holds no config.yaml (a run), adapter_config.json (an adapter) or config.json (a model)")


def _run(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"kind": "run", "path": str(path)}
    if (path / "config.yaml").is_file():
        from tunesmith.config.source import read

        config = read(path / "config.yaml")
        report |= {name: config[name] for name in ("model", "data", "adapter") if name in config}
    report["checkpoints"] = sorted(folder.name for folder in path.glob("checkpoint-*") if folder.is_dir())
    if (path / "verify.json").is_file():
        report["verified"] = _json(path / "verify.json", AdapterError).get("ok")
    if (path / "adapter" / "adapter_config.json").is_file():
        report["saved_adapter"] = _adapter(path / "adapter")
    return report


def _adapter(path: Path) -> dict[str, Any]:
    config = _json(path / "adapter_config.json", AdapterError)
    shown = {key: value for key, value in config.items() if value not in (None, {}, [], "", False)}
    files = sorted(path.glob("*.safetensors"))
    return {"kind": "adapter", "path": str(path), "config": shown, **_tensors(files)}


def _model(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json", ModelError)
    files = sorted(path.glob("*.safetensors"))
    return {"kind": "model", "path": str(path), "config": config, **_tensors(files)}


def _tensors(files: list[Path]) -> dict[str, Any]:
    """Counts over the safetensors `files`: tensors, parameters, bytes, data types."""
    tensors, parameters, dtypes = 0, 0, set()
    for file in files:
        header = _header(file)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                parameters += math.prod(int(size) for size in entry["shape"])
                dtypes.add(str(entry["dtype"]))
            except (KeyError, TypeError, ValueError):
                raise ModelError(f"{file}: the header's entry {name[:80]!r} is damaged") from None
        tensors += len(header)
    size = sum(file.stat().st_size for file in files)
    names = [file.name for file in files]
    return {"files": names, "tensors": tensors, "parameters": parameters, "bytes": size, "dtypes": sorted(dtypes)}


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER, file.stat().st_size - 8):
            raise ModelError(f"{file}: not a safetensors file, or cut off; copy it again")
        return _object(stream.read(length), file, ModelError)


def _json(file: Path, error: type[TunesmithError]) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON:
        raise error(f"{file}: larger than {MAX_JSON // 2**20} MiB, which no configuration is")
    return _object(file.read_bytes(), file, error)


def _object(raw: bytes, file: Path, error: type[TunesmithError]) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise error(f"{file}: not valid JSON; copy it again") from None
    if not isinstance(value, dict):
        raise error(f"{file}: should hold a JSON object")
    return value
