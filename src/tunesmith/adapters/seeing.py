"""What the methods that look at images have in common: which encoder, which of its layers, and how large those are.

Sizes are settings, filled in from the encoder's name (or from its configuration file, never its weights), so that a
method can be counted, and a saved adapter attached, without the encoder.
"""

from __future__ import annotations

import math
from typing import Annotated
from uuid import uuid4

import torch
from pydantic import AfterValidator, Field, ValidationInfo
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters.base import Delta
from tunesmith.adapters.targets import Layers
from tunesmith.config import STRICT
from tunesmith.errors import CannotMerge, ConfigError
from tunesmith.model.seam import Context
from tunesmith.model.sight import POOLED, TOKENS, Look
from tunesmith.vision.shapes import EFFICIENTNET, Shape, shape_of


def _given(info: ValidationInfo, *layers: int) -> Shape:
    """The encoder's shape. Raises ConfigError for layers that it has not."""
    shape = shape_of(info.data["encoder"])
    count = len(shape.widths)
    if wrong := [layer for layer in layers if not 1 <= layer <= count]:
        raise ConfigError(f"adapter: the encoder {info.data['encoder']} has layers 1 to {count}, not {wrong[0]}")
    return shape


def _scales(value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...]:
    if value is not None and (not value or sorted(set(value)) != list(value) or value[0] < 1):
        raise ValueError("layers of the encoder, from 1, in their order")
    return _given(info).scales if value is None else value


def _widths(value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...]:
    scales = info.data.get("scales", ())
    if value is None:
        shape = _given(info, *scales)
        return tuple(shape.widths[scale - 1] for scale in scales)
    if len(value) != len(scales) or min(value, default=0) < 1:
        raise ValueError(f"one size for each of the {len(scales)} scales")
    return value


def _layer(value: int | None, info: ValidationInfo) -> int:
    return _given(info).layer if value is None else value


def _tokens(value: int | None, info: ValidationInfo) -> int:
    layer = info.data.get("layer", 1)
    return _given(info, layer).tokens[layer - 1] if value is None else value


def _width(value: int | None, info: ValidationInfo) -> int:
    layer = info.data.get("layer", 1)
    return _given(info, layer).widths[layer - 1] if value is None else value


ENCODER = Field(
    default=EFFICIENTNET,
    min_length=1,
    description="Image encoder: efficientnet-lite0, a folder with CLIP, SigLIP or DINOv2, or such a hub name.",
)
Size = Annotated[int | None, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScaleSettings:
    """An encoder, and which of its layers give the global features."""

    encoder: str = ENCODER
    scales: Annotated[Layers | None, AfterValidator(_scales)] = Field(
        default=None,
        validate_default=True,
        description="Layers of the encoder whose global features are taken, from 1; none is four of them.",
    )
    widths: Annotated[Layers | None, AfterValidator(_widths)] = Field(
        default=None, validate_default=True, description="Their sizes; none is those that the encoder has."
    )

    @property
    def looks(self) -> tuple[Look, ...]:
        """What the encoder is asked for."""
        scales, widths = self.scales or (), self.widths or ()
        return (Look(self.encoder, POOLED, tuple(scales), (sum(widths),)),)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenSettings:
    """An encoder, and which of its layers gives the visual tokens."""

    encoder: str = ENCODER
    layer: Annotated[Size, AfterValidator(_layer)] = Field(
        default=None,
        validate_default=True,
        description="Layer of the encoder whose tokens are taken, from 1; none is a transformer's last but one.",
    )
    tokens: Annotated[Size, AfterValidator(_tokens)] = Field(
        default=None, validate_default=True, description="How many tokens an image has; none is as the encoder says."
    )
    token_width: Annotated[Size, AfterValidator(_width)] = Field(
        default=None, validate_default=True, description="Their size; none is as the encoder says."
    )

    @property
    def looks(self) -> tuple[Look, ...]:
        """What the encoder is asked for."""
        return (Look(self.encoder, TOKENS, (self.layer or 1,), (self.tokens or 1, self.token_width or 1)),)


class Projection(nn.Module):
    """W x + b, in float32; starts as torch's own Linear does, times `gain`, with b = 0."""

    def __init__(self, inside: int, out: int, gain: float = 1.0) -> None:
        super().__init__()
        bound = gain / math.sqrt(inside)
        self.weight = nn.Parameter(torch.empty(out, inside).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inside) -> (..., out)."""
        return functional.linear(x, self.weight, self.bias)


class Looking(Delta):
    """At the embedding: looks at the images of a batch, and leaves what it makes of them for the deltas in the blocks.

    `note` is the name under which they find it. The embedding itself is not edited.
    """

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.looks = (look,)
        self.note = uuid4().hex

    def read(self, features: Tensor) -> Tensor:
        """(images, *look.shape) -> (images, ...): what is left for the others."""
        raise NotImplementedError

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """(tokens, hidden), unchanged."""
        if ctx.sight is not None:
            features = ctx.sight.values[self.looks[0]]
            made = self.read(features.to(next(self.parameters()).dtype))
            # One row more, of zeros, for what sees no image: that is its number (see `Groups`).
            ctx.notes[self.note] = torch.cat([made, made.new_zeros(1, *made.shape[1:])])
        return value

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge("what is made of an image depends on the image, and no weight of the base can hold it")


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the last dimension: an encoder's layers differ in size by orders of magnitude."""
    return functional.layer_norm(x, x.shape[-1:])
