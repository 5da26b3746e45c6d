"""Rotary scaling: how a config.json or a GGUF file says it, and how Llama 3's is recovered from its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import ModelError
from tunesmith.model.fields import Fields, shortest


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` divides all by `factor`; `llama3` only the long wavelengths."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def to_hf(self) -> dict[str, Any]:
        """Return the mapping that config.json keeps under `rope_scaling`."""
        if self.kind == "linear":
            return {"rope_type": "linear", "type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }


def rope_from_hf(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from the older keys or from transformers 5's `rope_parameters`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"{where}: rope_parameters: one mapping for all layers is expected, got {str(rope)[:60]!r}")
    read = Fields(rope, f"{where}: rope_scaling")
    outer = Fields(config, where).number("rope_theta", 10000.0, least=1.0, most=1e15)
    parameters = config.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
    theta = read.number("rope_theta", outer if inner is None else inner, least=1.0, most=1e15)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    if kind == "llama3":
        known |= {"low_freq_factor", "high_freq_factor"}
    elif kind not in ("default", "linear", None):
        raise ModelError(f"{where}: rope type {str(kind)[:60]!r} is not supported; known: default, linear, llama3")
    for key, value in rope.items():
        if key not in known and value is not None or key == "partial_rotary_factor" and value not in (None, 1):
            raise ModelError(
                f"{where}: rope_scaling.{str(key)[:60]!r}={str(value)[:60]!r} is not understood; not supported"
            )
    if kind in ("default", None):
        return theta, None
    factor = read.number("factor", None, least=1.0, most=1e6)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    scaling = RopeScaling(
        "llama3",
        factor,
        read.number("low_freq_factor", None, most=1e6),
        read.number("high_freq_factor", None, most=1e6),
        read.count("original_max_position_embeddings", None, most=1 << 31),
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor or math.isclose(factor, 0):
        raise ModelError(f"{where}: rope_scaling: low_freq_factor must be below high_freq_factor")
    return theta, scaling


def rope_from_gguf(
    read: Fields, arch: str, head_dim: int, freqs: Sequence[float] | None
) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from GGUF metadata and the content of `rope_freqs.weight`, if the file has it."""
    theta = shortest(read.number(f"{arch}.rope.freq_base", 10000.0, least=1.0, most=1e15))
    rotated = read.count(f"{arch}.rope.dimension_count", head_dim, most=65536)
    if rotated != head_dim:
        raise ModelError(
            f"{read.where}: {arch}.rope.dimension_count={rotated}: rotating part of a head is not supported"
        )
    kind = read.values.get(f"{arch}.rope.scaling.type", "none")
    if freqs is not None:
        if kind not in ("none", None):
            raise ModelError(f"{read.where}: rope_freqs.weight together with rope.scaling.type {str(kind)[:60]!r}")
        original = read.values.get(f"{arch}.rope.scaling.original_context_length")
        return theta, _llama3_from_freqs(freqs, theta, head_dim, original, read.where)
    if kind in ("none", None):
        return theta, None
    if kind != "linear":
        raise ModelError(
            f"{read.where}: rope scaling {str(kind)[:60]!r} is not supported; known: linear, llama3's factors"
        )
    factor = shortest(read.number(f"{arch}.rope.scaling.factor", None, least=1.0, most=1e6))
    return theta, RopeScaling("linear", factor) if factor != 1.0 else None


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """What each of the head_dim/2 frequencies is divided by: 1 at short wavelengths, `factor` at long ones."""
    factors = []
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def _llama3_from_freqs(
    freqs: Sequence[float], theta: float, head_dim: int, original: Any, where: str
) -> RopeScaling | None:
    """Find the Llama 3 scaling that gives exactly these factors; GGUF keeps the factors, not the four numbers."""
    if len(freqs) != head_dim // 2 or not all(math.isfinite(f) and 1 <= f <= 1e6 for f in freqs):
        raise ModelError(f"{where}: rope_freqs.weight: {head_dim // 2} finite factors of at least 1 are needed")
    factor = shortest(max(freqs))
    if factor == 1.0:
        return None
    contexts = [original] if isinstance(original, int) else []
    contexts += [8192, *(1 << n for n in range(5, 21))]
    for context in contexts:  # (low, high) is (1, 4) in every published Llama 3
        scaling = RopeScaling("llama3", factor, 1.0, 4.0, context)
        if all(
            math.isclose(a, b, rel_tol=1e-5)
            for a, b in zip(llama3_factors(scaling, theta, head_dim), freqs, strict=True)
        ):
            return scaling
    raise ModelError(f"{where}: rope_freqs.weight is not Llama 3's scaling (low 1, high 4); not supported")
