"""`tunesmith serve`: answer many clients at once, with one base and its adapters, over OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.methods import MethodFiles, open_files
from tunesmith.cli.shell import app, command, note
from tunesmith.cli.use import Adapters, Device, Dtype, Model, Target
from tunesmith.errors import ConfigError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.serve.registry import Registry

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
KEY = "TUNESMITH_API_KEY"


Folder = Annotated[
    Path | None,
    typer.Option("--adapters", help="Folder of adapters or runs: all are served; more may be loaded from it."),
]
Name = Annotated[str | None, typer.Option("--name", help="What the base is called; else its own name.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; beyond loopback only with a key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="File with the key; or set TUNESMITH_API_KEY.")]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer of a chat that does not say.")]
Heat = Annotated[float, typer.Option("--temperature", min=0, max=2, help="Of requests that do not say; 1 is OpenAI's.")]
Answers = Annotated[int, typer.Option("--answers", min=8, help="Answers generated at once.")]
Waiting = Annotated[int, typer.Option("--waiting", min=0, help="Prompts that may wait; beyond them: 429.")]
Queue = Annotated[float, typer.Option("--queue-seconds", min=0.1, help="Longest wait in the queue.")]
Longer = Annotated[float, typer.Option("--request-seconds", min=0.1, help="Longest time in all.")]
Cache = Annotated[int, typer.Option("--cache-mib", min=1, help="Keys and values of running answers.")]
Prefixes = Annotated[int, typer.Option("--prefix-cache-mib", min=0, help="Keys and values kept of prompts; 0: none.")]


@command(app, "serve")
def serve(
    target: Target = None,
    model: Model = None,
    adapter: Adapters = None,
    adapters: Folder = None,
    name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    max_new_tokens: Longest = 512,
    temperature: Heat = 1.0,
    answers: Answers = 32,
    waiting: Waiting = 256,
    queue_seconds: Queue = 60,
    request_seconds: Longer = 600,
    cache_mib: Cache = 1024,
    prefix_cache_mib: Prefixes = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method_file: MethodFiles = None,
) -> None:
    """Serve a model and its adapters to OpenAI clients; a request chooses by `model`.

    \b
    tunesmith serve runs/NAME
    tunesmith serve --model M --adapter a=runs/A --adapter b=runs/B --port 8000
    tunesmith serve --model M --adapters runs --host 0.0.0.0 --api-key-file key.txt
    """
    check_installed(NEEDED, "serve")
    key = checked_key(api_key_file, host)
    open_files(method_file)
    named, base = what_to_serve(target, model, adapter)
    _, registry = open_registry(named, base, name, adapters, dtype, device)
    from tunesmith.serve.api import Options
    from tunesmith.serve.engine import Limits
    from tunesmith.serve.start import run

    for line in load_all(registry, set(named)):
        note(line)
    note(f"models: {', '.join(entry.name for entry in registry.entries)}")
    mib = 1 << 20
    limits = Limits(answers, waiting, queue_seconds, request_seconds, cache_mib * mib, prefix_cache_mib * mib)
    run(registry, host, port, Options(key, max_new_tokens, temperature), limits, note)


def check_installed(needed: Sequence[str], extra: str) -> None:
    """Raise ConfigError where a library is not there that the extra brings."""
    if missing := [each for each in needed if find_spec(each) is None]:
        raise ConfigError(f"this needs {', '.join(missing)}; install it with: pip install 'tunesmith[{extra}]'")


def checked_key(file: Path | None, host: str) -> str | None:
    """The key, before anything is loaded. Raises ConfigError for an address that needs one, and for a bad one."""
    from tunesmith.serve.guard import check_address

    key = read_key(file)
    check_address(host, key)
    return key


def open_registry(
    named: Mapping[str, Path], base: str | None, name: str | None, folder: Path | None, dtype: str, device: str
) -> tuple[str, Registry]:
    """Load the base (None: the one that the adapters name) and the named adapters; also how the base was called."""
    from tunesmith import api
    from tunesmith.model.as_stored import hold_as_stored
    from tunesmith.serve.registry import Registry, model_name

    loaded, infos = api.load_for(base, named, dtype=dtype, device=device)
    hold_as_stored(loaded.model, loaded.path)
    registry = Registry(loaded.model, loaded.tokenizer, loaded.identity, name or model_name(loaded.name), folder=folder)
    for each, info in infos.items():
        registry.add(each, info.folder)
    return loaded.name, registry


def read_key(file: Path | None) -> str | None:
    """The key from a file or the environment; never from the command line, which others on the machine can read."""
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if not key:
        raise ConfigError(f"--api-key-file {file}: is empty")
    return key


def what_to_serve(
    target: str | None, model: str | None, adapters: list[str] | None
) -> tuple[dict[str, Path], str | None]:
    """Return the adapters by public name and the base (None: the one that they name). Raises ConfigError."""
    from tunesmith.adapters.peft_format import adapter_folder

    words = list(adapters or [])
    if target is not None and (model is not None or adapter_folder(Path(target)) is not None):
        words.insert(0, target)
    elif target is not None:
        model = target
    named: dict[str, Path] = {}
    for word in words:
        given, equals, path = word.partition("=")
        where = Path(path if equals else word)
        public = given if equals else (where.parent if where.name == "adapter" else where).resolve().name
        if public in named:
            raise ConfigError(f"--adapter {word}: the name {public!r} is taken; give another as NAME=PATH")
        named[public] = where
    if model is None and not named:
        raise ConfigError("nothing to serve: give a run folder, or --model NAME and perhaps --adapter PATH")
    return named, model


def load_all(registry: Registry, taken: set[str]) -> list[str]:
    """Load what the folder of adapters holds; a line for each that cannot be served beside the others."""
    lines = []
    for name in registry.loadable():
        if name not in taken:
            try:
                registry.add(name)
            except TunesmithError as error:
                lines.append(f"not served: {name}: {error}")
    return lines
