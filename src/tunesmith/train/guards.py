"""What must never be silent: checks that name what is wrong and the cure, and change nothing.

Each check raises, or returns a line to be shown (None: nothing to say). The loop calls them before the optimizer step,
so that whatever they stop leaves weights, moments and counters as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.data.encode import Example
from tunesmith.errors import DataError, NumericalError, TokenizerError
from tunesmith.model.virtual import Needs

NAMED = 5  # how many names a message lists before it only counts
UNIFORM = 1e-3  # how near to ln(vocab) a loss must come to look like uniform logits
SATURATED = 1e-3  # a loss below this may reach 0.0 honestly

T = TypeVar("T")


class HasSpecialIds(Protocol):
    """What `check_tokenizer_ids` asks of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...


def check_prompts(kind: str, needs: Needs, examples: Sequence[Example]) -> str | None:
    """Say how many rows have no prompt, for a method that acts where prompts end. Raises DataError where none has."""
    bare = sum(bool(example.supervised[:2].any()) for example in examples)  # a first token alone is no prompt
    if not bare or not (needs.ends or needs.infix):
        return None
    acts = f"{kind} acts where prompts end, and {bare} of {len(examples)} rows have no prompt"
    if bare == len(examples):
        raise DataError(
            f"{acts}: it would learn nothing there; give rows with a prompt and an answer, and leave out "
            "data.train_on_inputs"
        )
    return f"{acts}: they teach it nothing there"


def check_loss(loss: float, vocab_size: int, step: int, *, previous: float | None = None) -> str | None:
    """Judge the mean loss of a step; `previous` is that of the step before.

    Raises NumericalError if it is not finite, or exactly 0.0 without having come near it. Returns a warning for a
    loss equal to ln(vocab_size), or one that has honestly reached 0.
    """
    if not math.isfinite(loss):
        raise NumericalError(f"step {step}: the loss is {loss}; the optimizer step was not made")
    if loss == 0.0:
        if previous is not None and previous < SATURATED:
            return f"step {step}: the loss has reached 0.0: every target is predicted with certainty, so stop earlier"
        raise NumericalError(
            f"step {step}: the loss is exactly 0.0. Either no token of the batch is supervised (see `tunesmith data "
            "preview`), or the weights overflowed when they were loaded (fp16 or int8 on hardware without it: use "
            "model.dtype=float32), or the model was trained on this very data before"
        )
    if abs(loss - math.log(vocab_size)) < UNIFORM:
        return (
            f"step {step}: the loss {loss:.4f} is ln({vocab_size}), that of a model whose logits are all equal: the "
            "base weights look as if they had not been loaded; check model.path (a model trained from scratch "
            "does this at its first steps)"
        )
    return None


def check_gradients(
    named: Iterable[tuple[str, Tensor | None]], step: int, *, updates: int, loss_scale: float = 1.0
) -> str | None:
    """Judge gradients, given in the order of the forward pass (as `named_parameters` gives them), before clipping.

    `updates` counts the optimizer steps made so far at a learning rate above 0: until the first, a gradient of exactly
    0 is what LoRA's A and a zero gate's prompt must have. Raises NumericalError for a gradient that is not finite or if
    all are 0; returns a warning that names those that are 0 or missing.
    """
    pairs = list(named)
    sizes = _absmax([gradient for _, gradient in pairs])
    bad = [name for (name, _), size in zip(pairs, sizes, strict=True) if not math.isfinite(size)]
    if bad:
        scale = f" at a loss scale of {loss_scale:g}" if loss_scale != 1.0 else ""
        raise NumericalError(
            f"step {step}: the gradient of {bad[0]}{_more(bad)} is not finite{scale}; the optimizer step was not made; "
            "lower train.learning_rate, or use model.dtype=bfloat16 or float32"
        )
    dead = [name for (name, _), size in zip(pairs, sizes, strict=True) if size == 0.0]
    if updates < 1 or not dead:
        return None
    if len(dead) == len(pairs):
        raise NumericalError(
            f"step {step}: every gradient is exactly 0, so training cannot move: the loss does not depend on the "
            "adapter; check that it is attached and active, and that fp16 training uses loss scaling"
        )
    return (
        f"step {step}: the gradient of {dead[0]}{_more(dead)} is exactly 0 after {updates} updates, so it does not "
        "learn: the value it edits does not reach the loss, or fp16 lost it; leave it out of adapter.target_modules"
    )


@dataclass(frozen=True)
class NonFinite:
    """Where the first value that is not finite appeared: the module, in which role, and how large its values were."""

    module: str
    role: str  # "output", "input" or "parameter NAME"
    dtype: str
    count: int
    size: int
    absmax: float  # largest finite magnitude beside them

    def __str__(self) -> str:
        where = f"{self.role} of {self.module or 'the model'}"
        text = (
            f"{where}: {self.count:,} of {self.size:,} values are not finite, the largest other is {self.absmax:,.6g}"
        )
        limit = torch.finfo(getattr(torch, self.dtype)).max
        return f"{text} ({self.dtype} ends at {limit:,.6g})"


def first_nonfinite_layer(model: nn.Module, run_forward: Callable[[], Any]) -> NonFinite | None:
    """Run the model once more, watching every module, and give the first whose output (or input) is not finite.

    A diagnosis, never part of training: hooks are set for this one run without gradients and removed again, and random
    generators go on as if it had not been. Masks are not watched, so their -inf is legal.
    """
    found: list[NonFinite] = []
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _look(found, names[module], "input", inputs)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found:
            for name, parameter in module.named_parameters(recurse=False):
                _look(found, names[module], f"parameter {name}", parameter)
        _look(found, names[module], "output", output)

    handles = []
    for module in names:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            run_forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_row(rows: Sequence[T], is_bad: Callable[[Sequence[T]], bool]) -> T | None:
    """Find, by halving, one row that is bad by itself; None if the rows are bad only together, or not at all.

    Calls `is_bad` about 2 log2(len(rows)) times.
    """
    if not rows or not is_bad(rows):
        return None
    while len(rows) > 1:
        middle = len(rows) // 2
        half = next((part for part in (rows[:middle], rows[middle:]) if is_bad(part)), None)
        if half is None:
            return None
        rows = half
    return rows[0]


def explain_nonfinite(
    what: str,
    step: int,
    model: nn.Module,
    rows: Sequence[T],
    run_forward: Callable[[Sequence[T]], Any],
    stopped: str = "the optimizer step was not made",
) -> NumericalError:
    """Give the error for a step whose `what` ("loss is nan") is not finite: the first layer, the data row, the cure.

    `run_forward(rows)` runs the model over some of the step's rows, each of which tells its origin in `source`;
    `stopped` says what therefore did not happen.
    """
    row = first_bad_row(rows, lambda part: first_nonfinite_layer(model, lambda: run_forward(part)) is not None)
    layer = first_nonfinite_layer(model, lambda: run_forward(rows if row is None else [row]))
    where = f"first in the {layer}" if layer else "every activation of a second run is finite, so it is in the backward"
    culprit = "" if row is None else f"; data row {getattr(row, 'source', row)}"
    cure = "the weights themselves are damaged: load another copy"
    if layer is None or not layer.role.startswith("parameter"):
        cure = "lower train.learning_rate, or use model.dtype=bfloat16 or float32"
    return NumericalError(f"step {step}: {what}; {where}{culprit}; {stopped}; {cure}")


def check_tokenizer_ids(
    tokenizer: HasSpecialIds, vocab_size: int, eos_token_ids: Sequence[int] = (), bos_token_id: int | None = None
) -> list[str]:
    """Hold a tokenizer against its model (`vocab_size` rows of embedding, the model's own EOS ids and BOS id).

    Raises TokenizerError for an id without an embedding, or without any EOS. Returns warnings: an EOS or a BOS that
    the model does not know, pad = EOS, pad = BOS.
    """
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, **tokenizer.special_tokens}
    outside = [f"{name} ({value})" for name, value in ids.items() if value is not None and not 0 <= value < vocab_size]
    if outside:
        raise TokenizerError(
            f"token {outside[0]}{_more(outside)} has no row in the model's {vocab_size} embeddings: the tokenizer is "
            "of another model; use the one that came with it"
        )
    if tokenizer.eos_id is None:
        raise TokenizerError(
            "the tokenizer has no EOS token, so answers would never end: use the model's own tokenizer"
        )
    said = []
    if eos_token_ids and tokenizer.eos_id not in eos_token_ids:
        expected = ", ".join(map(str, eos_token_ids))
        said.append(
            f"the tokenizer ends a text with id {tokenizer.eos_id}, the model's configuration says {expected}: "
            "generation stops at either; check tokenizer_config.json if answers never end"
        )
    if tokenizer.bos_id is not None and bos_token_id is not None and tokenizer.bos_id != bos_token_id:
        said.append(
            f"the tokenizer begins a text with id {tokenizer.bos_id}, the model's configuration says {bos_token_id}: "
            "check tokenizer_config.json, or the model reads every text as one that it never saw begin"
        )
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        said.append(
            f"pad and EOS are the same token ({tokenizer.pad_id}); nothing is padded or masked by id here, so EOS is "
            "still learned, but tools that mask by pad id would drop it"
        )
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.bos_id:
        said.append(f"pad and BOS are the same token ({tokenizer.pad_id}): tools that mask by pad id would drop BOS")
    return said


def _absmax(gradients: Sequence[Tensor | None]) -> list[float]:
    """Largest magnitude of each (0 for a missing one; nan or inf if there is one), with one transfer from a device."""
    sizes = [0.0] * len(gradients)
    there = [(index, gradient) for index, gradient in enumerate(gradients) if gradient is not None and gradient.numel()]
    if there:
        device = there[0][1].device
        found = torch.stack([g.detach().abs().amax().to(device, torch.float64) for _, g in there]).tolist()
        for (index, _), size in zip(there, found, strict=True):
            sizes[index] = size
    return sizes


def _look(found: list[NonFinite], module: str, role: str, values: Any) -> None:
    """Note the first tensor of `values` that is not finite, unless one was noted before."""
    if found:
        return
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = torch.isfinite(value)
            if not bool(finite.all()):
                count = int((~finite).sum())
                rest = float(value[finite].abs().max()) if count < value.numel() else 0.0
                dtype = str(value.dtype).removeprefix("torch.")
                found.append(NonFinite(module, role, dtype, count, value.numel(), rest))
                return


def _more(names: Sequence[str]) -> str:
    """Give ' (and a, b; 7 in all)' for the names after the first."""
    if len(names) < 2:
        return ""
    more = ", ".join(names[1:NAMED])
    return f" (and {more}; {len(names)} in all)" if len(names) > NAMED else f" (and {more})"
