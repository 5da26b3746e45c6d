"""Where a run's numbers go: metrics.jsonl always, a display for the user, and trackers where they were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch

from tunesmith.train.log import MetricsFile, Progress, Trackers
from tunesmith.train.memory import GIB, peak_memory, resident_memory


class RunLog:
    """The `Reporter` of a run in a folder; a context manager that closes display and trackers."""

    def __init__(self, metrics: MetricsFile, progress: Progress, trackers: Trackers, device: torch.device) -> None:
        self.metrics, self.progress, self.trackers, self.device = metrics, progress, trackers, device

    def __enter__(self) -> RunLog:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        self.trackers.finish()

    def step(self, values: Mapping[str, float]) -> None:
        """Write the line of a step: its own values, what was evaluated at it, and the peak of memory so far."""
        step = int(values["step"])
        line = {
            **{key: v for key, v in values.items() if key != "step"},
            "peak_memory_gib": peak_memory(self.device) / GIB,
        }
        self.metrics.write(step, line)
        self.trackers.log(step, line)
        self.progress.update(
            step, loss=line["loss"], tokens_per_second=line["tokens_per_second"], memory_gib=resident_memory()[0] / GIB
        )
        evaluated = {key: v for key, v in values.items() if key.startswith("eval_") or key not in _STEP_NAMES}
        if evaluated:
            self.say(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in evaluated.items()))

    def say(self, line: str) -> None:
        """Show a line to the user."""
        self.progress.note(line)


_STEP_NAMES = {"step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second"}
