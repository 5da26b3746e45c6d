"""The tasks by name, and the run of those that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import validate_section
from tunesmith.config.source import parse_value
from tunesmith.data.catalog import resolve_data
from tunesmith.errors import ConfigError, DataError, TunesmithError, did_you_mean
from tunesmith.evaluate import gsm8k, humaneval
from tunesmith.evaluate.perplexity import CORPORA
from tunesmith.evaluate.sets import SETS
from tunesmith.evaluate.sets.rows import KINDS
from tunesmith.evaluate.subject import Subject
from tunesmith.evaluate.tasks import Result, Task

_ALL: tuple[Task, ...] = (*CORPORA, *SETS, gsm8k.TASK, humaneval.TASK)  # a new task: one more name here
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
FILES = {".raw", ".tokens", *KINDS}


@dataclass(frozen=True)
class Asked:
    """A task, the place of its data, its settings, and the items that were read there."""

    task: Task
    path: Path
    settings: Any
    items: Sequence[Any]


@dataclass(frozen=True)
class Found:
    """A task that was measured."""

    asked: Asked
    result: Result

    def to_dict(self) -> dict[str, Any]:
        """As a report holds it; items are left out."""
        figures = {name: figure.to_dict() for name, figure in self.result.figures.items()}
        return {
            "path": str(self.asked.path),
            "items": len(self.asked.items),
            "figures": figures,
            "stated": dict(self.result.stated),
            "settings": asdict(self.asked.settings),
            "notes": list(self.result.notes),
        }


def find_task(name: str, where: str = "--task") -> Task:
    """The task called `name`. Raises ConfigError with the nearest name."""
    if name not in TASKS:
        raise ConfigError(
            f"{where}: there is no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}"
        )
    return TASKS[name]


def read_tasks(
    words: Sequence[str], settings: Mapping[str, Mapping[str, Any]], limit: int | None = None
) -> list[Asked]:
    """The tasks of words NAME=PATH (a path, or a name on the hub) with their first `limit` items.

    `settings` are those of each task, by its name. Raises ConfigError, DataError, CatalogError.
    """
    asked: dict[str, Asked] = {}
    for word in words:
        name, equals, place = word.partition("=")
        task = find_task(name.strip())
        if not equals or not place.strip():
            raise ConfigError(f"--task {word}: should be {task.name}=PATH, the file or folder of its data")
        if task.name in asked:
            raise ConfigError(f"--task {word}: {task.name} is asked for twice; measure one after the other")
        chosen: Any = validate_section(task.settings, settings.get(task.name, {}), task.name)
        path = _place(place.strip())
        with _named(task):
            items = task.read(path, chosen)
        if not items:
            raise DataError(f"{path}: holds no item of {task.name}; give it data or name another file")
        asked[task.name] = Asked(task, path, chosen, items[:limit])
    for name, given in settings.items():
        if name not in asked:
            key = next(iter(given), "")
            raise ConfigError(
                f"{name}.{key}: task {name} is not asked for{did_you_mean(name, asked)}; give --task {name}=PATH"
            )
    return list(asked.values())


def _place(said: str) -> Path:
    """A path, or where a name of the catalog or of the hub lies; what ends as a file does is never such a name."""
    path = Path(said).expanduser()
    return path if path.exists() or path.suffix.lower() in FILES else resolve_data(said)


def parse_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """TASK.KEY=VALUE words as values by task and key. Raises ConfigError."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        task, dot, key = name.strip().partition(".")
        if not equals or not dot or not task or not key:
            raise ConfigError(f"{word!r}: should be TASK.KEY=VALUE, such as hellaswag.shots=5")
        if key in found.setdefault(task, {}):
            raise ConfigError(f"{word!r}: {task}.{key} is given twice")
        found[task][key] = parse_value(value, f"{task}.{key}")
    return found


def run_tasks(subject: Subject, asked: Sequence[Asked], say: Callable[[str], None]) -> Iterator[Found]:
    """Measure the tasks one after the other; what `say` is told shows what is going on. Errors name the task."""
    for one in asked:
        say(f"{one.task.name}: {len(one.items):,} items of {one.path}")
        with _named(one.task):
            result = one.task.measure(subject, one.items, one.settings)
        for name, figure in list(result.figures.items())[:3]:
            say(f"{one.task.name}: {name} {figure.value:.4f}")
        for note in result.notes:
            say(f"{one.task.name}: {note}")
        yield Found(one, result)


@contextmanager
def _named(task: Task) -> Iterator[None]:
    """Errors begin with the task's name."""
    try:
        yield
    except TunesmithError as error:
        raise type(error)(f"{task.name}: {error}") from None
