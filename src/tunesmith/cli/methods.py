"""`--method-file FILE.py`: methods of the user's own. Only what a command names is opened, never what a file names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunesmith.config import Run

MethodFiles = Annotated[
    list[str] | None,
    typer.Option("--method-file", metavar="FILE.py", help="A method of your own, as Python; may be repeated."),
]

_OF_RUN = ("adapter", "before.json", "metrics.jsonl", "verify.json", "verify_probe.safetensors")


def open_files(files: list[str] | None) -> None:
    """Open the files of --method-file. Raises ConfigError."""
    if files:
        from tunesmith.adapters import open_method

        for file in files:
            open_method(file)


def is_of_run(config: Path) -> bool:
    """Does this configuration lie in a run folder? Tunesmith wrote it then, or whoever made the folder."""
    return config.name == "config.yaml" and any((config.parent / name).exists() for name in _OF_RUN)


def with_own_methods(run: Run) -> Run:
    """Open the files that the user's own configuration names as `adapter.kind`; the run then says their kinds."""
    if ".py" not in str(run.adapter):  # no file, so nothing heavy is imported yet
        return run
    from tunesmith.adapters import open_named

    return replace(run, adapter=open_named(run.adapter))
