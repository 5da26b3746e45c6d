"""Rotary position embedding (RoFormer, arXiv:2104.09864), with linear and LLaMA-3.1 scaling of the frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every rotated pair, (head_dim / 2,), float32.

    `linear` divides all by the factor; `llama3` (the Llama 3.1 report's code) divides those whose wavelength exceeds
    original / low_freq_factor, leaves those below original / high_freq_factor, and blends between.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = (1 - blend) * frequency / scaling.factor + blend * frequency
    scaled = torch.where(wavelength > low, frequency / scaling.factor, frequency)
    return torch.where((wavelength <= low) & (wavelength >= high), smooth, scaled)


def rotary_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (tokens, head_dim / 2) in `dtype`.

    The angles are float32 whatever `dtype` is, as in every published implementation: a float64 model then agrees with
    theirs.
    """
    angles = torch.outer(positions.float(), inverse_frequencies(config).to(positions.device))
    return angles.cos().to(dtype), angles.sin().to(dtype)
