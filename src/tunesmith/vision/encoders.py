"""Frozen image encoders behind one interface: pixels -> vectors of some layers, and tokens of some layers.

efficientnet-lite0                  from the catalog: needs no hub (efficientnet.py)
a folder in Hugging Face layout,    CLIP, SigLIP or DINOv2, through transformers (huggingface.py)
or ORG/NAME of the hub
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tunesmith.data.catalog import resolve_encoder
from tunesmith.errors import AdapterError
from tunesmith.model.sight import POOLED, Look
from tunesmith.vision.efficientnet import EfficientNetLite0
from tunesmith.vision.huggingface import VisionTransformer
from tunesmith.vision.shapes import EFFICIENTNET

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder(Protocol):
    """A frozen image encoder. Layers are numbered from 1; every layer has a grid of vectors."""

    def identity(self) -> Mapping[str, Any]:
        """What decides its features: hash of its weights, and preprocessing. Plain values."""

    def move(self, device: torch.device) -> None:
        """Compute there from now on."""

    def pixels(self, image: Image) -> Tensor:
        """What `layers` takes of one image, (3, side, side), uint8 or float32, on the CPU."""

    def layers(self, pixels: Tensor, wanted: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """For each wanted layer its global vector, (images, width), and its tokens, (images, count, width)."""


def open_encoder(name: str) -> Encoder:
    """The encoder called `name`. Raises CatalogError, ModelError, ConfigError where an extra is missing."""
    path = resolve_encoder(name)
    return EfficientNetLite0(path) if name == EFFICIENTNET else VisionTransformer(path)


@torch.inference_mode()
def features(encoder: Encoder, pixels: Tensor, looks: Sequence[Look]) -> dict[Look, Tensor]:
    """Features of images (images, 3, side, side) for each look: (images, *look.shape), float32, on the CPU.

    Raises AdapterError where the encoder gives another shape than a look was made for.
    """
    layers = encoder.layers(pixels, sorted({layer for look in looks for layer in look.layers}))
    found = {}
    for look in looks:
        if look.what == POOLED:
            value = torch.cat([layers[layer][0] for layer in look.layers], dim=-1)
        else:
            value = layers[look.layers[0]][1]
        if value.shape[1:] != look.shape:
            raise AdapterError(
                f"encoder {look.encoder}: gives {look.what} of shape {tuple(value.shape[1:])}, and the adapter was "
                f"made for {look.shape}: it is another encoder; give the one that it was trained with"
            )
        found[look] = value.float().cpu().clone()
    return found
