"""Bottleneck adapters: a small network of one hidden layer beside a sub-layer.

    h + s (U act(D h + d) + u),    D: (width, hidden), U: (hidden, width)

    houlsby    h is the sub-layer's output, after attention and after the MLP   (arXiv:1902.00751)
    pfeiffer   h is the sub-layer's output, after the MLP alone                 (arXiv:2005.00247)
    parallel   D reads the MLP's input instead, h stays its output              (arXiv:2110.04366)

U starts at zero, so the model starts as it was; `init: bert` draws D and U from N(0, 0.02) instead, and starts near it.
A place trains 2 hidden width + width + hidden values. PEFT has no such method.
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
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.matmul import linear
from tunesmith.model.seam import Context

# variant -> the seams of a block that are edited
PLACES: dict[str, tuple[str, ...]] = {
    "houlsby": ("after_attn", "after_mlp"),
    "pfeiffer": ("after_mlp",),
    "parallel": ("after_mlp",),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
REDUCTION = 16  # of the hidden size, where the settings do not say


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BottleneckSettings:
    """Settings under `adapter:` for `kind: bottleneck`."""

    variant: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        default="houlsby", description="After attention and MLP, after the MLP, or beside the MLP."
    )
    width: int | None = Field(default=None, ge=1, description="Values in the bottleneck.")
    reduction_factor: float | None = Field(
        default=None, ge=1, description="Instead of width: the hidden size over it. 16 where neither is given."
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        default="gelu", description="Function in the bottleneck."
    )
    scale: float = Field(default=1.0, gt=0, description="Factor on what is added (He et al. use 4 for parallel ones).")
    init: Literal["zero", "bert"] = Field(
        default="zero", description="U starts at zero, or both matrices at N(0, 0.02) as in BERT."
    )

    @model_validator(mode="after")
    def _one_size(self) -> BottleneckSettings:
        if self.width is not None and self.reduction_factor is not None:
            raise ValueError("width and reduction_factor both say how wide the bottleneck is; keep one")
        return self


class BottleneckDelta(Delta):
    """value + s (U act(D h + d) + u) on one sub-layer of a Block; h is the value, or what the sub-layer was given."""

    def __init__(self, down: Tensor, up: Tensor, activation: str, scale: float, parallel: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias, self.up_bias = nn.Parameter(down.new_zeros(len(down))), nn.Parameter(up.new_zeros(len(up)))
        self.activation, self.scale, self.parallel = activation, scale, parallel

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """The sub-layer's output and its input `given`, both (tokens, hidden) -> (tokens, hidden)."""
        h = given if self.parallel else value
        inner = linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype))
        added = linear(ACTIVATIONS[self.activation](inner), self.up.to(h.dtype), self.up_bias.to(h.dtype))
        return torch.add(value, added, alpha=self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge(
            f"a bottleneck adapter computes {self.activation}(D h), which is not linear in h, so that no weight of the "
            "base can hold it: keep the adapter beside its base"
        )


class Bottleneck:
    """The method of `kind: bottleneck`."""

    kind = "bottleneck"
    settings = BottleneckSettings
    learning_rate = 3e-4

    def identity_at_init(self, settings: BottleneckSettings) -> bool:
        """With U = 0; not from N(0, 0.02)."""
        return settings.init == "zero"

    def mergeable(self, settings: BottleneckSettings) -> bool:
        """No: the activation is not linear."""
        return False

    def place(self, model: Llama, settings: BottleneckSettings) -> Iterator[Placement]:
        """One or two deltas in each block. Raises AdapterError where the reduction leaves no bottleneck."""
        hidden = model.config.hidden_size
        width = bottleneck_width(hidden, settings)
        for layer in range(model.config.num_hidden_layers):
            for seam in PLACES[settings.variant]:
                down, up = _initial(hidden, width, settings.init)
                delta = BottleneckDelta(down, up, settings.activation, settings.scale, settings.variant == "parallel")
                yield Placement(f"model.layers.{layer}", seam, delta)

    def unfreeze(self, model: Llama, settings: BottleneckSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: BottleneckSettings) -> float:
        """One rate for all."""
        return 1.0


def bottleneck_width(hidden: int, settings: BottleneckSettings) -> int:
    """The bottleneck's width in a model of this hidden size, rounded down. Raises AdapterError where it would be 0."""
    if settings.width is not None:
        return settings.width
    if settings.reduction_factor is None:
        return max(1, hidden // REDUCTION)
    if settings.reduction_factor > hidden:
        raise AdapterError(
            f"adapter.reduction_factor: {settings.reduction_factor:g} leaves nothing of a hidden size of {hidden}; "
            "give a smaller one"
        )
    return int(hidden / settings.reduction_factor)


def _initial(hidden: int, width: int, init: str) -> tuple[Tensor, Tensor]:
    """D and U."""
    down, up = torch.empty(width, hidden), torch.zeros(hidden, width)
    if init == "bert":
        nn.init.normal_(down, std=0.02)
        nn.init.normal_(up, std=0.02)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return down, up


METHOD = Bottleneck()
