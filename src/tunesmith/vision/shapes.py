"""What encoders give, by name or from their configuration file: no weights are read, so that counts need none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.catalog import resolve_encoder
from tunesmith.errors import ModelError

EFFICIENTNET = "efficientnet-lite0"
KINDS = {  # model_type -> (where its vision part's configuration is, does it begin with a class token?)
    "clip": ("vision_config", True),
    "clip_vision_model": ("", True),
    "siglip": ("vision_config", False),
    "siglip_vision_model": ("", False),
    "dinov2": ("", True),
}


@dataclass(frozen=True)
class Shape:
    """Layers 1 to n of an encoder: the `widths` of their vectors, and how many visual `tokens` each of them has.

    `scales`: the layers whose global features are taken by default; `layer`: the one whose tokens are.
    """

    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    scales: tuple[int, ...]
    layer: int


def transformer(layers: int, width: int, tokens: int) -> Shape:
    """A vision transformer: four layers evenly spaced, and the tokens of the last but one, as LLaVA takes them."""
    scales = tuple(sorted({max(1, layers * part // 4) for part in (1, 2, 3, 4)}))
    return Shape((width,) * layers, (tokens,) * layers, scales, max(1, layers - 1))


SHAPES = {
    # Seven stages of a convolutional network and its head, at 224 x 224.
    EFFICIENTNET: Shape(
        (16, 24, 40, 80, 112, 192, 320, 1280),
        tuple(side * side for side in (112, 56, 28, 14, 14, 7, 7, 7)),
        (2, 3, 5, 8),
        8,
    ),
    "openai/clip-vit-base-patch32": transformer(12, 768, 49),
    "openai/clip-vit-base-patch16": transformer(12, 768, 196),
    "openai/clip-vit-large-patch14": transformer(24, 1024, 256),
    "openai/clip-vit-large-patch14-336": transformer(24, 1024, 576),
    "google/siglip-base-patch16-224": transformer(12, 768, 196),
    "google/siglip-so400m-patch14-384": transformer(27, 1152, 729),
    "facebook/dinov2-small": transformer(12, 384, 256),
    "facebook/dinov2-base": transformer(12, 768, 256),
    "facebook/dinov2-large": transformer(24, 1024, 256),
    "facebook/dinov2-giant": transformer(40, 1536, 256),
}


def shape_of(encoder: str) -> Shape:
    """The shape of an encoder, by name or from the config.json of its folder (fetched, if it is a hub's name).

    Raises ModelError, CatalogError.
    """
    return SHAPES[encoder] if encoder in SHAPES else folder_shape(resolve_encoder(encoder))


def folder_shape(folder: Path) -> Shape:
    """The shape of the encoder in a folder in Hugging Face layout. Raises ModelError."""
    config, sizes = vision_config(folder), preprocessing(folder)
    side = sizes["side"] // whole(config, "patch_size", folder)
    return transformer(whole(config, "num_hidden_layers", folder), whole(config, "hidden_size", folder), side * side)


def vision_config(folder: Path) -> dict[str, Any]:
    """The vision part of config.json, with its `model_type`. Raises ModelError for a kind that is not known."""
    config = _read(folder / "config.json")
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ModelError(
            f"{folder / 'config.json'}: model_type {str(kind)[:40]!r} is no image encoder that is known: "
            f"{', '.join(KINDS)}"
        )
    where = KINDS[kind][0]
    found = config.get(where) if where else config
    if not isinstance(found, dict):
        raise ModelError(f"{folder / 'config.json'}: has no {where}; download it again")
    return {**found, "model_type": kind}


def preprocessing(folder: Path) -> dict[str, Any]:
    """{"resize", "side", "mean", "std", "resample"} from preprocessor_config.json. Raises ModelError.

    `resize`: the length of the shorter edge, or None for side x side whatever the shape was; then the middle `side` x
    `side` is cut out, and each channel brought to (x / 255 - mean) / std.
    """
    file = folder / "preprocessor_config.json"
    found = _read(file)
    size, crop = found.get("size"), found.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    side = _side(crop) if found.get("do_center_crop") else _side(size)
    scale = found.get("rescale_factor", 1 / 255)
    means = [found.get(key) for key in ("image_mean", "image_std")]
    known = side and all(
        isinstance(m, list) and len(m) == 3 and all(isinstance(x, (int, float)) for x in m) for m in means
    )
    if not known or not isinstance(scale, (int, float)) or abs(scale * 255 - 1) > 1e-6:
        raise ModelError(f"{file}: says no square size, mean and deviation that are known; give another encoder")
    resample = found.get("resample", 3)
    return {
        "resize": edge if found.get("do_center_crop") and isinstance(edge, int) else None,
        "side": side,
        "mean": means[0],
        "std": means[1],
        "resample": resample if resample in (2, 3) else 3,
    }


def whole(config: Mapping[str, Any], key: str, folder: Path) -> int:
    """A positive number of config.json. Raises ModelError."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 20:
        raise ModelError(f"{folder / 'config.json'}: {key} is {str(value)[:40]}, no size; download it again")
    return value


def _side(size: Any) -> int | None:
    """The side of a square, however it is written."""
    if isinstance(size, Mapping):
        values = {size.get("height"), size.get("width")} - {None} or {size.get("shortest_edge")}
        size = values.pop() if len(values) == 1 else None
    return size if isinstance(size, int) and 0 < size <= 4096 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error)[:60]}); an image encoder's folder has it") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: should hold an object; download it again")
    return found
