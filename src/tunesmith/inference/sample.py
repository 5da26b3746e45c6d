"""How the next token is chosen: the settings, and the arithmetic on logits.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, then the draw. Every step is
a pure function of logits (n, vocab) and is equal to the LogitsProcessor of the same name.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import GenerationError, did_you_mean


@dataclass(frozen=True)
class GenerationSettings:
    """What a user may ask of generation; a value that another one would silently ignore is refused.

    `temperature` 0 is greedy (the likeliest token); above 0 tokens are drawn, narrowed by `top_k`, `top_p` and
    `min_p`. `beams` > 1 searches instead of drawing: sum of log-probabilities / length ** `length_penalty`. `n`
    answers a prompt. `stop` strings end an answer and are cut off. `seed` fixes the draw of every prompt, whatever
    else is in the batch. Raises GenerationError.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, problem in (*self._out_of_range(), *self._contradictions()):
            raise GenerationError(f"generation: {name}={getattr(self, name)!r}{problem}")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn by chance."""
        return self.temperature > 0

    def changed(self, **values: Any) -> GenerationSettings:
        """A copy with these values; an unknown name raises GenerationError with the nearest known one."""
        known = [field.name for field in fields(self)]
        for name in values:
            if name not in known:
                raise GenerationError(
                    f"generation: unknown setting {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})"
                )
        return replace(self, **values)

    def _out_of_range(self) -> list[tuple[str, str]]:
        found = []
        for name in ("max_new_tokens", "beams", "n", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                found.append(
                    (name, ": must be a whole number of at least 1" + (", or left out" if name == "top_k" else ""))
                )
        ranges = {
            "temperature": (0.0, math.inf, "0 (greedy) or more"),
            "top_p": (5e-324, 1.0, "above 0 and at most 1, or left out"),
            "min_p": (0.0, 1.0, "from 0 to 1, or left out"),
            "repetition_penalty": (5e-324, math.inf, "above 0 (1 changes nothing)"),
            "length_penalty": (-math.inf, math.inf, "a number"),
        }
        for name, (low, high, words) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (name in ("top_p", "min_p") and value is None) and not (number and low <= value <= high):
                found.append((name, f": must be {words}"))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            found.append(
                ("stop", ": must be a sequence of non-empty strings; an empty one would end every answer at once")
            )
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63):
            found.append(("seed", ": must be a whole number from 0 to 2**63 - 1"))
        return found

    def _contradictions(self) -> list[tuple[str, str]]:
        narrowing = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.beams > 1:
            chance = ["temperature", *narrowing] if self.samples else narrowing
            cure = f" has no effect with beams={self.beams}: leave it out, or set beams=1 to sample"
            found = [(name, cure) for name in chance]
            if self.n > self.beams:
                found.append(("n", f" is more than beams={self.beams}: raise beams or lower n"))
            return found
        found = []
        if not self.samples:
            cure = " has no effect with temperature=0 (greedy): set temperature=1, or leave it out"
            found += [(name, cure) for name in narrowing]
            if self.n > 1:
                found.append(
                    ("n", " answers would all be the same with temperature=0 (greedy): set temperature=1, or beams")
                )
        if self.length_penalty != 1.0:
            found.append(("length_penalty", " has no effect with beams=1: set beams above 1, or leave it out"))
        return found


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens in `seen` (n, vocab; bool): a positive logit is divided by `penalty`, a negative one multiplied (CTRL)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of a row become -inf; ties with the k-th stay."""
    kth = torch.topk(logits, min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p   (nucleus sampling, arXiv:1904.09751)."""
    ordered, index = torch.sort(logits, descending=False)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Drop the tokens that are less likely than p times the likeliest one   (arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    drop = probabilities < p * probabilities.amax(-1, keepdim=True)
    drop.scatter_(-1, probabilities.argmax(-1, keepdim=True), False)
    return logits.masked_fill(drop, -math.inf)


def process(logits: Tensor, settings: GenerationSettings, seen: Tensor | None) -> Tensor:
    """Apply the settings to logits (n, vocab), in transformers' order; `seen` serves the repetition penalty."""
    if settings.repetition_penalty != 1.0 and seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.samples and settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def choose(logits: Tensor, settings: GenerationSettings, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of every row of processed logits (n, vocab): (n,) int64.

    A draw inverts the distribution function at one uniform number of the row's own generator, so that a row's tokens
    depend on its seed alone and not on the rows beside it.
    """
    if not settings.samples:
        return logits.argmax(-1)
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    total = logits.softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    return drawn.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def generator_for(seed: int | None, answer: int) -> torch.Generator:
    """The random numbers of answer number `answer` to a prompt; without a seed they differ from call to call."""
    base = secrets.randbits(62) if seed is None else seed
    return torch.Generator().manual_seed((base + 0x9E3779B97F4A7C15 * answer) % (1 << 63))
