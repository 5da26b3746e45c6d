"""What a run says while it trains: metrics.jsonl, experiment trackers, and a progress display on stderr."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.files import append_line, atomic_write_text

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

# the names of a line of metrics.jsonl; evaluation adds `eval_loss`, `mean_token_accuracy` and the task's own metrics
LOGGED_NAMES = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "tokens_per_second",
    "peak_memory_gib",
)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, one line a step, written as soon as it is known.

    On opening, lines after `resume_step` (all of them for a new run: 0) and a line torn by a kill are dropped, so that
    no step appears twice. Raises DiskError.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        self.path = Path(path)
        kept = [line for line in _lines(self.path) if line["step"] <= resume_step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of `step`; a value that is not finite becomes null, which is all that JSON has for it."""
        append_line(self.path, json.dumps({"step": step, **{name: _plain(value) for name, value in values.items()}}))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Give the lines of a metrics.jsonl as mappings; a torn last line and a missing file are no error."""
    return list(_lines(Path(path)))


class Tracker(Protocol):
    """An experiment tracker: takes the numbers of a step, and is told when there will be no more."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of optimizer step `step`."""

    def finish(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Event files in RUN/tensorboard, read with `tensorboard --logdir RUN`."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar a value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline writes to RUN/wandb only, WANDB_PROJECT goes before the configuration."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any], resume_step: int) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            name=name,
            id=_persistent_id(folder / "wandb" / "run-id", resume_step),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=quiet,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step."""
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        """Wait until all is sent (or written, offline)."""
        self.run.finish()


class Trackio:
    """Trackio: a local database with wandb's interface, shown with `trackio show`."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any], resume_step: int) -> None:
        import trackio

        resume = "allow" if resume_step else "never"
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for results
            self.run = trackio.init(
                project,
                name=name,
                config=dict(config),
                resume=resume,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store a step."""
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        """Write what is still in memory."""
        with contextlib.redirect_stdout(sys.stderr):
            self.run.finish()


TRACKERS: dict[str, Callable[[str, str, Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing; a run asks this before it does anything."""
    for kind in names:
        if importlib.util.find_spec(kind) is None:
            raise ConfigError(f"log.report_to: {kind} is not installed; pip install 'tunesmith[{kind}]'")


class Trackers:
    """Several trackers as one. A tracker that fails is named once and left out from then on; training goes on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Give the values of a step to every tracker that still works."""
        self._each(lambda tracker: tracker.log(step, values))

    def finish(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # whatever a third party's client throws must not end a training run
                del self.trackers[name]
                _say_failed(name, error)


def open_trackers(
    names: Sequence[str],
    *,
    project: str,
    name: str,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    resume_step: int = 0,
) -> Trackers:
    """Open the trackers called `names` (keys of TRACKERS; none by default) for the run `name` in `folder`.

    Raises ConfigError for an unknown tracker, or one whose package is missing (with the extra to install). One that
    cannot start for another reason, such as no network, is named in a warning and left out.
    """
    opened: dict[str, Tracker] = {}
    for kind in names:
        if kind not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise ConfigError(f"log.report_to: {kind!r} is not one of {known}{did_you_mean(kind, TRACKERS)}")
        try:
            opened[kind] = TRACKERS[kind](project, name, Path(folder), config or {}, resume_step)
        except ImportError as error:
            raise ConfigError(
                f"log.report_to: {kind} is not installed ({error}); pip install 'tunesmith[{kind}]'"
            ) from error
        except Exception as error:  # as in Trackers: reporting is never worth a run
            _say_failed(kind, error)
    return Trackers(opened)


class Progress:
    """Steps done, loss, tokens/s, memory and time left: a bar in a terminal, now and then a plain line elsewhere.

    Use as a context manager; everything goes to stderr, and what the "tunesmith" logger says is printed above the bar.
    `plain_seconds` is the least time between two plain lines; the first and the last step are always shown.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        plain_seconds: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console as RichConsole

        self.total, self.start = total_steps, start_step
        self.console = console or RichConsole(stderr=True)
        self.plain_seconds, self.clock = plain_seconds, clock
        self.began = clock()
        self.said = -math.inf
        self.bar = _bar(self.console) if self.console.is_terminal else None
        self.task = self.bar.add_task("train", total=total_steps, completed=start_step, what="") if self.bar else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, memory_gib: float) -> None:
        """Show that `step` steps are done; `loss` and speed are of the last one, memory is resident now."""
        what = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory_gib:.2f} GiB"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, what=what)
            return
        now = self.clock()
        if step >= self.total or now - self.said >= self.plain_seconds:
            self.said = now
            self.note(f"step {step}/{self.total}  {what}{self._left(step, now)}")

    def note(self, text: str) -> None:
        """Print a line (above the bar, in a terminal)."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int, now: float) -> str:
        done = step - self.start
        if done <= 0 or step >= self.total:
            return ""
        return f"  {_duration((now - self.began) / done * (self.total - step))} left"


def _bar(console: Console) -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("step"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.fields[what]}"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=False,
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                yield value


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _persistent_id(path: Path, resume_step: int) -> str:
    """The same id when a run is resumed, a new one when it starts again."""
    if resume_step and path.exists():
        return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(4)
    atomic_write_text(path, identity + "\n")
    return identity


def _say_failed(name: str, error: Exception) -> None:
    logger.warning("%s failed and gets no more numbers (metrics.jsonl still has them all): %s", name, error)
