"""The `image` of a row: a path, bytes, or a data URL; never an address in a network.

{"image": "pictures/1.png", ...}   {"image": "data:image/png;base64,iVBOR...", ...}   {"image": {"bytes": ...}, ...}
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError

DATA_URL = re.compile(r"data:(?:image/[a-z0-9.+-]+)?(?:;[a-z0-9.=+-]+)*;base64,", re.IGNORECASE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def image_of(raw: Mapping[str, Any], source: str) -> Path | bytes | None:
    """The image of a parsed row; null and "" are none. Raises DataError for what is no image's place.

    {"bytes", "path"} is how Parquet files of the datasets library hold one.
    """
    value = raw.get("image")
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path") if value.get(key) is not None), None)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{source}: field 'image' must be a path, a data URL or bytes, not {type(value).__name__}; correct the row"
        )
    return image_at(value, source)


def image_at(text: str, source: str) -> Path | bytes:
    """What a path or a data URL names. Raises DataError for a network address, and for base64 that is none."""
    if ADDRESS.match(text):
        raise DataError(f"{source}: image {text[:60]!r} is an address, and images are never fetched: save it as a file")
    if not text[:5].lower() == "data:":
        return Path(text)
    head = DATA_URL.match(text)
    if head is None:
        raise DataError(f"{source}: image {text[:40]!r}... is no data URL of an image: data:image/png;base64,...")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{source}: the image's data URL is not base64; write it again") from None


def from_folder(image: Any, folder: Path) -> Any:
    """A relative path counts from `folder`; anything else is as it was."""
    return folder / image if isinstance(image, Path) else image
