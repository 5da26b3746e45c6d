"""Which folder a run has, which checkpoint it goes on from, and what its start chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunesmith.config import Run, load_run
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.files import is_complete
from tunesmith.train.checkpoint import latest_checkpoint


def run_folder(run: Run) -> tuple[Path, Path | None]:
    """The folder of the run, and the checkpoint to go on from. Raises ConfigError, CheckpointError."""
    resume = run.train.resume
    if resume is None:
        return _new_folder(run), None
    path = Path(resume)
    if resume == "latest":
        if run.name is None:
            raise ConfigError("train.resume: give the run's name, or its folder: tunesmith train --resume runs/NAME")
        path = Path(run.output_dir) / run.name
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run folder to resume from")
    if path.name.startswith("checkpoint-"):
        if not is_complete(path):
            raise CheckpointError(f"{path}: is not a complete checkpoint; resume from the run folder {path.parent}")
        return path.parent, path
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: has no complete checkpoint to resume from, so nothing of it is lost: remove the folder and start "
            "the run again"
        )
    return path, checkpoint


# What a run that failed or was stopped before its first step leaves: another may begin there.
_BEFORE_TRAINING = {"config.yaml", "before.json", "base"}


def _new_folder(run: Run) -> Path:
    if run.name is not None:
        folder = Path(run.output_dir) / run.name
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or found - _BEFORE_TRAINING:
            way = f"go on with --resume {folder}" if latest_checkpoint(folder) else "remove that folder"
            raise ConfigError(f"name: {folder} is there already; choose another name, or {way}")
        return folder
    parts = (Path(run.model.path).stem, Path(run.data.train).name.split(".")[0], str(run.adapter["kind"]))
    stem = "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in part) for part in parts)
    folder, number = Path(run.output_dir) / stem, 1
    while folder.exists():
        number += 1
        folder = Path(run.output_dir) / f"{stem}-{number}"
    return folder


def as_begun(run: Run, folder: Path) -> Run:
    """The run with what its start chose by itself (RUN/config.yaml): memory or hardware may look different now."""
    if not (folder / "config.yaml").is_file():
        return run
    begun, _ = load_run(folder / "config.yaml")
    model, train = run.model, run.train
    if model.dtype == "auto":
        model = replace(model, dtype=begun.model.dtype)
    if model.device == "auto":
        model = replace(model, device=begun.model.device)
    pack, rate = train.pack_tokens or begun.train.pack_tokens, train.learning_rate or begun.train.learning_rate
    return replace(run, model=model, train=replace(train, pack_tokens=pack, learning_rate=rate))
