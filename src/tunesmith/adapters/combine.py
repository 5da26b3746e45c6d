"""Combine: one adapter that changes the model by a weighted sum of what others change.

    LoRA     sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]      exact, of the summed rank
    BitFit   sum_i w_i b_i

Exact only where a method's change is linear in what is saved of it; the others are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tunesmith.adapters import attach
from tunesmith.adapters.base import Adapter, Delta, weight_path
from tunesmith.adapters.bitfit import BiasDelta
from tunesmith.adapters.lora import EmbeddingDelta, LoRADelta
from tunesmith.adapters.peft_targets import short_names
from tunesmith.adapters.targets import EMBEDDING
from tunesmith.errors import AdapterError, did_you_mean
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama, RMSNorm

Part = tuple[Adapter, float]


def combine(model: Llama, adapters: Mapping[str, Adapter], weights: Mapping[str, float], name: str) -> Adapter:
    """Attach, under `name`, the weighted sum of some of `adapters` (those of this model, by name).

    The parts stay as they are. Raises AdapterError for methods whose sum is no adapter of the method, for different
    methods, and for names that are not there.
    """
    if not weights:
        raise AdapterError("combine: nothing to combine; give adapters with their weights")
    parts: list[Part] = []
    for key, weight in weights.items():
        if key not in adapters:
            raise AdapterError(f"combine: there is no adapter {key!r}{did_you_mean(key, adapters)}")
        if not math.isfinite(weight):
            raise AdapterError(f"combine: the weight of {key!r} is {weight}; give a finite number")
        parts.append((adapters[key], weight))
    together = _way(parts)
    spec, state = together(model, parts)
    combined = attach(model, spec, name)
    combined.load_state(state, f"combine: {' + '.join(weights)}")
    return combined


@contextmanager
def weighted(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Iterator[None]:
    """Attached together, let each of these act with its weight; afterwards fully again. What a combination equals."""
    held: list[tuple[Delta, float | Tensor]] = []
    try:
        for key, weight in weights.items():
            for delta in adapters[key].deltas.values():
                if isinstance(delta, LoRADelta | EmbeddingDelta):
                    held.append((delta, delta.scale))
                    delta.scale *= weight
                elif isinstance(delta, BiasDelta):
                    held.append((delta, delta.bias.detach().clone()))
                    delta.bias.data.mul_(weight)
        yield
    finally:
        for delta, before in held:
            if isinstance(before, Tensor) and isinstance(delta, BiasDelta):
                delta.bias.data.copy_(before)
            elif isinstance(delta, LoRADelta | EmbeddingDelta):
                delta.scale = float(before)


def _way(parts: Sequence[Part]) -> Callable[[Llama, Sequence[Part]], tuple[dict[str, object], dict[str, Tensor]]]:
    """How these are summed. Raises AdapterError where they cannot be."""
    kinds = {adapter.kind: adapter for adapter, _ in parts}
    if len(kinds) > 1:
        raise AdapterError(
            f"combine: {' and '.join(sorted(kinds))} are different methods, whose sum is neither; attach both, or "
            "train them together with kind: mixed"
        )
    for adapter, _ in parts:
        if adapter.base:
            raise AdapterError(
                f"combine: {adapter.name!r} ({adapter.kind}) trained the base's own weights: it holds their new "
                "values, not a change that could be added to another's"
            )
        for delta in adapter.deltas.values():
            if type(delta) not in _SUMS:  # what is built upon these, such as DoRA, computes something else
                raise AdapterError(
                    f"combine: {adapter.name!r} ({adapter.kind}) does not change the model linearly in its parameters, "
                    f"so their weighted sum is not the weighted sum of what they do; {_LINEAR}"
                )
    return _SUMS[type(next(iter(parts[0][0].deltas.values())))]


def _lora(model: Llama, parts: Sequence[Part]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Ranks end to end: A as it is, B with weight and scale in it, so that the scale is 1."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in parts:
        for place, delta in adapter.deltas.items():
            if isinstance(delta, LoRADelta | EmbeddingDelta):
                A, B = delta.factors() if isinstance(delta, LoRADelta) else (delta.A, delta.B)
                found.setdefault(place, []).append((A.detach(), weight * delta.scale * B.detach()))
    state = {}
    for place, factors in found.items():
        state[f"{place}.A"] = torch.cat([A for A, _ in factors])
        state[f"{place}.B"] = torch.cat([B for _, B in factors], dim=1)
    ranks = {weight_path(place): len(state[f"{place}.A"]) for place in found}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: own for path, own in ranks.items() if own != rank}
    linears = [path for path, module in model.named_modules() if isinstance(module, Linear)]
    targets = short_names(set(ranks), [*linears, EMBEDDING]) or sorted(ranks)
    spec = {"kind": "lora", "rank": rank, "alpha": float(rank), "target_modules": targets}
    patterns = {"rank_pattern": others, "alpha_pattern": {path: float(own) for path, own in others.items()}}
    return {**spec, **patterns}, state


def _bitfit(model: Llama, parts: Sequence[Part]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Biases are added; where a part has none, it adds nothing."""
    state: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for key, bias in adapter.trainable.items():
            state[key] = state.get(key, torch.zeros_like(bias)) + weight * bias.detach()
    paths = [key.removesuffix(".edit.bias") for key in state]
    norms = [path for path in paths if isinstance(model.get_submodule(path), RMSNorm)]
    return {"kind": "bitfit", "target_modules": sorted(set(paths) - set(norms)), "norms": bool(norms)}, state


_SUMS: dict[type[Delta], Callable[[Llama, Sequence[Part]], tuple[dict[str, object], dict[str, Tensor]]]] = {
    LoRADelta: _lora,
    EmbeddingDelta: _lora,
    BiasDelta: _bitfit,
}
_LINEAR = "LoRA and BitFit can be combined; attach the others one after the other, or choose one a prompt with routes"
