"""`tunesmith train` (alias `finetune`), `plan` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tunesmith.cli.methods import MethodFiles, is_of_run, open_files, with_own_methods
from tunesmith.cli.shell import app, command, console, note, out, out_json
from tunesmith.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from tunesmith.config import Run

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG|KEY=VALUE", help="A YAML file, and settings that replace its own."),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model: hub or catalog name, folder, .gguf file.")
]
Data = Annotated[str | None, typer.Option("--data", "-d", help="Training data: file, folder or catalog name.")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", help="Folder that run folders are made in.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run's folder.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="[PATH]", help="Go on from a checkpoint; without PATH, the run's latest."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class _TrainCommand(TyperCommand):
    """Lets `--resume` stand alone: the latest checkpoint is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Complete a bare `--resume` before the options are parsed."""
        return super().parse_args(ctx, complete_resume(args))


def complete_resume(args: list[str]) -> list[str]:
    """Return `args` with `latest` after a `--resume` that no path follows."""
    done: list[str] = []
    for i, word in enumerate(args):
        done.append(word)
        after = args[i + 1] if i + 1 < len(args) else "-"
        if word == "--resume" and (after.startswith("-") or "=" in after or after.endswith((".yaml", ".yml"))):
            done.append("latest")
    return done


def train(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    output_dir: OutputDir = None,
    name: Name = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    resume: Resume = None,
    method_file: MethodFiles = None,
) -> None:
    """Train an adapter, verify what was saved, and print the run folder.

    \b
    tunesmith train --model smollm2-135m-instruct --data movie-reviews
    tunesmith train config.yaml train.epochs=3 adapter.rank=16
    tunesmith train --resume runs/NAME
    """
    open_files(method_file)
    run = read_run(
        words or [],
        {
            "model.path": model,
            "data.train": data,
            "output_dir": output_dir,
            "name": name,
            "train.epochs": epochs,
            "train.learning_rate": learning_rate,
            "train.resume": resume,
        },
    )
    from tunesmith.workflow import train_run

    out(str(train_run(run, console()).folder))


command(app, "train", cls=_TrainCommand)(train)
command(app, "finetune", cls=_TrainCommand, help="The same as train.")(train)


@command(app, "plan")
def plan(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="No data: rows of N tokens; the model may be a shape's name.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many such rows.")] = 256,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", help="What another machine has, instead of this one.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Beside it, what plain padded training would need.")
    ] = False,
    ways: Annotated[bool, typer.Option("--ways", help="Settings that need less, even where the run fits.")] = False,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Time an epoch on this machine.")] = True,
    method_file: MethodFiles = None,
    json: Json = False,
) -> None:
    """Print what a run would need and do, without training: memory by part, time, steps, and what would fit.

    \b
    tunesmith plan config.yaml train.recompute=true
    tunesmith plan --model llama-65b --tokens 512 --memory 48 quant.kind=nf4 adapter.rank=64 model.device=cuda
    """
    open_files(method_file)
    flags = {"model.path": model, "data.train": data or (MADE_UP if tokens else None)}
    run = read_run(words or [], flags)
    from tunesmith import api
    from tunesmith.plan import Ask

    size = None if memory is None else int(memory * 2**30)
    here = memory is None
    report = api.plan_run(run, Ask(rows, tokens, size, reference, time and here, ways))
    if json:
        out_json(report)
        return
    for line in plan_lines(report):
        out(line)


MADE_UP = "(made up)"  # data of a plan that is given none


def plan_lines(report: dict[str, Any]) -> list[str]:
    """A plan as lines of text: a value each, the ways to need less as a list."""
    lines = [f"{key.replace('_', ' '):<24} {_said(report[key])}" for key in report if key != "ways"]
    for way in report.get("ways", ()):
        fits = "fits" if way["fits"] else "does not fit"
        settings = " ".join(f"{key}={value}" for key, value in way["settings"].items())
        lines.append(f"  {way['memory_gib']:8.2f} GiB, {fits:<12} {settings}")
    return lines


def _said(value: Any) -> str:
    return ", ".join(f"{key} {_said(part)}" for key, part in value.items()) if isinstance(value, dict) else str(value)


@command(app, "demo")
def demo(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and steps: minutes less, accuracy less.")] = False,
    output_dir: OutputDir = None,
) -> None:
    """Adapt SmolLM2-135M to movie reviews: accuracy before and after, generations, a verified adapter."""
    from tunesmith.demo import demo as carry_out

    out(carry_out(overrides=overrides or [], quick=quick, output_dir=output_dir, console=console()))


def read_run(words: list[str], flags: dict[str, Any]) -> Run:
    """Return the run that a command's words and flags describe; its notes go to stderr. Raises ConfigError.

    A file that they name as `adapter.kind` is opened, but never one that a run folder's own configuration names.
    """
    config, overrides = split_words(words)
    own = config is None or not is_of_run(config)
    if config is None and (resume := flags.get("train.resume")) is not None:
        config = _config_of_resumed(resume, any(flags.get(key) for key in ("model.path", "data.train")))
        own = config is None
    if config is None and not overrides and not any(flags.values()):
        raise ConfigError(
            "nothing to train: give a YAML file, or --model NAME and --data FILE; 'tunesmith demo' shows a whole run"
        )
    from tunesmith.config import load_run

    run, notes = load_run(config, overrides, flags)
    for line in notes:
        note(f"note: {line}")
    return with_own_methods(run) if own else run


def split_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """Tell the configuration file from the overrides among a command's words. Raises ConfigError for a second file."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise ConfigError(f"{files[1]!r}: one configuration file at a time; an override is written key=value")
    return (Path(files[0]) if files else None), [word for word in words if word not in files]


def _config_of_resumed(resume: str, described: bool) -> Path | None:
    """The configuration in the run folder that `--resume PATH` points into.

    Raises CheckpointError where there is none and the run is not `described` by other words.
    """
    folder = Path(resume)
    places = () if resume == "latest" else (folder, folder.parent)
    found = [place / "config.yaml" for place in places if (place / "config.yaml").is_file()]
    if found or described:
        return found[0] if found else None
    if resume == "latest":
        raise CheckpointError("--resume: say which run to go on with: tunesmith train --resume runs/NAME")
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"--resume {resume}: no such run folder{did_you_mean(folder.name, near)}")
    raise CheckpointError(f"--resume {resume}: holds no config.yaml, so it is no run folder; give the folder of a run")
