"""An image from bytes, within limits: a small set of formats, no huge ones, nothing fetched.

bytes -> header: format and size -> pixels, upright, on white, RGB -> resized -> (3, side, side)
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))
MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 50_000_000  # 150 MB as RGB
# What Pillow raises for files that are broken, cut short or hostile.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, MemoryError, struct.error)


def read_bytes(image: Path | bytes, where: str) -> bytes:
    """The bytes of an image. Raises DataError naming `where` for one that is missing, no file, empty or too large."""
    if isinstance(image, bytes):
        data = image
    else:
        try:
            if not image.is_file():
                raise DataError(f"{where}: image {image}: no such file")
            with image.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: image {str(image)[:200]}: {getattr(error, 'strerror', None) or error}") from None
    if not data or len(data) > MAX_BYTES:
        what = f"is larger than {MAX_BYTES >> 20} MiB; make it smaller" if data else "is empty"
        raise DataError(f"{where}: image {_name(image)} {what}")
    return data


def decode(data: bytes, where: str, name: Path | bytes = b"") -> Image:
    """The image as RGB, upright, what is transparent on white. Raises DataError naming `where`, ConfigError."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError("images need Pillow; install it: pip install 'tunesmith[vision]'") from None
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            wide, high = image.size
            if wide * high > MAX_PIXELS:
                raise DataError(
                    f"{where}: image {_name(name)} unpacks to {wide} x {high} pixels, more than "
                    f"{MAX_PIXELS // 1_000_000} million; make it smaller"
                )
            image.seek(0)
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")
    except (*BROKEN, zlib.error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DataError(f"{where}: image {_name(name)} is broken, or none of {', '.join(FORMATS)} ({reason})") from None


def square(image: Image, side: int, resize: int | None, resample: int = 3) -> Tensor:
    """(3, side, side), uint8: the shorter edge brought to `resize`, then the middle; None: all of it, squeezed.

    `resample`: 2 is bilinear, 3 bicubic, as Pillow and preprocessor_config.json number them.
    """
    from PIL.Image import Resampling

    how = Resampling(resample)
    if resize is None:
        image = image.resize((side, side), how)
    else:
        wide, high = image.size
        scale = resize / min(wide, high)
        new = (resize, max(resize, int(high * scale))) if wide <= high else (max(resize, int(wide * scale)), resize)
        image = image.resize(new, how)
        left, top = (new[0] - side) // 2, (new[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def _name(image: Path | bytes) -> str:
    return str(image)[:200] if isinstance(image, Path) else "in the data"
