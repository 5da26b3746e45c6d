"""Random weights as a model folder: config.json and random_init.json, from which every process draws the same ones.

    matrices ~ N(0, std), std 0.02;    norms 1;    biases 0        as Hugging Face's models start

A tensor's numbers depend on the seed and its own name, so they can be read one by one, in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import ModelError
from tunesmith.files import atomic_write_json
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import read_json

if TYPE_CHECKING:
    from tunesmith.quant.storage import Storage

RANDOM = "random_init.json"
STD = 0.02


def write_random(folder: Path, config: ModelConfig, seed: int) -> None:
    """Make `folder` a model of random weights; only what they are drawn from is written."""
    atomic_write_json(folder / "config.json", config.to_hf())
    atomic_write_json(folder / RANDOM, {"seed": seed, "std": STD})


class RandomWeights:
    """Config, shapes and tensors of such a folder; see `load.Weights`."""

    kind = "random"
    keeps = "no stored weights: they are random"
    quantized: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = ModelConfig.from_hf(read_json(path / "config.json"), str(path / "config.json"))
        self.shapes: dict[str, tuple[int, ...]] = self.config.weight_shapes()
        said: Any = read_json(path / RANDOM)
        self.seed, self.std = _number(said, "seed", int, path), _number(said, "std", float, path)

    def close(self) -> None:
        """Nothing is open."""

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one tensor in `dtype`."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, self.std, generator=draw).to(dtype)

    def held(self, name: str) -> tuple[torch.Tensor, Storage]:
        """There are none in few bits. Raises ModelError."""
        raise ModelError(f"{self.path}: {name} is not quantized")

    def sample(self, name: str) -> tuple[str, bytes]:
        """Return (stored type, what the numbers are drawn from)."""
        return "F32", f"{self.seed} {self.std}".encode()


def _number(said: Any, key: str, kind: type[int] | type[float], path: Path) -> Any:
    value = said.get(key) if isinstance(said, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 2**63:
        raise ModelError(f"{path / RANDOM}: {key}={str(value)[:40]!r} should be a number of at least 0")
    return value
