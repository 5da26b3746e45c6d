"""The typer application, how its commands end (exit codes, one-line errors), and what goes to which stream.

Results go to stdout; logs, progress and errors go to stderr. Exit codes: 0 done, 1 unexpected, 2 bad input or
configuration, 3 out of memory or disk, 4 a check failed, 130 interrupted.
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperGroup

from tunesmith import __version__
from tunesmith.errors import Interrupted, TunesmithError, is_out_of_memory
from tunesmith.hardware import share_cores
from tunesmith.processes import collect_seldom

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

DEBUG = "TUNESMITH_DEBUG"


class _Commands(TyperGroup):
    """`tunesmith evaluate tournament` is the command `tournament`; `evaluate` itself takes what to measure."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the words call."""
        return super().resolve_command(ctx, args[1:] if args[:2] == ["evaluate", "tournament"] else args)


app = typer.Typer(
    name="tunesmith",
    cls=_Commands,
    help="Adapt LLaMA models to a task with few trained parameters, and prove that what was saved works.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command (`args` defaults to the process's own) and return its exit code."""
    share_cores()
    collect_seldom()
    atexit.register(gc.freeze)  # else the interpreter's last act is to walk through all of torch: half a second
    try:
        typer.main.get_command(app)(args=None if args is None else list(args), prog_name="tunesmith")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return _interrupted()
    return 0


def command(group: typer.Typer, name: str, **options: Any) -> Callable[[F], F]:
    """Register a function as the command `name` of `group`, with its errors turned into one line and an exit code."""

    def register(function: F) -> F:
        group.command(name, **options)(_ending(function))
        return function

    return register


def console() -> Console:
    """Return a console for logs and progress; it writes to stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def out(text: str = "") -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(f"{text}\n")


def out_json(value: Any) -> None:
    """Write the result to stdout as JSON that a script reads."""
    out(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def out_report(report: Mapping[str, Any], destination: object, as_json: bool) -> None:
    """What was made and where: the report as JSON, or as notes with the destination alone on stdout."""
    if as_json:
        out_json(report)
        return
    for key, value in report.items():
        note(f"{key.replace('_', ' '):<28} {value}")
    out(str(destination))


def note(text: str) -> None:
    """Write a line for the person who runs the command to stderr."""
    sys.stderr.write(f"{text}\n")


def _ending(function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # here, so that a closed pipe is met while somebody can answer it
            return result
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(_interrupted()) from None
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            raise typer.Exit(_failed(error)) from None

    return run  # type: ignore[return-value]


def _interrupted() -> int:
    note("interrupted")
    return 130


def _failed(error: Exception) -> int:
    """Say on stderr what went wrong, in one line unless it is debugged, and return the exit code."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return 0  # the reader of stdout, such as head, has what it wanted
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    if isinstance(error, TunesmithError):
        note(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {_one_line(error)}")
        return error.exit_code
    if is_out_of_memory(error):
        note(f"error: out of memory: {_one_line(error)}; try a smaller train.pack_tokens, or train.recompute=true")
        return 3
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        note(f"error: the disk is full: {_one_line(error)}")
        return 3
    hint = "" if os.environ.get(DEBUG) == "1" else f" (run with {DEBUG}=1 for the traceback)"
    note(f"error: {type(error).__name__}: {_one_line(error)}{hint}")
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not meet the closed pipe again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout without a descriptor has nothing to point elsewhere
        return


def _show_version(wanted: bool) -> None:
    if wanted:
        out(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Adapt LLaMA models to a task with few trained parameters, and prove that what was saved works."""
