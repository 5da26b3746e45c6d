"""Last layers: the last k blocks of the base are trained, and with them, if asked for, the final norm and the head.

The oldest baseline. Nothing below the lowest of these blocks is reached by the backward, so it is cheap in time and in
memory for its many parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from tunesmith.adapters.base import Placement
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama, RMSNorm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LastLayersSettings:
    """Settings under `adapter:` for `kind: last_layers`."""

    layers: int = Field(default=1, ge=1, description="How many of the last blocks.")
    norm: bool = Field(default=True, description="Train the final norm too.")
    head: bool = Field(default=False, description="Train lm_head too; if it is tied, the embedding with it.")


class LastLayers:
    """The method of `kind: last_layers`."""

    kind = "last_layers"
    settings = LastLayersSettings
    learning_rate = 1e-3
    trains_base = True

    def identity_at_init(self, settings: LastLayersSettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: LastLayersSettings) -> bool:
        """There are no deltas: what is trained is the base's own."""
        return True

    def place(self, model: Llama, settings: LastLayersSettings) -> Iterator[Placement]:
        """No deltas."""
        return iter(())

    def unfreeze(self, model: Llama, settings: LastLayersSettings) -> Iterator[str]:
        """Weights and biases of blocks, norm and head. Raises AdapterError for more blocks than there are."""
        count = model.config.num_hidden_layers
        if settings.layers > count:
            raise AdapterError(f"adapter.layers: {settings.layers} of the last layers, and this model has {count}")
        for layer in range(count - settings.layers, count):
            yield from _own_weights(f"model.layers.{layer}", model.model.layers[layer])
        if settings.norm:
            yield "model.norm.weight"
        if settings.head and model.config.tie_word_embeddings:
            logger.warning("adapter.head: this model's head is its embedding, so the embedding is trained as well")
            yield "model.embed_tokens.weight"
        elif settings.head:
            yield "lm_head.weight"

    def lr_scale(self, name: str, settings: LastLayersSettings) -> float:
        """One rate for all."""
        return 1.0


def _own_weights(path: str, block: nn.Module) -> Iterator[str]:
    """Names of the base's parameters in a block; other adapters' are not among them."""
    for name, module in block.named_modules():
        if isinstance(module, Linear | RMSNorm):
            yield from (f"{path}.{name}.{key}" for key, _ in module.named_parameters(recurse=False))


METHOD = LastLayers()
