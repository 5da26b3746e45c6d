"""Tiny image encoders in Hugging Face layout, and images that a test draws: coloured shapes on black."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE, PATCH, WIDTH, LAYERS = 16, 4, 12, 3
COLOURS = {"red": (230, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
SHAPES = ("square", "disc")
MEANS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def their_model(kind: str, seed: int = 0) -> Any:
    """A random encoder of transformers, in float32."""
    import transformers as tf

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": SIDE}
    sizes |= {"patch_size": PATCH}
    torch.manual_seed(seed)
    makers = {
        "clip": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes, intermediate_size=20)),
        "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes, intermediate_size=20)),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**sizes, mlp_ratio=2)),
    }
    model = makers[kind]().eval()
    with torch.no_grad():  # some start at zero, and would hide what they stand for
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def write_encoder(folder: Path, kind: str = "clip", seed: int = 0, **changes: Any) -> Path:
    """Save a random encoder, with how images are prepared for it."""
    their_model(kind, seed).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    steps = {"size": {"shortest_edge": SIDE}, "crop_size": square, "do_center_crop": True}
    steps = {"size": square} if kind == "siglip" else steps
    steps |= {"resample": 3, "rescale_factor": 1 / 255, **MEANS, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps), encoding="utf-8")
    return folder


def draw(colour: str, shape: str, seed: int = 0, side: int = 24) -> Image.Image:
    """A coloured shape somewhere on black, with noise on it."""
    rng = np.random.default_rng(seed)
    size, (x, y) = int(rng.integers(9, 14)), rng.integers(0, side - 14, 2)
    rows, columns = np.mgrid[:side, :side]
    inside = (rows >= y) & (rows < y + size) & (columns >= x) & (columns < x + size)
    if shape == "disc":
        inside = (rows - y - size / 2) ** 2 + (columns - x - size / 2) ** 2 <= size**2 / 4
    pixels = rng.integers(0, 30, (side, side, 3)) + inside[..., None] * np.array(COLOURS[colour]) * 0.85
    return Image.fromarray(pixels.astype(np.uint8))


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's bytes."""
    held = BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def write_image(path: Path, colour: str = "red", shape: str = "disc", seed: int = 0) -> Path:
    """A drawn image as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_bytes(draw(colour, shape, seed)))
    return path
