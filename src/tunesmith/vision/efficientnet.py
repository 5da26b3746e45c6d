"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6 (arXiv:1905.11946; Google, 2020).

    image -> stem -> seven stages of inverted bottlenecks -> head: (1280, 7, 7)
    bottleneck:   1x1 up, depthwise k x k, 1x1 down; each with batch norm; x + f(x) where the shape stays

Weights carry the names that the published file has. Padding is TensorFlow's "same": what is odd goes right and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.data.encoder_weights import WEIGHTS
from tunesmith.errors import ModelError
from tunesmith.files import sha256_file
from tunesmith.vision.images import square

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 224
EPS = 1e-3  # of the batch norms
# repeats, kernel, stride, expansion of each stage
STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))


class EfficientNetLite0:
    """The encoder in `folder`. Layers 1 to 7 are the stages, 8 is the head."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = folder / WEIGHTS
        try:
            tensors = load_file(file)
            self._sha256 = sha256_file(file)
            self._convolutions = _folded(tensors)
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{file}: cannot be read ({str(error)[:80]}); remove {folder} to fetch it again") from None

    def identity(self) -> Mapping[str, Any]:
        """See `Encoder`."""
        return {"weights": self._sha256, "side": SIDE, "resize": SIDE, "resample": 3, "mean": 127, "std": 128}

    def move(self, device: torch.device) -> None:
        """See `Encoder`."""
        self._convolutions = {name: (w.to(device), b.to(device)) for name, (w, b) in self._convolutions.items()}

    def pixels(self, image: Image) -> Tensor:
        """(3, 224, 224), uint8."""
        return square(image, SIDE, SIDE)

    def layers(self, pixels: Tensor, wanted: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """See `Encoder`."""
        device = self._convolutions["_conv_stem"][0].device
        maps = self.maps((pixels.to(device).float() - 127) / 128)
        return {layer: (maps[layer].mean((2, 3)), maps[layer].flatten(2).transpose(1, 2)) for layer in wanted}

    def maps(self, x: Tensor) -> dict[int, Tensor]:
        """The feature map of every layer, (images, width, side, side), of normalised pixels (images, 3, 224, 224)."""
        x = self._convolve("_conv_stem", x, 2).clamp(0, 6)
        found, block = {}, 0
        for stage, (repeats, _, stride, expansion) in enumerate(STAGES, 1):
            for repeat in range(repeats):
                name, before = f"_blocks.{block}", x
                if expansion > 1:
                    x = self._convolve(f"{name}._expand_conv", x).clamp(0, 6)
                x = self._convolve(f"{name}._depthwise_conv", x, 1 if repeat else stride).clamp(0, 6)
                x = self._convolve(f"{name}._project_conv", x)
                x = x + before if repeat else x
                block += 1
            found[stage] = x
        found[len(STAGES) + 1] = self._convolve("_conv_head", x).clamp(0, 6)
        return found

    def _convolve(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution with its batch norm; one that has a single input channel a filter is depthwise."""
        weight, bias = self._convolutions[name]
        if (kernel := weight.shape[-1]) > 1:
            gap = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
            x = functional.pad(x, [gap // 2, gap - gap // 2] * 2)
        return functional.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])


def _folded(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution with its batch norm in it. Raises KeyError."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    blocks = sum(repeats for repeats, *_ in STAGES)
    for block in range(blocks):
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if block or convolution != "_expand_conv":
                pairs[f"_blocks.{block}.{convolution}"] = f"_blocks.{block}.{norm}"
    found = {}
    for name, norm in pairs.items():
        scale = tensors[f"{norm}.weight"] * torch.rsqrt(tensors[f"{norm}.running_var"] + EPS)
        bias = tensors[f"{norm}.bias"] - scale * tensors[f"{norm}.running_mean"]
        found[name] = scale[:, None, None, None] * tensors[f"{name}.weight"], bias
    return found
