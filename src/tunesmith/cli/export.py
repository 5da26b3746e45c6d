"""`tunesmith export`: a model or an adapter in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.merge import Base, Onto
from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, note, out, out_json
from tunesmith.errors import ConfigError


@command(app, "export")
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="A run, an adapter folder, or a model.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write; a file for gguf, gguf-lora.")
    ] = None,
    to: Annotated[str, typer.Option("--to", "-t", help="hf, peft, gguf, gguf-lora, ollama or vllm.")] = "hf",
    type: Annotated[
        str | None, typer.Option("--type", help="Of GGUF: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0. Of hf: F32...")
    ] = None,
    base: Base = None,
    onto: Onto = None,
    name: Annotated[str | None, typer.Option("--name", help="Name inside the file, or of the adapter (vllm).")] = None,
    read_back: Annotated[
        bool, typer.Option("--read-back/--no-read-back", help="Let the other tool's own reader check it.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Keep a lossy result, or write over what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    method_file: MethodFiles = None,
) -> None:
    """Write a run, an adapter or a model for another tool, and read it back with that tool's own reader.

    \b
    tunesmith export runs/NAME merged --to hf
    tunesmith export runs/NAME model.gguf --to gguf --type Q8_0
    tunesmith export runs/NAME adapter.gguf --to gguf-lora
    """
    if destination is None:
        raise ConfigError(f"OUT is missing: say where to write, for example: tunesmith export {target} OUT --to {to}")
    open_files(method_file)
    from tunesmith import api

    report = api.export(
        target, to=to, out=destination, base=base, type=type, onto=onto, name=name, read_back=read_back, force=force
    )
    if json:
        out_json(report)
        return
    for key, value in report.items():
        for line in value if isinstance(value, list) else [value]:
            note(f"{key.replace('_', ' '):<24} {line}")
    out(str(destination))
