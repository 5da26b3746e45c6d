"""The tasks by name, and the run of those that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, did_you_mean
from tunesmith.evaluate import gsm8k, humaneval
from tunesmith.evaluate.perplexity import CORPORA
from tunesmith.evaluate.sets import SETS
from tunesmith.evaluate.tasks import Task

_ALL: tuple[Task, ...] = (*CORPORA, *SETS, gsm8k.TASK, humaneval.TASK)  # a new task: one more name here
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


@dataclass(frozen=True)
class Asked:
    """A task with the place of its data and its settings."""

    task: Task
    path: Path
    settings: Any


def find_task(name: str, where: str = "--task") -> Task:
    """The task called `name`. Raises ConfigError with the nearest name."""
    if name not in TASKS:
        raise ConfigError(
            f"{where}: there is no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}"
        )
    return TASKS[name]
