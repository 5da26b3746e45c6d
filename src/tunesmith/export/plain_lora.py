"""Adapters that are plain LoRA, W + s B A, as other servers take them: one rank, one alpha, nothing else.

    s_i B_i A_i  =  (alpha / r) B' A',    A' = A_i, B' = (s_i r / alpha) B_i, both padded with zeros to rank r

Ranks and scales of their own for some modules, rsLoRA's scale, PiSSA's start and AdaLoRA's triplets all become this,
exactly. With one rank and one scale, A and B stay as they are, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.adapters.adalora import AdaLoRADelta
from tunesmith.adapters.base import Delta, weight_path
from tunesmith.adapters.lora import EmbeddingDelta, LoRADelta
from tunesmith.errors import CannotExchange


@dataclass(frozen=True)
class Pair:
    """A (rank, in), B (out, rank), both float32 on the CPU, and the scale s of their product."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.A)

    def at(self, alpha: float) -> Tensor:
        """B' of the same update at the scale alpha / rank."""
        factor = self.scale * self.rank / alpha
        return self.B if factor == 1 else self.B * factor


def pairs_of(adapter: Adapter, where: str) -> dict[str, Pair]:
    """The update of each module by path; `where` names the format. Raises CannotExchange for other methods."""
    if adapter.base:
        raise CannotExchange(
            f"{where}: {adapter.kind} trained {next(iter(adapter.base))} whole ({len(adapter.base)} weights), which "
            "plain LoRA cannot say; merge it instead: --to hf or --to gguf"
        )
    return {weight_path(place): _pair(delta, place, adapter.kind, where) for place, delta in adapter.deltas.items()}


def common_alpha(pairs: dict[str, Pair]) -> float:
    """The alpha that leaves B as it is for the first module, and for all where they share rank and scale."""
    first = next(iter(pairs.values()))
    return first.scale * first.rank


def uniform(pairs: dict[str, Pair]) -> tuple[int, float, dict[str, tuple[Tensor, Tensor]]]:
    """(r, alpha, A' and B' by path), all of one rank."""
    rank = max(pair.rank for pair in pairs.values())
    same = all(pair.rank == rank for pair in pairs.values())
    alpha = common_alpha(pairs) if same else float(rank)
    made = {}
    for path, pair in pairs.items():
        factor = pair.scale * rank / alpha
        B = pair.B if factor == 1 else pair.B * factor
        made[path] = (_padded(pair.A, rank, 0), _padded(B, rank, 1))
    return rank, alpha, made


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - tensor.shape[axis]
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if missing else tensor.contiguous()


def _pair(delta: Delta, place: str, kind: str, where: str) -> Pair:
    if type(delta) is LoRADelta:  # what is built upon it, such as DoRA, computes something else
        A, B = delta.factors()
    elif isinstance(delta, EmbeddingDelta):
        A, B = delta.A, delta.B
    elif isinstance(delta, AdaLoRADelta):
        A, B = delta.Q, delta.P * delta.singular
    else:
        raise CannotExchange(
            f"{where}: {kind} on {place} is not plain LoRA, and nothing else can be said there; merge it instead: "
            "--to hf or --to gguf"
        )
    return Pair(A.detach().float().cpu(), B.detach().float().cpu(), float(delta.scale))
