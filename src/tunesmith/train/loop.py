"""The training loop: rows -> packs -> summed loss / supervised tokens of the global batch -> clip -> step.

Everything that a step depends on follows from the settings and the step's number (which rows, which learning rate),
plus the random state for dropout; so a checkpoint resumes to the very same bits.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from tunesmith.adapters import Adapter
from tunesmith.config import TrainSection
from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.errors import CheckpointError, Interrupted, is_out_of_memory
from tunesmith.model.llama import Llama
from tunesmith.train import guards
from tunesmith.train.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    unpack_optimizer,
)
from tunesmith.train.loss import pack_loss
from tunesmith.train.memory import give_back_memory
from tunesmith.train.optim import (
    LossScaler,
    clip_gradients,
    optimizer_of,
    set_learning_rate,
)
from tunesmith.train.order import row_order
from tunesmith.train.steps import Plan


class Reporter(Protocol):
    """Where a run's numbers go: metrics.jsonl, the progress display, trackers."""

    def step(self, values: Mapping[str, float]) -> None:
        """Take the values of one optimizer step."""

    def say(self, line: str) -> None:
        """Show a line to the user."""


Evaluator = Callable[[], Mapping[str, float]]


@dataclass
class Progress:
    """What changes while a run goes on, beside parameters, optimizer and random state; it travels in checkpoints."""

    step: int = 0
    tokens: int = 0
    updates: int = 0  # steps made at a learning rate above 0
    pack_tokens: int | None = None  # fewer than planned, where memory ran out
    best: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations since the best one
    last_loss: float | None = None
    evaluations: list[dict[str, float]] = field(default_factory=list)


def read_checkpoint(checkpoint: Path, fingerprint: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """A checkpoint's tensors and state. Raises CheckpointError if it is damaged or of other data or settings."""
    tensors, state = load_checkpoint(checkpoint)
    if state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{checkpoint}: was written by a run with other data, model or settings; resume with the config.yaml "
            "of its run folder, or start a new run"
        )
    return tensors, state


class Trainer:
    """One run of one adapter.

    `run()` goes from the current progress to the end; `resume()` sets progress from a checkpoint.
    """

    def __init__(
        self,
        model: Llama,
        adapter: Adapter,
        examples: Sequence[Example],
        settings: TrainSection,
        plan: Plan,
        folder: Path,
        reporter: Reporter,
        *,
        evaluator: Evaluator | None = None,
        best_metric: str = "eval_loss",
        higher_is_better: bool = False,
        patience: int | None = None,
        fingerprint: str = "",
    ) -> None:
        self.model, self.adapter, self.examples = model, adapter, examples
        self.settings, self.plan, self.folder, self.reporter = settings, plan, folder, reporter
        self.evaluator, self.best_metric, self.patience = evaluator, best_metric, patience
        self.higher_is_better, self.fingerprint = higher_is_better, fingerprint
        self.parameters = adapter.trainable
        adapter.begin(plan.steps)
        scales = {name: adapter.method.lr_scale(name, adapter.settings) for name in self.parameters}
        self.optimizer = optimizer_of(
            settings, self.parameters, learning_rate=plan.schedule.learning_rate, lr_scale=scales, folder=folder
        )
        self.scaler = LossScaler(enabled=model.dtype == torch.float16)
        self.progress = Progress()
        self._stop = False
        self._order: tuple[int, np.ndarray] | None = None
        self._warned: set[str] = set()

    def run(self) -> Progress:
        """Train to the end, or to an early stop. Raises Interrupted after a checkpoint when Ctrl-C was pressed."""
        self.model.train()
        with self._interruptible():
            while not self.finished:
                values = self._step()
                step, done = self.progress.step, self.progress.step == self.plan.steps
                best = False
                if self.evaluator is not None and (step % self.plan.eval_steps == 0 or done):
                    measured = self._evaluate(self.evaluator)
                    values |= measured
                    best = self._judge(measured)
                self.reporter.step(values)
                if best or self._stop or done or step % self.plan.save_steps == 0 or self._patience_is_out():
                    self.save()
                if self._stop and not done:
                    raise Interrupted(
                        f"stopped after step {step} of {self.plan.steps}, checkpoint saved; "
                        f"go on with: tunesmith train --resume {self.folder}"
                    )
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        return self.progress

    @property
    def finished(self) -> bool:
        """Is there no step left to make?"""
        return self.progress.step >= self.plan.steps or self._patience_is_out()

    def batch(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (from 0), in an order that the seed and the epoch fix."""
        epoch, at = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, row_order(len(self.examples), self.settings, epoch))
        return self._order[1][at * self.plan.batch_size : (at + 1) * self.plan.batch_size].tolist()

    def _step(self) -> dict[str, float]:
        """One optimizer step; returns its logged values.

        Whatever a guard stops leaves parameters and moments as they were.
        """
        began = time.perf_counter()
        step = self.progress.step
        rows = [self.examples[i] for i in self.batch(step)]
        loss = self._gradient(rows)
        previous = self.progress.last_loss
        self._warn("loss", guards.check_loss(loss, self.model.config.vocab_size, step + 1, previous=previous))
        rate = self.plan.schedule.learning_rate_at(step)
        norm = self._update(rate, 0 if self._sees_nothing(rows) else self.progress.updates)
        tokens = sum(len(row.ids) for row in rows)
        self.progress.step, self.progress.last_loss = step + 1, loss
        self.progress.tokens += tokens
        return {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "epoch": (step + 1) / self.plan.steps_per_epoch,
            "num_tokens": self.progress.tokens,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }

    def _gradient(self, rows: Sequence[Example]) -> float:
        """Form the gradient of a batch and return its loss.

        Where memory runs out and `train.memory` is auto, it is formed anew in smaller packs, and so are all later ones.
        """
        drawn = rng_state()
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            packs = self._packs(rows)
            supervised = sum(pack.supervised for pack in packs)
            try:
                return sum(self._accumulate(pack, supervised, rows) for pack in packs)
            except (MemoryError, RuntimeError) as error:
                if (
                    self.settings.memory != "auto"
                    or not is_out_of_memory(error)
                    or all(len(pack.examples) == 1 for pack in packs)
                ):
                    raise
            self.progress.pack_tokens = smaller = max(pack.layout.tokens for pack in packs) // 2
            self.reporter.say(
                f"step {self.progress.step + 1}: memory ran out; packs have at most {smaller} tokens from here on, and "
                "batch and gradient stay the same"
            )
            self.optimizer.zero_grad(set_to_none=True)
            give_back_memory()
            restore_rng_state(*drawn)

    def _packs(self, rows: Sequence[Example]) -> list[Pack]:
        plan = self.plan
        return plan_packs(
            rows,
            budget=self.progress.pack_tokens or plan.pack_tokens,
            max_rows=plan.micro_batch,
            share=plan.share_prefix,
            device=self.model.device,
            needs=self.model.needs(),
        )

    def _accumulate(self, pack: Pack, supervised: float, rows: Sequence[Example]) -> float:
        """Add one pack's share of the gradient; returns its share of the loss.

        Raises NumericalError before any step.
        """
        ctx = self.model.context(pack.layout, dropout=self.settings.attention_dropout)
        hidden = self.model.run(pack.tokens, ctx, self.settings.recompute, pack.read)
        loss = pack_loss(self.model, pack, ctx, hidden) / max(supervised, 1.0)
        del hidden  # its memory is the backward's
        value = float(loss.detach())
        if not math.isfinite(value):
            culprits = [rows[i] for i in pack.examples]
            raise guards.explain_nonfinite(
                f"the loss is {value}", self.progress.step + 1, self.model, culprits, self._forward_only
            )
        penalty = self.adapter.penalty()
        if penalty is not None:
            loss = loss + penalty * (pack.supervised / max(supervised, 1.0))
        if loss.requires_grad:  # visual tokens alone are trained, and no example of the pack has an image: it does not
            self.scaler.scale(loss).backward()
        return value

    def _sees_nothing(self, rows: Sequence[Example]) -> bool:
        """Does the adapter look at images, and none of these rows has one? Then some gradients are rightly 0."""
        return bool(self.model.needs().looks) and all(row.picture is None for row in rows)

    def _update(self, rate: float, updates: int) -> float:
        """Unscale, check, clip and step; returns the norm before clipping (nan: fp16 overflowed, no step was made).

        `updates`: how many have been made; 0 where a gradient of 0 is right.
        """
        parameters = list(self.parameters.values())
        good = self.scaler.unscale(parameters)
        norm = math.nan
        if good:
            named = ((name, p.grad) for name, p in self.parameters.items())
            self._warn("gradient", guards.check_gradients(named, self.progress.step + 1, updates=updates))
            norm = clip_gradients(parameters, self.settings.max_grad_norm)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.adapter.after_step()
            self.progress.updates += rate > 0
        else:
            step = self.progress.step + 1
            self._warn("scale", f"step {step}: fp16 gradients overflowed, step skipped; the loss scale is halved")
        self.scaler.update(good)
        return norm

    def _forward_only(self, rows: Sequence[Example]) -> None:
        """Run rows without a loss, for a diagnosis."""
        for pack in self._packs(rows):
            ctx = self.model.context(pack.layout)
            hidden = self.model.run(pack.tokens, ctx, rows=pack.read)
            for _ in self.model.logits_in_parts(hidden, ctx):
                pass

    def _warn(self, topic: str, line: str | None) -> None:
        """Show a guard's warning, once a topic."""
        if line is not None and topic not in self._warned:
            self._warned.add(topic)
            self.reporter.say(f"warning: {line}")

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        """Measure; the random state is then as if nothing had happened."""
        tensors, state = rng_state()
        self.model.eval()
        measured = dict(evaluator())
        self.model.train()
        restore_rng_state(tensors, state)
        self.progress.evaluations.append({"step": self.progress.step, **measured})
        return measured

    def _judge(self, measured: Mapping[str, float]) -> bool:
        """Is this the best evaluation so far?"""
        progress, value = self.progress, measured[self.best_metric]
        better = progress.best is None or (value > progress.best if self.higher_is_better else value < progress.best)
        if better:
            progress.best, progress.best_step, progress.worse = value, progress.step, 0
        else:
            progress.worse += 1
        return better

    def _patience_is_out(self) -> bool:
        return self.patience is not None and self.progress.worse >= self.patience

    def save(self) -> None:
        """Write a checkpoint of the current step; drop older ones once it is complete, but never the best."""
        random_tensors, random_state = rng_state()
        names = {parameter: name for name, parameter in self.parameters.items()}
        save_checkpoint(
            self.folder,
            self.progress.step,
            tensors={
                "adapter": self.adapter.state(),
                "optimizer": pack_optimizer(self.optimizer, names),
                "rng": random_tensors,
            },
            state={
                "progress": vars(self.progress),
                "scaler": self.scaler.state(),
                "rng": random_state,
                "fingerprint": self.fingerprint,
            },
        )
        best = self.progress.best_step
        protect = [] if best is None else [checkpoint_path(self.folder, best)]
        prune_checkpoints(self.folder, self.settings.keep_checkpoints, protect)

    def resume(self, checkpoint: Path) -> None:
        """Go on from `checkpoint`. Raises CheckpointError if it belongs to other data or settings."""
        tensors, state = read_checkpoint(checkpoint, self.fingerprint)
        self.adapter.load_state(tensors["adapter"], str(checkpoint))
        names = {parameter: name for name, parameter in self.parameters.items()}
        unpack_optimizer(self.optimizer, names, tensors["optimizer"])
        self.progress = Progress(**state["progress"])
        self.scaler.load_state(state["scaler"])
        restore_rng_state(tensors["rng"], state["rng"])

    def load_best(self) -> int:
        """Give the adapter the parameters of the best checkpoint, if one was chosen; returns the step they are of."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return self.progress.step
        tensors, _ = load_checkpoint(checkpoint_path(self.folder, best))
        self.adapter.load_state(tensors["adapter"], str(checkpoint_path(self.folder, best)))
        return best

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends training after the current step; the second ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.reporter.say("finishing this step, then saving a checkpoint (press Ctrl-C again to stop at once)")

        signals = (signal.SIGINT, signal.SIGTERM)
        try:
            before: dict[signal.Signals, Any] = {s: signal.signal(s, ask) for s in signals}
        except ValueError:  # not the main thread: signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
