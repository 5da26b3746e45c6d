"""Say what a run, adapter or model folder holds, from JSON files and safetensors headers; no model is loaded.

Of the weights, only an adapter's own are read, for how far each layer was moved.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import AdapterError, ConfigError, ModelError, TunesmithError

if TYPE_CHECKING:
    from torch import Tensor

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
    if (path / "adapter_config.json").is_file() or (path / "tunesmith.json").is_file():
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
    if (path / "adapter").is_dir():
        report["saved_adapter"] = _adapter(path / "adapter")
    return report


def _adapter(path: Path) -> dict[str, Any]:
    peft, native = path / "adapter_config.json", path / "tunesmith.json"
    config = _json(peft, AdapterError) if peft.is_file() else {}
    own = _json(native, AdapterError) if native.is_file() else {}
    files = sorted(path.glob("*.safetensors"))
    report: dict[str, Any] = {
        "kind": "adapter",
        "path": str(path),
        "method": own.get("kind") or config.get("peft_type"),
    }
    report["needs"] = _needs(config, own)
    report["config"] = _shown(config)
    if own:
        report["settings"] = _shown(own.get("settings"))
        report |= _behaviour(own)
        report |= {"attention": own["attention"]} if own.get("attention") else {}
        report["notes"] = _shown(own.get("notes"))
    report |= _tensors(files)
    deltas, paired = _delta_norms(config, files)
    rest = _tensor_norms(config, files[0], paired) if files else {}
    return report | ({"delta_norms": deltas} if deltas else {}) | ({"norms": rest} if rest else {})


def _shown(values: Any) -> dict[str, Any]:
    """The entries that say something."""
    items = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in items if value not in (None, {}, [], "", False)}


def _behaviour(own: dict[str, Any]) -> dict[str, Any]:
    """What a method of this version can do with the settings that the adapter was trained with."""
    from tunesmith.adapters import find_method
    from tunesmith.config import validate_section

    try:
        method = find_method(str(own.get("kind")))
        settings: Any = validate_section(method.settings, own.get("settings") or {}, "settings")
    except ConfigError as error:
        return {"not_understood": str(error)}
    return {"mergeable": method.mergeable(settings)}


def _needs(config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What the adapter cannot do without: base, template, tokenizer; absent where it does not say."""

    def part(*keys: str) -> Any:
        value: Any = own
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    base = config.get("base_model_name_or_path") or part("base", "name")
    found = {"base": base, "base_sha256": part("base", "identity", "sha256")}
    found |= {"template": part("template", "name"), "tokenizer_sha256": part("tokenizer", "sha256")}
    return {key: value for key, value in found.items() if value is not None}


def _delta_norms(config: dict[str, Any], files: list[Path]) -> tuple[dict[str, float], set[str]]:
    """How far a LoRA moves the weights of each layer: the norm of s B A over all of its modules; and which tensors say.

    |B A|^2 = trace((B^T B) (A A^T)), so that no full matrix is formed. Empty where the files are not plain LoRA.
    """
    from tunesmith.adapters.peft_config import number, patterns, plain_keys, read_tensors
    from tunesmith.adapters.targets import by_pattern, layer_of

    if config.get("peft_type") != "LORA" or config.get("use_dora") or not files:
        return {}, set()
    where = str(files[0].with_name("adapter_config.json"))
    alphas = patterns(config, "alpha_pattern", where)
    named = {key: tensor.double() for key, (_, tensor) in plain_keys(read_tensors(files[0]), str(files[0])).items()}
    squares: dict[str, float] = {}
    paired: set[str] = set()
    for key, A in named.items():
        path = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", key)
        other = f"{path}{key.removeprefix(path).replace('A', 'B')}"
        B = named.get(other)
        if path == key or B is None or A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            continue
        paired |= {key, other}
        pattern = by_pattern({pattern: pattern for pattern in alphas}, path, "")
        alpha = number(alphas, pattern, where, 8) if pattern else number(config, "lora_alpha", where, 8)
        scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        layer = layer_of(path)
        name = path if layer is None else f"layer {layer}"
        squares[name] = squares.get(name, 0.0) + scale**2 * float(((B.T @ B) * (A @ A.T)).sum())
    return {name: round(math.sqrt(max(value, 0.0)), 6) for name, value in squares.items()}, paired


def _tensor_norms(config: dict[str, Any], file: Path, paired: set[str]) -> dict[str, dict[str, float]]:
    """The norms of the tensors that are not `paired`, by layer and what they are; all of a layer's modules together."""
    import torch

    from tunesmith.adapters.peft_config import open_tensors, plain_keys
    from tunesmith.adapters.targets import layer_of

    squares: dict[str, dict[str, float]] = {}
    with open_tensors(file) as tensors:  # one at a time: it may be a whole model
        for name, (key, _) in plain_keys(dict.fromkeys(tensors.keys(), torch.empty(0)), str(file)).items():
            tensor = tensors.get_tensor(key)
            if name in paired or not tensor.is_floating_point():
                continue
            layer, what = layer_of(name), name.removesuffix(".weight").rpartition(".")[2]
            place = "model" if layer is None else f"layer {layer}"
            for part, value in _parts(config, place, what, tensor):
                entry = squares.setdefault(part, {})
                entry[what] = entry.get(what, 0.0) + float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
    return {part: {what: round(math.sqrt(s), 6) for what, s in entry.items()} for part, entry in squares.items()}


def _parts(config: dict[str, Any], place: str, what: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor with the layer that it acts in. PEFT keeps the keys and values of all layers' prefixes in one."""
    layers = config.get("num_layers")
    prefix = config.get("peft_type") == "PREFIX_TUNING" and what == "prompt_embeddings"
    if prefix and value.ndim == 2 and type(layers) is int and layers > 0 and value.shape[1] % (2 * layers) == 0:
        yield from ((f"layer {i}", part) for i, part in enumerate(value.chunk(layers, dim=1)))
    else:
        yield place, value


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
