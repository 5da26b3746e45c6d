"""What a grid.yaml says, as types: the budget, the search, what is measured (read by grid_file.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from tunesmith.config.sections import STRICT, Count, Words
from tunesmith.config.source import Located
from tunesmith.errors import ConfigError

MOST_CELLS = 2000


def _number(value: Any) -> Any:
    """Whole numbers where a number is meant."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Budget:
    """What training a cell may use; the search for its rate is paid from it. Equal for all cells."""

    examples: Count | None = Field(default=None, description="Training rows seen, repeated ones counted again.")
    tokens: Count | None = Field(default=None, description="Tokens of the training rows seen, prompts included.")
    seconds: Positive | None = Field(
        default=None, description="Seconds of optimizer steps, as a few steps made before show how long one takes."
    )
    memory: Positive | None = Field(default=None, description="Most GiB planned for training; packs are sized by it.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.examples, self.tokens, self.seconds, self.memory) == (None,) * 4:
            raise ValueError("give one or more of examples, tokens, seconds, memory")
        return self

    @property
    def bounds_steps(self) -> bool:
        """Does it say how long a cell trains?"""
        return (self.examples, self.tokens, self.seconds) != (None,) * 3

    def part(self, share: float) -> Budget:
        """That share of it; memory is not used up, so it stays whole."""
        count = {
            name: None if (v := getattr(self, name)) is None else int(v * share) for name in ("examples", "tokens")
        }
        seconds = None if self.seconds is None else self.seconds * share
        for name, value in count.items():
            if value == 0:
                raise ConfigError(f"budget.{name}: {getattr(self, name)} leaves nothing for a trial rate of the search")
        return Budget(**count, seconds=seconds, memory=self.memory)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Search:
    """A search for each method's learning rate, chosen by validation rows only."""

    rates: int = Field(default=3, ge=2, le=9, description="Rates tried, around the method's own default.")
    factor: Annotated[float, BeforeValidator(_number)] = Field(
        default=3.0, gt=1, description="Each rate is this many times the one before."
    )
    share: float = Field(default=0.25, gt=0, lt=1, description="Share of the budget that all trials together may use.")
    per: Literal["method", "line"] = Field(
        default="method", description="One search for a method, or one for every combination but the seeds."
    )
    metric: str = Field(default="eval_loss", min_length=1, description="Validation measure that chooses.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeasuredSet:
    """Rows that a cell is measured on: a published task, or metrics on a data set's rows."""

    name: str | None = Field(default=None, min_length=1, description="Its name in the report.")
    task: str | None = Field(default=None, min_length=1, description="A published task; or else `metrics`.")
    data: str | None = Field(default=None, min_length=1, description="Where the rows are; none: the run's own data.")
    split: Literal["train", "valid", "test"] = Field(default="test", description="Which rows of a folder.")
    rows: Count | None = Field(default=None, description="The first rows only.")
    metrics: Words = Field(default=(), description="Metrics on the rows, the main one first.")
    template: str | None = Field(default=None, min_length=1, description="Another template than the run's.")
    settings: Mapping[str, Any] = Field(default_factory=dict, description="The task's own settings.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.task is None) == (not self.metrics):
            raise ValueError("give either a task, or metrics")
        if self.task is not None and self.data is None:
            raise ValueError("data: say where the task's rows are")
        if self.task is None and self.settings:
            raise ValueError("settings belong to a task")
        return self

    @property
    def called(self) -> str:
        """Its name in the report; empty for the run's own rows."""
        return self.name or self.task or (Path(self.data).stem if self.data else "")


@plain_dataclass(frozen=True)
class Measure:
    """What is measured of each cell once it is trained: how well it does, and what it forgot.

    Without `sets`, the loss on the rows that its training was validated with.
    """

    sets: tuple[MeasuredSet, ...]
    forgetting: tuple[MeasuredSet, ...] = ()
    samples: int = 3


@plain_dataclass(frozen=True)
class MethodSpec:
    """An entry of `methods`: the adapter's mapping, settings of the run that go with it, and axes of its own."""

    name: str
    layer: Located
    axes: Located


@plain_dataclass(frozen=True)
class GridSpec:
    """A whole grid.yaml. `base` and `overrides` are layers of a run's configuration, `axes` dotted keys of it.

    Names of data that begin with ./ count from `folder`.
    """

    name: str
    folder: Path
    base: Located
    overrides: Located
    methods: tuple[MethodSpec, ...]
    axes: Located
    seeds: tuple[int, ...]
    budget: Budget
    search: Search | None
    measure: Measure
    baseline: bool
    keep: Literal["adapter", "checkpoints", "measures"]

    def placed(self, data: str | None) -> str | None:
        """The name of some data as it is found from here."""
        return str(self.folder / data[2:]) if data is not None and data.startswith("./") else data
