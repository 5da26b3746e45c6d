"""Reading somebody else's adapter files: what is understood, what is harmless, and everything else refused by name.

Nothing named in these files (a path, a module, custom code) is opened or imported, and no pickle is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import AdapterError

PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"  # the one key of PEFT's prompt methods, which stands without the prefix
MAX_JSON = 16 << 20
MAX_PATTERNS = 2000  # entries of a list or mapping of patterns
_MAX_PATTERN = 1000  # characters
_MAX_REPEATS = 5  # in a pattern: every further one makes a failing match some 8 times as long (5: 2 ms a module)
_MAX_REPEATS_OF_MANY, _MAX_REPEATING = 3, 50  # in each of several patterns, and patterns that have any
_MOST_LISTED = 5
# Files of weights as PEFT, pyreft, Lit-LLaMA and LitGPT save them.
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "intkey_*.bin", "*.pth", "*.pth.*")
# Wrappers whose names end up in front of PEFT's keys when a wrapped model is saved.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.")

# True of every PEFT type: what a run was called or how it was trained, nothing that is computed when it is used.
HARMLESS = frozenset(
    "peft_type task_type base_model_name_or_path revision inference_mode peft_version auto_mapping runtime_config "
    "megatron_config megatron_core".split()
)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises AdapterError for a missing, damaged or absurdly large file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise AdapterError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no adapter's description is")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; give an adapter folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({str(error)[:80]}); copy it again") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: holds {type(value).__name__} where an object of keys belongs")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file of an adapter. Raises AdapterError, then or in the block, if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        refuse_pickle(path.parent)
        raise AdapterError(f"{path}: missing, so there are no weights; copy the whole adapter folder")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path}: damaged ({str(error)[:80]}); copy it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, copied. Raises AdapterError for a missing, damaged or empty one."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    if not tensors:
        raise AdapterError(
            f"{path}: an empty adapter of {path.stat().st_size} bytes: its state dict was filtered twice when it was "
            "saved (the trained weights are not in it); save it again from the run, or from a checkpoint"
        )
    return tensors


def refuse_pickle(folder: Path) -> None:
    """Raise AdapterError, with the command that converts, where the weights only exist as a pickle."""
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise AdapterError(
                f"{path}: a pickle, which can run code when opened, is not read; convert it where you trust it, with "
                "the script in Tunesmith's repository (see docs/interchange.md): python tools/convert_adapter.py "
                f"{folder} --out FOLDER"
            )


def check_keys(
    config: Mapping[str, Any], known: Collection[str], harmless: Collection[str], where: str, **neutral: Collection[Any]
) -> None:
    """Raise AdapterError for a key that may change what is computed and is not understood.

    `known` keys are read by the caller and `harmless` ones never matter; a key in `neutral` may have one of those
    values; any other must be null, false or empty.
    """
    for key, value in config.items():
        if key in known or key in harmless or key in HARMLESS:
            continue
        allowed = any(value is v or (type(value) is type(v) and value == v) for v in neutral.get(key, ()))
        if not allowed and not (value is None or value is False or value in ("", [], {})):
            raise AdapterError(
                f"{where}: {key[:60]}={str(value)[:60]!r} changes what the adapter computes and is not supported; "
                "merge it with the tool that made it (in PEFT: merge_and_unload) and use the result as the base model"
            )


def check_pattern(pattern: str, where: str, most: int = _MAX_REPEATS) -> int:
    """Return how many repeats a regular expression from a file has.

    Raises AdapterError for one that is malformed or could take for ever to match: more than `most` repeats, a repeat of
    what may itself match in several ways, a back reference.
    """
    try:
        if len(pattern) > _MAX_PATTERN:
            raise AdapterError(f"{where}: a regular expression of {len(pattern)} characters; list the modules instead")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{where}: {pattern[:60]!r} is no regular expression: {str(error)[:60]}") from None
    repeats = _repeats(pattern)
    if repeats > most:
        raise AdapterError(
            f"{where}: {pattern[:60]!r} could take for ever to match (repeats within repeats, back references, or more "
            f"than {most} repeats); list the modules by name instead"
        )
    return int(repeats)


def _repeats(pattern: str) -> float:
    """How many repeats a pattern has; infinity for nested ones and back references."""
    plain = re.sub(r"\[\^?\]?(\\.|[^\]\\])*\]", "x", re.sub(r"\\[^\d]", "x", pattern)).replace("(?", "(")
    if re.search(r"\\\d|\(P=", plain):
        return math.inf
    choices, repeats = [False], 0
    for i, char in enumerate(plain):
        if char == "(":
            choices.append(False)
        elif char == ")":
            inner = choices.pop() if len(choices) > 1 else False
            if inner and plain[i + 1 : i + 2] in ("*", "+", "{"):
                return math.inf
            choices[-1] |= inner
        elif char in "*+?{|":
            choices[-1] = True
            lazy = char == "?" and plain[i - 1 : i] in ("*", "+", "}", "?")
            repeats += char != "|" and not lazy
    return repeats


def plain_keys(tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[str, Tensor]]:
    """Return {the model's own module path + what it is: (the file's key, tensor)}.

    Takes away PEFT's prefix, however often and with whatever wrapper's name before it, and the adapter's name that
    older versions left in (`lora_A.default.weight`). Raises AdapterError where two keys then mean the same.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key
        while prefix := next((p for p in (PREFIX, *_WRAPPERS) if name.startswith(p)), None):
            name = name[len(prefix) :]
        name = name.replace("._fsdp_wrapped_module.", ".").replace("._orig_mod.", ".")
        name = re.sub(r"\.(lora_[AB])\.default(\.weight)?$", r".\1.weight", name)
        if name in found:
            raise AdapterError(
                f"{where}: {key[:120]} and {found[name][0][:120]} mean the same; save one adapter a file"
            )
        found[name] = (key, tensor)
    return found


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[str, Tensor]], where: str, prefix: str = PREFIX
) -> None:
    """Raise AdapterError unless `found` (see `plain_keys`) has exactly the names and shapes `expected`, all finite."""
    bad = [f"{prefix}{name} is missing" for name in expected if name not in found]
    if len(bad) == len(expected) and found:
        first = next(iter(found.values()))[0]
        raise AdapterError(
            f"{where}: none of its {len(found)} keys belongs to this model and these settings (the first is "
            f"{first[:120]!r}, expected {prefix + next(iter(expected))!r}); is this the right base model?"
        )
    for name, (key, tensor) in found.items():
        if name not in expected:
            bad.append(f"{key[:120]} is unexpected")
        elif tuple(tensor.shape) != expected[name]:
            bad.append(f"{key} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif not tensor.is_floating_point():
            bad.append(f"{key} is {tensor.dtype}, not a floating-point tensor")
        elif not bool(torch.isfinite(tensor).all()):
            bad.append(f"{key} holds NaN or infinity")
    if bad:
        more = f"; and {len(bad) - _MOST_LISTED} more" if len(bad) > _MOST_LISTED else ""
        raise AdapterError(
            f"{where}: {len(bad)} bad tensors: {'; '.join(bad[:_MOST_LISTED])}{more}; do weights, settings and base "
            "belong together?"
        )


def whole(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return a positive integer of `config`. Raises AdapterError."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise AdapterError(f"{where}: {key}={str(value)[:60]!r} should be a positive integer")
    return value


def number(config: Mapping[str, Any], key: str, where: str, default: float, least: float = 0.0) -> float:
    """Return a finite number of at least `least`. Raises AdapterError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise AdapterError(f"{where}: {key}={str(value)[:60]!r} should be a number of at least {least:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    """Return a truth value, false where it is absent. Raises AdapterError."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise AdapterError(f"{where}: {key}={str(value)[:60]!r} should be true or false")
    return value


def patterns(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a mapping of patterns of module names, each safe to match; empty where absent. Raises AdapterError."""
    value = config.get(key) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise AdapterError(f"{where}: {key} should map module names to numbers, at most {MAX_PATTERNS} of them")
    repeating = sum(check_pattern(pattern, f"{where}: {key}", _MAX_REPEATS_OF_MANY) > 0 for pattern in value)
    if repeating > _MAX_REPEATING:
        raise AdapterError(f"{where}: {key}: {repeating} patterns with repeats; name the modules instead")
    return value


def names(config: Mapping[str, Any], key: str, where: str) -> list[str] | str:
    """Return a list of module names, or one regular expression that is safe to match. Raises AdapterError."""
    value = config.get(key)
    if isinstance(value, str) and value:
        check_pattern(value, f"{where}: {key}")
        return value
    listed = isinstance(value, list) and 0 < len(value) <= MAX_PATTERNS
    if not listed or not all(isinstance(name, str) and name for name in value or []):
        raise AdapterError(f"{where}: {key}={str(value)[:60]!r} should list module names (at most {MAX_PATTERNS})")
    return list(value or [])
