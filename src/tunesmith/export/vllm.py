"""vLLM's multi-LoRA layout: a folder of adapters by name beside one base, and the command that serves them all.

    OUT/adapters/NAME/adapter_config.json, adapter_model.safetensors      one rank and one alpha, plain LoRA
    OUT/layout.json      the base, its hash, and each adapter's rank
    OUT/serve.sh         vllm serve BASE --enable-lora --max-lora-rank R --max-loras N --lora-modules NAME=PATH ...

Exporting another adapter to the same OUT adds it. `faults` holds an adapter folder against vLLM's rules, as its
documentation and its reader of adapter_config.json state them: `r` at most `max_lora_rank`, no `use_dora`, no `bias`,
no `modules_to_save`; a single alpha for all modules (`rank_pattern` and `alpha_pattern` are passed over there).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.adapters import Adapter
from tunesmith.adapters.peft_config import PREFIX, read_object, read_tensors
from tunesmith.errors import CannotExchange, ConfigError, VerificationError
from tunesmith.export.plain_lora import pairs_of, uniform
from tunesmith.export.subject import Subject
from tunesmith.files import atomic_folder, atomic_save_safetensors, atomic_write_json, atomic_write_text

WHERE = "--to vllm"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEY = re.compile(r"base_model\.model\.(model\.layers\.\d+\.\w+\.(\w+))\.lora_([AB])\.weight")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def export_vllm(subject: Subject, out: Path, name: str, force: bool) -> dict[str, Any]:
    """Add the subject's adapter to the layout in `out` under `name`. Raises CannotExchange, ConfigError."""
    if subject.adapter is None:
        raise ConfigError(f"{WHERE}: {subject.name} has no adapter; vLLM serves a model folder as it is (--to hf)")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name: {name!r}: use letters, digits, dots, - and _: it becomes a folder and a model's name"
        )
    layout = _layout(out, subject)
    folder = out / "adapters" / name
    if folder.exists() and not force:
        raise ConfigError(f"--name: {folder} is there already; choose another name, or --force to replace it")
    rank = _write(folder, subject.adapter, subject)
    if found := faults(folder):
        raise VerificationError(f"{folder}: against vLLM's rules: {'; '.join(found)}")
    layout["adapters"] = {**layout["adapters"], name: rank}
    atomic_write_json(out / "layout.json", layout)
    atomic_write_text(out / "serve.sh", serve_command(layout, out))
    return {"adapter": str(folder), "rank": rank, "adapters": sorted(layout["adapters"]), "run_by_vllm": False}


def serve_command(layout: Mapping[str, Any], out: Path) -> str:
    """The script that serves every adapter of a layout."""
    ranks = layout["adapters"].values()
    most = next(allowed for allowed in RANKS if allowed >= max(ranks))
    modules = " ".join(f'{shlex.quote(name)}="$here/adapters/{name}"' for name in sorted(layout["adapters"]))
    return (
        "#!/bin/sh\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        f"exec vllm serve {shlex.quote(layout['base'])} --enable-lora --max-lora-rank {most} "
        f'--max-loras {len(layout["adapters"])} --lora-modules {modules} "$@"\n'
    )


def faults(folder: Path) -> list[str]:
    """What in an adapter folder is against vLLM's rules; empty where nothing is."""
    config, tensors = read_object(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
    rank = config.get("r")
    found = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r}: only LORA is served")
    if isinstance(rank, int) and rank > RANKS[-1]:
        found.append(f"r={rank}: at most {RANKS[-1]}")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}: only 'none'")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if config.get(key):
            found.append(f"{key} is set")
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in MODULES:
            found.append(f"{key[:80]} is not the A or B of a linear that is served")
        elif tensor.shape[0 if match[3] == "A" else 1] != rank:
            found.append(f"{key} has another rank than r={rank}")
        elif key.replace(f"lora_{match[3]}", "lora_B" if match[3] == "A" else "lora_A") not in tensors:
            found.append(f"{key} has no counterpart")
    return found


def _write(folder: Path, adapter: Adapter, subject: Subject) -> int:
    pairs = pairs_of(adapter, WHERE)
    if other := [path for path in pairs if path.rpartition(".")[2] not in MODULES]:
        raise CannotExchange(
            f"{WHERE}: {other[0]} is no linear of the blocks, and vLLM serves LoRA on those; merge it instead: --to hf"
        )
    rank, alpha, made = uniform(pairs)
    if rank > RANKS[-1]:
        raise CannotExchange(f"{WHERE}: rank {rank} is above {RANKS[-1]}, which is what vLLM serves; merge it: --to hf")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": subject.name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({path.rpartition(".")[2] for path in pairs}),
        "layers_to_transform": sorted({int(path.split(".")[2]) for path in pairs}),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for path, (A, B) in made.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B
    with atomic_folder(folder) as staging:
        atomic_write_json(staging / "adapter_config.json", config)
        atomic_save_safetensors(staging / "adapter_model.safetensors", tensors, {"format": "pt"})
    return rank


def _layout(out: Path, subject: Subject) -> dict[str, Any]:
    """The layout that is there, for the same base, or a new one. Raises ConfigError."""
    file = out / "layout.json"
    if not file.is_file():
        if out.is_file() or out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"--out: {out} holds something else; give a new folder, or one that --to vllm wrote")
        return {"base": subject.name, "sha256": subject.identity["sha256"], "adapters": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        same = found["sha256"] == subject.identity["sha256"]
        adapters = {str(name): int(rank) for name, rank in found["adapters"].items()}
        base = str(found["base"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}); give a new folder") from None
    if not same:
        raise ConfigError(
            f"--out: {out} is for the base {base}; an adapter of {subject.name} needs a folder of its own"
        )
    there = {name: rank for name, rank in adapters.items() if (out / "adapters" / name).is_dir()}
    return {"base": base, "sha256": found["sha256"], "adapters": there}
