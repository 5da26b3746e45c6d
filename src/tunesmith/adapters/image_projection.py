"""Visual tokens before the text: an image's tokens, projected into the embedding's space   (LLaVA, arXiv:2304.08485).

    [ p(x_1) ... p(x_n) | text ]        p(x) = W x + b,   or with `projector: mlp`   W_2 gelu(W_1 x + b_1) + b_2

x_i, (token_width,), are the encoder's tokens at one layer, each brought to mean 0 and deviation 1. They stand at
positions 0 to n - 1, as virtual tokens do, and an example's first token is at position n; an example without an image
has none. At the start they are as large as the model's embeddings. It is the baseline that many know: more tokens in
every layer, where LLaMA-Adapter has a few rows beside attention.

Without an image the model is at the start exactly what it was; with one it is not, since visual tokens are seen. It
cannot be merged, and PEFT has no such method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.prompt import root_mean_square
from tunesmith.adapters.seeing import Projection, TokenSettings, standardised
from tunesmith.config import STRICT
from tunesmith.errors import CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageProjectionSettings(TokenSettings):
    """Settings under `adapter:` for `kind: image_projection`."""

    projector: Literal["linear", "mlp"] = Field(
        default="linear", description="One matrix (LLaVA), or two with GELU between them (LLaVA-1.5)."
    )


class VisualTokens(Delta):
    """Puts p(x) into the rows of an image's visual tokens; `size` is how large the embedding's values are."""

    def __init__(self, settings: ImageProjectionSettings, hidden: int, size: float) -> None:
        super().__init__()
        self.looks = settings.looks
        self.visual_tokens, inside = settings.looks[0].shape
        gain = size * math.sqrt(3)  # of a uniform weight: the output then has deviation `size`
        if settings.projector == "linear":
            self.projector: nn.Module = Projection(inside, hidden, gain)
        else:
            self.projector = nn.Sequential(Projection(inside, hidden), nn.GELU(), Projection(hidden, hidden, 3 * gain))

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """Embeddings (tokens, hidden)."""
        if ctx.sight is None or self.adapter not in ctx.sight.visual:
            return value
        rows, shown = ctx.sight.visual[self.adapter], ctx.sight.shown[self.adapter]
        features = ctx.sight.values[self.looks[0]][shown]
        tokens = self.projector(standardised(features.to(next(self.parameters()).dtype)))
        return value.index_copy(0, rows.flatten(), tokens.flatten(0, 1).to(value.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge("an image's tokens depend on the image, and no weight of the base can hold them")


class ImageProjection:
    """The method of `kind: image_projection`."""

    kind = "image_projection"
    settings = ImageProjectionSettings
    learning_rate = 1e-3

    def identity_at_init(self, settings: ImageProjectionSettings) -> bool:
        """Not with an image: its tokens are seen."""
        return False

    def mergeable(self, settings: ImageProjectionSettings) -> bool:
        """No: they are tokens, not weights."""
        return False

    def place(self, model: Llama, settings: ImageProjectionSettings) -> Iterator[Placement]:
        """One delta, at the embedding."""
        weight = model.model.embed_tokens.weight.detach()
        size = 1.0 if weight.is_meta else root_mean_square(weight)
        yield Placement("model", "embed", VisualTokens(settings, model.config.hidden_size, size))

    def unfreeze(self, model: Llama, settings: ImageProjectionSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: ImageProjectionSettings) -> float:
        """One rate for all."""
        return 1.0


METHOD = ImageProjection()
