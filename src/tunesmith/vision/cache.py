"""Features on the disk, computed once: a folder for each encoder, preprocessing and look; images by their content.

    CACHE/features/efficientnet-lite0-5f0c.../3e7a91.safetensors     {SHA-256 of an image: its features}, up to 256

A file is there whole or not at all. One that cannot be read is left out, and what it held is computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.files import atomic_save_safetensors
from tunesmith.hardware import cache_dir
from tunesmith.model.sight import Look

RECIPE = 1  # counts changes of how features are made


class FeatureCache:
    """The features of one look by one encoder, of this identity."""

    def __init__(self, look: Look, identity: Mapping[str, Any], root: Path | None = None) -> None:
        key = [RECIPE, dict(identity), look.what, look.layers, look.shape]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9.]+", "-", look.encoder)[-40:].strip("-.")
        self.folder = (root or cache_dir() / "features") / f"{name}-{look.what}-{digest[:16]}"
        self._shape = look.shape
        self._file: dict[str, Path] = {}
        self._known: set[Path] = set()

    def missing(self, keys: list[str]) -> list[str]:
        """Those of these images whose features are not there."""
        if any(key not in self._file for key in keys):
            self._scan()
        return [key for key in keys if key not in self._file]

    def get(self, key: str) -> Tensor | None:
        """The features of an image, or None."""
        from safetensors import SafetensorError, safe_open

        if self.missing([key]):
            return None
        try:
            # Not of inference mode, whatever the caller is in: the same tensor may be trained with later.
            with torch.inference_mode(False), safe_open(self._file[key], framework="pt") as file:
                found = file.get_tensor(key).clone()  # not a window into the file, which may go or be cut
        except (OSError, SafetensorError):
            found = None
        if found is None or tuple(found.shape) != self._shape:  # damaged: it is not there
            del self._file[key]
            return None
        return found

    def put(self, features: Mapping[str, Tensor]) -> None:
        """Keep the features of these images. Raises DiskError."""
        name = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:16]
        file = self.folder / f"{name}.safetensors"
        atomic_save_safetensors(file, {key: value.contiguous() for key, value in features.items()})
        self._known.add(file)
        self._file |= dict.fromkeys(features, file)

    def _scan(self) -> None:
        """Look through the files that came since."""
        from safetensors import SafetensorError, safe_open

        for file in sorted(set(self.folder.glob("*.safetensors")) - self._known) if self.folder.is_dir() else ():
            self._known.add(file)
            try:
                with safe_open(file, framework="pt") as tensors:
                    self._file |= dict.fromkeys(tensors.keys(), file)
            except (OSError, SafetensorError):
                continue
