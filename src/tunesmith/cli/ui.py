"""`tunesmith ui`: a web page to chat, to hold models side by side, to look at runs and to start one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.serve import Host, KeyFile, Name, read_key, what_to_serve
from tunesmith.cli.shell import app, command, note
from tunesmith.cli.use import Adapters, Device, Dtype, Model, Target
from tunesmith.errors import ConfigError

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
    if missing := [each for each in NEEDED if find_spec(each) is None]:
        raise ConfigError(f"the page needs {', '.join(missing)}; install it with: pip install 'tunesmith[ui]'")
    key = read_key(api_key_file)
    from tunesmith.serve.guard import check_address

    check_address(host, key)
    open_files(method_file)
    named, base = what_to_serve(target, model, adapter)
    from tunesmith import api
    from tunesmith.serve.engine import Limits
    from tunesmith.serve.registry import Registry, model_name
    from tunesmith.serve.ui.page import Options
    from tunesmith.serve.ui.start import run

    loaded, infos = api.load_for(base, named, dtype=dtype, device=device)
    registry = Registry(loaded.model, loaded.tokenizer, loaded.identity, name or model_name(loaded.name), folder=runs)
    for each, info in infos.items():
        registry.add(each, info.folder)
    options = Options(runs.resolve(), loaded.name, max_new_tokens, key)
    run(registry, host, port, options, Limits(), note)
