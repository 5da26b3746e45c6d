"""`tunesmith data preview`: see what is supervised before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.shell import app, command
from tunesmith.cli.train import Data, Model, Words, read_run
from tunesmith.errors import ConfigError

group = typer.Typer(
    help="Look at data as a run would see it.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
app.add_typer(group, name="data")


@command(group, "preview")
def preview(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    template: Annotated[str | None, typer.Option("--template", "-t", help="Prompt template.")] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Show in colour what is supervised, with counts: tokens, rows cut, missing EOS, double BOS, duplicates.

    \b
    tunesmith data preview config.yaml
    tunesmith data preview --model smollm2-135m-instruct --data reviews.jsonl --template alpaca
    """
    words, data = _path_as_data(words or [], data)
    flags: dict[str, Any] = {"model.path": model, "data.train": data, "data.template": template}
    if not words and data is None:
        raise ConfigError("nothing to preview: give a YAML file, or --model NAME and --data FILE")
    run = read_run(words, flags)
    from tunesmith import api

    api.preview_data(run, rows=rows, as_json=json)


def _path_as_data(words: list[str], data: str | None) -> tuple[list[str], str | None]:
    """A path that is no YAML file is the data itself: `tunesmith data preview reviews.jsonl --model M`."""
    paths = [word for word in words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    if not paths:
        return words, data
    if data is not None or len(paths) > 1:
        raise ConfigError(f"{paths[-1]!r}: one data set at a time; settings are written key=value")
    return [word for word in words if word not in paths], str(Path(paths[0]))
