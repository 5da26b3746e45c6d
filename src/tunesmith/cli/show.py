"""`tunesmith inspect` and `env`: look at files and at the machine, changing nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.shell import app, command, out, out_json
from tunesmith.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@command(app, "inspect")
def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH | KEY=VALUE ...]",
            help="A run, an adapter or a model folder; with --method, the method's settings.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Count without weights: llama-7b or the like, a model folder or a .gguf file."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="KIND", help="Method to count on --model: lora, ia3, full, ...")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a folder or file holds, or what a method would train in a model. Loads no model's weights.

    \b
    tunesmith inspect runs/NAME
    tunesmith inspect --model llama-7b --method lora rank=8 target_modules=[q_proj,v_proj] --json
    """
    given = list(words or [])
    if model is None and method is None:
        if len(given) != 1:
            raise ConfigError(
                "inspect: give one PATH, or --model NAME --method KIND and the method's KEY=VALUE settings"
            )
        from tunesmith.export.inspect import inspect_path

        return show(inspect_path(Path(given[0])), json)
    if model is None or (given and method is None):
        raise ConfigError(
            f"inspect: {'--method' if model is None else given[0]!r} needs --{'model' if model is None else 'method'}"
        )
    from tunesmith.export.counts import count

    show(count(model, method, method_settings(given)), json)


def method_settings(words: list[str]) -> dict[str, Any]:
    """Return a method's settings from KEY=VALUE words; `adapter.KEY` is the same key. Raises ConfigError."""
    from tunesmith.config.source import parse_value

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("adapter.")
        if not equals or not key or key == "kind" or key in settings:
            faults = {key in settings: "is given twice", key == "kind": "belongs into --method"}
            raise ConfigError(f"inspect: {word!r} {faults.get(True, 'is no setting; with --model, give KEY=VALUE')}")
        settings[key] = parse_value(text, key)
    return settings


@command(app, "env")
def env(json: Json = False) -> None:
    """Print what a bug report needs: versions, processor, memory, GPUs, folders."""
    from tunesmith.hardware import describe

    show(describe(), json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON, or as aligned lines with nested mappings and lists of mappings indented."""
    if as_json:
        out_json(report)
    else:
        _lines(report, 0)


def _lines(report: dict[str, Any], depth: int) -> None:
    for key, value in report.items():
        name = str(key) if "." in str(key) else str(key).replace("_", " ")  # a module keeps its name
        label = f"{'  ' * depth}{name}"
        if isinstance(value, dict):
            out(label)
            _lines(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                out(label)
                _lines(item, depth + 1)
        else:
            words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            out(f"{label:<28} {'-' if words in (None, '') else words}")
