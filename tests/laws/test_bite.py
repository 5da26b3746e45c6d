"""Each law is broken on purpose by a toy method, and must see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.laws import laws
from tests.laws.laws import Case
from torch import Tensor, nn

from tunesmith.adapters.base import Delta, Placement
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """A toy has none."""


class Toy:
    """A method that puts one kind of delta on every o_proj."""

    kind = "toy"
    settings = NoSettings
    learning_rate = 1e-3

    def __init__(self, delta: type[Scale], identity: bool = True, path: str = "o_proj", seam: str = "edit") -> None:
        self.delta, self.identity, self.path, self.seam = delta, identity, path, seam
        self.folds = True

    def identity_at_init(self, settings: NoSettings) -> bool:
        return self.identity

    def mergeable(self, settings: NoSettings) -> bool:
        return self.folds

    def place(self, model: Llama, settings: NoSettings) -> Iterator[Placement]:
        for path, module in model.named_modules():
            if path.endswith(self.path):
                yield Placement(path, self.seam, self.delta(getattr(module, "out_features", 24)))

    def unfreeze(self, model: Llama, settings: NoSettings) -> Iterator[str]:
        return iter(())

    def lr_scale(self, name: str, settings: NoSettings) -> float:
        return 1.0


class Scale(Delta):
    """y <- (1 + s) y: an honest delta, the one that the faults below spoil."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return value * (1 + self.s.to(value.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * (1 + self.s.detach())[:, None], bias


class NotIdentity(Scale):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.constant_(self.s, 1e-6)


class Idle(Scale):
    def forward(self, value: Tensor, *_: Any) -> Tensor:
        return value


class AlwaysOn(Scale):
    """Acts on its host instead of the value: switching the adapter off does not undo it."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        with torch.no_grad():
            host.weight.mul_(1.001)
        return super().forward(value, host, ctx, given)


class MovesFrozen(Scale):
    """Keeps its host's weight and changes it after a step."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        self.__dict__["host"] = host
        return super().forward(value, host, ctx, given)

    def after_step(self) -> None:
        with torch.no_grad():
            self.__dict__["host"].weight[0, 0] += 1e-3


class Unused(Scale):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.forgotten = nn.Parameter(torch.zeros(2))


class Unfreezes(Scale):
    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        host.weight.requires_grad_(True)
        return super().forward(value, host, ctx, given)


class FreezesAfterEvaluation(Scale):
    """Keeps the product that it made in an evaluation pass, so training no longer reaches its parameter."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.__dict__["kept"] = (1 + self.s.detach()).to(value.dtype)
        factor = self.__dict__.get("kept", 1 + self.s.to(value.dtype))
        return value * factor


class Forgetful(Scale):
    """Depends on a tensor that is neither parameter nor buffer."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.__dict__["noise"] = torch.randn(size)

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return value * (1 + self.s.to(value.dtype) * self.__dict__["noise"].to(value.dtype))


class FoldsWrongly(Scale):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * (1 + self.s.detach() * (1 + 1e-8))[:, None], bias


class SeesNeighbours(Scale):
    """Mixes in the token before, whosever it is."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return value + self.s.to(value.dtype) * value.roll(1, dims=0)


class CountsTokens(Scale):
    """Depends on how many tokens the row holds."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return value * (1 + self.s.to(value.dtype) * len(value))


class WrongGradient(Scale):
    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return _Half.apply(super().forward(value, host, ctx, given))


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class CountsCalls(Scale):
    """Gives another value when a block is run again for the backward."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return value * (1 + self.s.to(value.dtype) * self.__dict__["calls"])


class BreaksTheGraph(Scale):
    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return super().forward(value, host, ctx, given) * (2 if value.sum().item() > 1e9 else 1)


class CannotFold(Scale):
    fold = Delta.fold


class FromPrompt(Scale):
    """Takes what it adds from the first token of the row: right where examples begin there, wrong in a pack."""

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        return value + self.s.to(value.dtype) * value[:1]


def test_honest_toy_obeys_all() -> None:
    for law in [*laws.ALWAYS, *laws.DETERMINISTIC, laws.compiled_is_eager]:
        law(Case(Toy(Scale)))


FAULTS = [
    (laws.identity_at_init, NotIdentity, "logits moved"),
    (laws.identity_at_init, Idle, "no effect"),
    (laws.identity_at_init, AlwaysOn, "logits moved|switched off"),
    (laws.moved_is_trainable, MovesFrozen, "moved but not trainable.*o_proj.weight"),
    (laws.moved_is_trainable, Unused, "never moved.*forgotten"),
    (laws.moved_is_trainable, Unfreezes, "requires_grad"),
    (laws.gradient_survives_evaluation, FreezesAfterEvaluation, "evaluation pass|does not require grad"),
    (laws.saved_is_whole, Forgetful, "saved state"),
    (laws.folded_is_unfolded, FoldsWrongly, "something else"),
    (laws.packed_is_padded, SeesNeighbours, "is not the padded"),
    (laws.packed_is_padded, FromPrompt, "is not the padded"),
    (laws.packed_is_padded, CountsTokens, "is not the padded"),
    (laws.examples_stand_alone, SeesNeighbours, "what it is alone"),
    (laws.routed_is_alone, SeesNeighbours, "from these alone"),
    (laws.split_does_not_matter, CountsTokens, "loss"),
    (laws.recompute_changes_nothing, CountsCalls, "loss|gradient"),
    (laws.delta_gradients, WrongGradient, "Jacobian mismatch"),
    (laws.compiled_is_eager, BreaksTheGraph, "item|branch|break|Dynamic"),
    (laws.folded_is_unfolded, CannotFold, "cannot be folded"),
]


@pytest.mark.parametrize(("law", "fault", "said"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_law_bites(law, fault: type[Scale], said: str) -> None:
    with pytest.raises(Exception, match=f"(?s){said}"):
        law(Case(Toy(fault)))


def test_unmergeable_method_that_folds_is_caught() -> None:
    toy = Toy(Scale)
    toy.folds = False
    with pytest.raises(AssertionError, match="CannotMerge"):
        laws.folded_is_unfolded(Case(toy))


def test_declared_exception_is_allowed() -> None:
    laws.identity_at_init(Case(Toy(NotIdentity, identity=False)))


def test_toy_reaches_other_seams() -> None:
    for path, seam in (
        ("self_attn", "mix"),
        ("layers.0", "after_mlp"),
        ("input_layernorm", "edit"),
        ("model", "embed"),
    ):
        toy = Toy(type("Broad", (Scale,), {"__init__": _one}), path=path, seam=seam)
        toy.folds = False
        for law in (laws.identity_at_init, laws.packed_is_padded, laws.delta_gradients, laws.compiled_is_eager):
            law(Case(toy))


def _one(self: Scale, size: int) -> None:
    Scale.__init__(self, 1)


def test_linear_without_seams_is_plain() -> None:
    layer = Linear(3, 2, bias=True)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    x = torch.ones(4, 3)
    ctx = Context(None, None, None)
    assert torch.equal(layer(x, ctx), torch.full((4, 2), 4.0))
