"""ReFT: low-rank edits of the residual stream at a prompt's first and last tokens   (arXiv:2404.03592).

    loreft   h + R^T (W h + b - R h)        R: (rank, hidden) with orthonormal rows   (equation 2)
    noreft   h + V^T (W h + b - V h)        the same without orthogonality
    direft   h + V^T (W h + b)              and without the difference

R is the Gram-Schmidt of the trained matrix, so its rows are orthonormal whatever a step does, and after every step the
trained matrix becomes R. A place has 2 rank hidden + rank values; first and last tokens have one each, unless `tied`.

A prompt of n tokens is edited at its first p = `first_positions` and its last s = `last_positions`; where it is too
short for both, n < p + s, at its first min(p, floor(n / 2)) and its last min(s, ceil(n / 2)). All that stands before an
answer is its prompt, earlier answers of a conversation included. The answer itself is never edited, so generation costs
nothing. At the last layer nothing reads what stands at the first tokens, so those are not edited there.

Never the identity at the start, and never mergeable: it acts on some tokens only. PEFT has no such method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.targets import Layers, check_layers
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

# variant -> D and U of h + U^T (D h + b), from W and from R or V
VARIANTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "loreft": lambda source, basis: (source - (rotation := orthonormal(basis)), rotation),
    "noreft": lambda source, basis: (source - basis, basis),
    "direft": lambda source, basis: (source, basis),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReftSettings:
    """Settings under `adapter:` for `kind: reft`."""

    variant: Literal["loreft", "noreft", "direft"] = Field(
        default="loreft", description="With orthonormal rows, without, or without the difference too."
    )
    rank: int = Field(default=4, ge=1, description="Dimensions of the subspace that is edited.")
    first_positions: int = Field(default=5, ge=0, description="How many of a prompt's first tokens are edited.")
    last_positions: int = Field(default=5, ge=0, description="How many of a prompt's last tokens are edited.")
    tied: bool = Field(default=False, description="Edit first and last tokens alike.")
    layers_to_transform: Layers | None = Field(default=None, description="Only these layers; none is all.")

    @model_validator(mode="after")
    def _somewhere(self) -> ReftSettings:
        if not self.first_positions + self.last_positions:
            raise ValueError("first_positions and last_positions are both 0, so there is nothing to edit")
        return self


class PromptEnds(Delta):
    """Asks to be told where prompts end."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.answer_ends = most

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """(tokens, hidden), unchanged."""
        return value


class Edit(nn.Module):
    """The matrices of one place: `source` (W), `bias` (b) and `basis` (R or V)."""

    def __init__(self, variant: str, rank: int, hidden: int) -> None:
        super().__init__()
        self.variant = variant
        self.source, self.bias = nn.Parameter(torch.empty(rank, hidden)), nn.Parameter(torch.empty(rank))
        self.basis = nn.Parameter(torch.empty(rank, hidden))
        nn.init.kaiming_uniform_(self.source, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        if variant == "loreft":
            nn.init.orthogonal_(self.basis)
        else:
            nn.init.kaiming_uniform_(self.basis, a=math.sqrt(5))

    def forward(self, h: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The edit of the rows of `h` that are `chosen` (tokens,), as two factors: (tokens, rank), (rank, hidden)."""
        down, up = (part.to(h.dtype) for part in VARIANTS[self.variant](self.source, self.basis))
        inner = functional.linear(h, down, self.bias.to(h.dtype))
        return inner * chosen[:, None], up


class ReftDelta(Delta):
    """The edits at the end of one Block: of its `first` tokens, its `last`, or `both` alike."""

    def __init__(self, edits: dict[str, Edit], first: int, last: int) -> None:
        super().__init__()
        self.edits = nn.ModuleDict(edits)
        self.first, self.last = first, last

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: None) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        if ctx.layout.answer_ends is None:  # a step of generation: answers are not edited
            return value
        first, last = ends_of_prompts(ctx.own_positions(), ctx.to_answer(), self.first, self.last)
        chosen = {"first": first, "last": last, "both": first | last}
        out = value
        for name, edit in self.edits.items():
            out = torch.addmm(out, *edit(value, chosen[name]))
        return out

    def after_step(self) -> None:
        """Let the trained matrix be the R that it stands for."""
        for edit in self.edits.values():
            if isinstance(edit, Edit) and edit.variant == "loreft":
                with torch.no_grad():
                    edit.basis.copy_(orthonormal(edit.basis))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge("ReFT edits some tokens of a prompt, and a weight acts on all: keep it beside its base")


def ends_of_prompts(position: Tensor, to_answer: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Which tokens are among the first and which among the last of their prompt, (tokens,) each; none is in both.

    `position` counts from 0, `to_answer` down to 1, known where the prompt has at most first + last tokens.
    """
    length = position + to_answer
    short = (to_answer > 0) & (length < first + last) & bool(first and last)
    half = length // 2
    front = torch.where(short, half.clamp(max=first), first)
    back = torch.where(short, (length - half).clamp(max=last), last)
    prompt = (position >= 0) & (to_answer >= 0)
    return prompt & (position < front), prompt & (to_answer > 0) & (to_answer <= back)


def orthonormal(matrix: Tensor) -> Tensor:
    """Gram-Schmidt of the rows, (rank, hidden): a matrix of orthonormal rows stays as it is."""
    columns, upper = torch.linalg.qr(matrix.T)
    return (columns * upper.diagonal().sign()).T


class Reft:
    """The method of `kind: reft`."""

    kind = "reft"
    settings = ReftSettings
    learning_rate = 3e-3

    def identity_at_init(self, settings: ReftSettings) -> bool:
        """No: W starts at random."""
        return False

    def mergeable(self, settings: ReftSettings) -> bool:
        """No: it acts on some tokens only."""
        return False

    def place(self, model: Llama, settings: ReftSettings) -> Iterator[Placement]:
        """One delta in each layer, and one that asks where prompts end. Raises AdapterError for what does not fit."""
        hidden, count = model.config.hidden_size, model.config.num_hidden_layers
        first, last = settings.first_positions, settings.last_positions
        if settings.rank > hidden:
            raise AdapterError(f"adapter.rank: {settings.rank} dimensions of a hidden size of {hidden}; give fewer")
        layers = range(count) if settings.layers_to_transform is None else settings.layers_to_transform
        if not layers:
            raise AdapterError("adapter.layers_to_transform: an empty list selects no layer; leave it out for all")
        check_layers(model, layers, "adapter")
        found = {layer: _parts(settings, layer == count - 1) for layer in sorted(set(layers))}
        if not any(found.values()):
            raise AdapterError(
                f"adapter.layers_to_transform: layer {count - 1} is the last: nothing reads a prompt's first tokens "
                "after it; give an earlier layer too, or last_positions"
            )
        yield Placement("model", "embed", PromptEnds(first + last))
        for layer, parts in found.items():
            if parts:
                edits = {part: Edit(settings.variant, settings.rank, hidden) for part in parts}
                yield Placement(f"model.layers.{layer}", "resid", ReftDelta(edits, first, last))

    def unfreeze(self, model: Llama, settings: ReftSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: ReftSettings) -> float:
        """One rate for all."""
        return 1.0


def _parts(settings: ReftSettings, top: bool) -> tuple[str, ...]:
    """Which edits a layer has; `top`: it is the model's last."""
    first, last = settings.first_positions > 0, settings.last_positions > 0
    if settings.tied and first and last:
        return ("both",)
    return (*(["first"] if first and not top else []), *(["last"] if last else []))


METHOD = Reft()
