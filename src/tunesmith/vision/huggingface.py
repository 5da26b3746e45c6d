"""CLIP, SigLIP and DINOv2 through transformers: a folder in Hugging Face layout, safetensors only.

pixels -> hidden states of every layer -> the class token's vector (SigLIP, which has none: the mean), and patches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.errors import ConfigError, ModelError
from tunesmith.files import sha256_file
from tunesmith.vision.images import square
from tunesmith.vision.shapes import KINDS, preprocessing, vision_config

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "dinov2": "Dinov2Model"}


class VisionTransformer:
    """The encoder in `folder`. Layer i is what the i-th block gives, before any norm at the end."""

    def __init__(self, folder: Path) -> None:
        kind = vision_config(folder)["model_type"]
        self._steps, self._class_token = preprocessing(folder), KINDS[kind][1]
        self._model = _load(folder, CLASSES[kind.partition("_")[0]])
        self._sha256 = [sha256_file(file) for file in sorted(folder.glob("*.safetensors"))]

    def identity(self) -> Mapping[str, Any]:
        """See `Encoder`."""
        return {"weights": self._sha256, **self._steps}

    def move(self, device: torch.device) -> None:
        """See `Encoder`."""
        self._model.to(device)

    def pixels(self, image: Image) -> Tensor:
        """(3, side, side), float32."""
        steps = self._steps
        pixels = square(image, steps["side"], steps["resize"], steps["resample"]).float() / 255
        mean, std = (torch.tensor(steps[key], dtype=torch.float32)[:, None, None] for key in ("mean", "std"))
        return (pixels - mean) / std

    def layers(self, pixels: Tensor, wanted: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """See `Encoder`."""
        given = pixels.to(self._model.device)
        states = self._model(pixel_values=given, output_hidden_states=True).hidden_states
        first = int(self._class_token)
        return {
            layer: (states[layer][:, 0] if self._class_token else states[layer].mean(1), states[layer][:, first:])
            for layer in wanted
        }


def _load(folder: Path, name: str) -> Any:
    """The model, frozen, in float32. Raises ConfigError without transformers, ModelError for what does not load."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{folder}: this image encoder needs transformers; install it: pip install 'tunesmith[vision]'"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: holds no .safetensors file, and pickled weights are never loaded")
    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: the image encoder does not load ({str(error).splitlines()[0][:120]})") from None
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: {missing[0]} and {len(missing) - 1} more weights are missing; download it again")
    return model.eval().requires_grad_(False)
