"""Checkpoints: folders of safetensors and JSON, written whole or not at all, checked before they are used.

checkpoint-000200/
  GROUP.safetensors   one file a group of named tensors: adapter, optimizer, rng, ...
  state.json          {"format": 1, "step": 200, "groups": [...], "state": whatever the loop needs to go on}
  COMPLETE            names, sizes and SHA-256 of the files above; written last
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tunesmith.errors import CheckpointError
from tunesmith.files import (
    atomic_folder,
    atomic_save_safetensors,
    atomic_write_json,
    clean_leftovers,
    damage,
    is_complete,
    remove_folder,
)
from tunesmith.train.adamw import HoldsStates

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"^checkpoint-(\d{6,})$")
_GROUP = re.compile(r"^[A-Za-z0-9_.-]+$")


def checkpoint_path(run_folder: str | Path, step: int) -> Path:
    """Give the folder of the checkpoint of `step` (optimizer steps done): RUN/checkpoint-000200."""
    return Path(run_folder) / f"checkpoint-{step:06d}"


def save_checkpoint(
    run_folder: str | Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write RUN/checkpoint-STEP, one safetensors file a group of `tensors`, and give its path.

    `state` must be of JSON's types; floats come back bit for bit, tuples as lists. A checkpoint of the same step is
    replaced. A kill at any moment leaves the earlier checkpoints as they were. Raises DiskError, and CheckpointError
    for a state that JSON cannot hold or a group whose name is no file name.
    """
    for group in tensors:
        if not _GROUP.match(group):
            raise CheckpointError(f"checkpoint group {group!r}: use letters, digits, '_', '-' and '.' only")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the state of checkpoint {step} does not fit JSON ({error}): pass plain values"
        ) from None
    path = checkpoint_path(run_folder, step)
    with atomic_folder(path) as staging:
        for group, named in tensors.items():
            atomic_save_safetensors(staging / f"{group}.safetensors", named)
        record = {"format": FORMAT, "step": step, "groups": list(tensors), "state": dict(state)}
        atomic_write_json(staging / "state.json", record)
    return path


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Give the complete checkpoints of a run, oldest first; an incomplete one is named in a warning and left out."""
    found = []
    for step, path in _folders(run_folder):
        wrong = damage(path, hashes=False)
        if wrong is None:
            found.append((step, path))
        else:
            logger.warning("%s is skipped: %s", path, wrong)
    return [path for _, path in found]


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """Give the newest complete checkpoint of a run, or None; what a killed writer left is cleaned up first."""
    clean_leftovers(run_folder)
    complete = list_checkpoints(run_folder)
    return complete[-1] if complete else None


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: ({group: {name: tensor on the CPU}}, state), exactly what was saved.

    Sizes and hashes are checked first. Raises CheckpointError that names the damaged file and the older checkpoint to
    use instead.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint{_instead(path)}")
    wrong = damage(path)
    if wrong is not None:
        raise CheckpointError(f"{wrong}{_instead(path)}")
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'state.json'}: format {record.get('format')!r} where this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    return {group: load_file(path / f"{group}.safetensors") for group in record["groups"]}, record["state"]


def prune_checkpoints(run_folder: str | Path, keep: int, protect: Iterable[str | Path | None] = ()) -> list[Path]:
    """Remove all but the `keep` newest complete checkpoints; give the paths removed.

    `protect` (paths or folder names, None is ignored) stays whatever its age. At least one complete checkpoint
    always remains, and incomplete ones are left for the user to look at. Raises DiskError.
    """
    protected = {Path(name).name for name in protect if name is not None}
    complete = [path for _, path in _folders(run_folder) if is_complete(path)]
    doomed = [path for path in complete[: -max(keep, 1)] if path.name not in protected]
    for path in doomed:
        remove_folder(path)
    return doomed


def seed_everything(seed: int) -> None:
    """Seed every generator whose state a checkpoint keeps, so that two runs with one seed save the same bytes."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every CUDA device's as well


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the state of Python's, numpy's, torch's and every CUDA device's generator as (tensors, JSON-able state)."""
    import numpy

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy.asarray(keys).astype("int64")),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return tensors, state


def restore_rng_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put every generator back to what `rng_state` gave.

    Raises CheckpointError if the state was taken with another number of CUDA devices: an exact resume is impossible.
    """
    import numpy

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved = sum(name.startswith("cuda.") for name in tensors)
    if saved != devices:
        raise CheckpointError(
            f"the checkpoint holds the random state of {saved} CUDA devices and this process sees {devices}: "
            "resume on the same machine, or set CUDA_VISIBLE_DEVICES to as many"
        )
    version, gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if devices:
        torch.cuda.set_rng_state_all([tensors[f"cuda.{index}"] for index in range(devices)])


def pack_optimizer(optimizer: HoldsStates, names: Mapping[Parameter, str]) -> dict[str, Tensor]:
    """Give the optimizer's state as flat tensors: {"NAME.exp_avg": ..., "NAME.exp_avg_sq": ..., "NAME.step": ...}.

    Nothing is copied. Learning rate and decay are no part of it: they follow from the configuration and the step.
    Raises CheckpointError for a parameter without a name.
    """
    packed: dict[str, Tensor] = {}
    known: Mapping[Any, str] = names
    for parameter, entries in optimizer.states().items():
        name = known.get(parameter)
        if name is None:
            raise CheckpointError(f"an optimized parameter of shape {tuple(parameter.shape)} has no name to save it by")
        packed |= {f"{name}.{key}": value for key, value in entries.items()}
    return packed


def unpack_optimizer(optimizer: HoldsStates, names: Mapping[Parameter, str], tensors: Mapping[str, Tensor]) -> None:
    """Put what `pack_optimizer` gave back into an optimizer over parameters of the same names and shapes.

    Raises CheckpointError, before anything is changed, if a name or a shape does not fit.
    """
    parameters: dict[str, Parameter] = {
        names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]
    }
    state: dict[Parameter, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"optimizer state {full!r} has no parameter here: resume with the run's own adapter")
        parameter = parameters[name]
        _check_state(full, value, optimizer.layout(parameter).get(key))
        state.setdefault(parameter, {})[key] = value
    optimizer.put(state)


def _check_state(name: str, value: Tensor, expected: tuple[tuple[int, ...], torch.dtype] | None) -> None:
    """Raise CheckpointError for a state that the optimizer has not, or not so."""
    found = (tuple(value.shape), value.dtype)
    if found != expected:
        own = "has none" if expected is None else f"has {expected[0]}, {expected[1]}"
        raise CheckpointError(
            f"optimizer state {name!r} is {found[0]}, {found[1]} where this run's optimizer {own}: "
            "resume with the run's own adapter settings and train.optimizer"
        )


def _folders(run_folder: str | Path) -> list[tuple[int, Path]]:
    folder = Path(run_folder)
    matches = ((_NAME.match(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def _instead(path: Path) -> str:
    """Name the newest complete older checkpoint, as the way out."""
    match = _NAME.match(path.name)
    step = int(match[1]) if match else None
    older = [other for at, other in _folders(path.parent) if (step is None or at < step) and damage(other) is None]
    return f"; use {older[-1]}" if older else "; there is no older complete checkpoint: start the run anew"
