"""Count what a method trains and saves in a model, from sizes alone: model and method stand on torch's meta device.

count("llama-7b", "lora", {"rank": 8, "target_modules": ["q_proj", "v_proj"]})["trainable_parameters"]  # 4194304
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from tunesmith.adapters import Adapter, attach
from tunesmith.adapters.peft_format import exported
from tunesmith.errors import ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import read_json
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_config
from tunesmith.model.shapes import shape, shapes


def count(model: str, method: str | None = None, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the counts of `method` with `settings` on `model`: a name of `shapes()`, a model folder or a .gguf file.

    `trainable_parameters`; `total_parameters`, the trained ones that a method adds included; `file_bytes`, what the
    adapter's tensors take in its file (float32), and `header_bytes`, what that file has before them; `modules`, the
    trained parameters by the module that they sit in. Without a method only the model is counted. Raises ModelError,
    ConfigError, AdapterError.
    """
    with torch.device("meta"):
        base = Llama(config_of(model))
    base.requires_grad_(False)
    report: dict[str, Any] = {
        "kind": "count",
        "model": model,
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "linear_parameters": sum(
            m.weight.numel() for name, m in base.named_modules() if isinstance(m, Linear) and name != "lm_head"
        ),
    }
    if method is None:
        return report | {"total_parameters": report["base_parameters"]}
    with torch.device("meta"):
        adapter = attach(base, {**(settings or {}), "kind": method})
    return report | _method_counts(base, adapter)


def config_of(model: str) -> ModelConfig:
    """The configuration of a model by name, of a folder (config.json is enough) or a .gguf file. Raises ModelError."""
    if model in shapes():
        return shape(model)
    path = Path(model)
    if (path / "config.json").is_file():
        return ModelConfig.from_hf(read_json(path / "config.json"), str(path / "config.json"))
    if path.exists():
        return load_config(path)
    try:
        return shape(model)
    except ModelError as error:
        raise ModelError(f"{error}; or give a model folder or a .gguf file") from None


def _method_counts(model: Llama, adapter: Adapter) -> dict[str, Any]:
    trainable = sum(p.numel() for p in adapter.trainable.values())
    total = sum(p.numel() for p in model.parameters())
    tensors = exported(adapter)[1]
    values = TypeAdapter(type(adapter.settings)).dump_python(adapter.settings, mode="json")
    return {
        "method": adapter.kind,
        "settings": {key: value for key, value in values.items() if value not in (None, {}, [])},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "tensors": len(tensors),
        "file_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "header_bytes": header_bytes(tensors),
        "mergeable": adapter.method.mergeable(adapter.settings),
        "identity_at_init": adapter.method.identity_at_init(adapter.settings),
        "modules": _by_module(adapter),
    }


def _by_module(adapter: Adapter) -> dict[str, dict[str, int]]:
    """Trained parameters and places by module, those of all layers together."""
    owned: dict[str, list[nn.Parameter]] = {
        place: [p for name, p in adapter.trainable.items() if name.startswith(f"{place}.")] for place in adapter.deltas
    }
    found: dict[str, dict[str, int]] = {}
    for name, parameters in [*owned.items(), *((name, [p]) for name, p in adapter.base.items())]:
        entry = found.setdefault(re.sub(r"^model\.(layers\.\d+\.)?", "", name), {"places": 0, "parameters": 0})
        entry["places"] += 1
        entry["parameters"] += sum(p.numel() for p in parameters)
    return found


def header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What a safetensors file has before its data: 8 bytes of length, and the JSON that names float32 `tensors`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entries[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8
