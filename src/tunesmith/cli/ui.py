"""`tunesmith ui`: a web page to chat, to hold models side by side, to look at runs and to start one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.serve import Host, KeyFile, Name, check_installed, checked_key, open_registry, what_to_serve
from tunesmith.cli.shell import app, command, note
from tunesmith.cli.use import Adapters, Device, Dtype, Model, Target

NEEDED = ("gradio", "fastapi", "uvicorn")

Runs = Annotated[Path, typer.Option("--runs", help="Folder of runs: shown, offered in the chat, and made in.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer that may be chosen.")]


@command(app, "ui")
def ui(
    target: Target = None,
    model: Model = None,
    adapter: Adapters = None,
    runs: Runs = Path("runs"),
    name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    api_key_file: KeyFile = None,
    max_new_tokens: Longest = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method_file: MethodFiles = None,
) -> None:
    """Open a web page on a model and its adapters: chat, side by side, runs, data and training.

    \b
    tunesmith ui --model smollm2-135m-instruct
    tunesmith ui runs/NAME
    tunesmith ui --model M --adapter a=runs/A --adapter b=runs/B --runs runs
    """
    check_installed(NEEDED, "ui")
    key = checked_key(api_key_file, host)
    open_files(method_file)
    named, base = what_to_serve(target, model, adapter)
    called, registry = open_registry(named, base, name, runs, dtype, device)
    from tunesmith.serve.engine import Limits
    from tunesmith.serve.ui.page import Options
    from tunesmith.serve.ui.start import run

    options = Options(runs.resolve(), called, max_new_tokens, key)
    run(registry, host, port, options, Limits(), note)
