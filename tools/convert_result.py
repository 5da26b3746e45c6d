"""What a converter returns, and how it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Refused(Exception):
    """The source cannot be converted exactly, or is not what it should be; one line says why."""


@dataclass(frozen=True)
class Result:
    """An adapter in PEFT's format (`peft` is adapter_config.json), or else in Tunesmith's own (`kind`, `settings`)."""

    tensors: dict[str, Tensor]
    peft: dict[str, Any] | None = None
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
