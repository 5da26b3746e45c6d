"""What an adapter changed: D of every weight W, its spectrum layer by layer, and two adapters' directions compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters import Adapter, Delta
from tunesmith.adapters.base import weight_path
from tunesmith.adapters.lora import EmbeddingDelta, LoRADelta
from tunesmith.adapters.targets import layer_of
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.evaluate.spectrum import (
    Change,
    Dense,
    Product,
    amplification,
    effective_rank,
    numerical_rank,
    rank90,
    shift,
    similarity,
)
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama

Original = Callable[[str], Tensor]  # a base weight's name -> the weight as it was before training
SHOWN = 8  # singular values that a report holds
MOST_DIRECTIONS = 64  # that two adapters are compared in


@dataclass(frozen=True)
class Changed:
    """A weight's `name`, the `weight` W before, and its change D."""

    name: str
    weight: Tensor
    change: Change


def changes(model: Llama, adapter: Adapter, original: Original) -> Iterator[Changed]:
    """Every weight matrix that the adapter changes, those of the base that it trained among them.

    Raises AdapterError where it changes none, as methods do that act on keys, values or the residual stream.
    """
    found = 0
    for path, places in _by_weight(adapter).items():
        host = model.get_submodule(path)
        weight = _weight(host)
        change = None if weight is None else _change(weight, [adapter.deltas[place] for place in places])
        if weight is not None and change is not None:
            found += 1
            yield Changed(f"{path}.weight", weight.cpu(), change)
    for name, parameter in adapter.base.items():
        if parameter.ndim == 2:
            before = original(name)
            found += 1
            yield Changed(name, before, Dense(parameter.detach().cpu().double() - before.double()))
    if not found:
        raise AdapterError(f"spectrum: {adapter.kind} changes no weight matrix, so there is no spectrum of a change")


def spectra(model: Llama, adapter: Adapter, original: Original, *, against_weights: bool = False) -> dict[str, Any]:
    """Report the change of every weight, and means over each layer and each kind of module.

    `against_weights` adds what W has in the change's directions, and how far W's own spectrum moved: an SVD of each W.
    """
    rows = [_row(one, against_weights) for one in changes(model, adapter, original)]
    return {
        "method": adapter.kind,
        "weights": rows,
        "layers": _means(rows, "layer"),
        "modules": _means(rows, "module"),
    }


@dataclass(frozen=True)
class Directions:
    """A change's leading right singular directions, (in, k): of D, and of LoRA's A where the change is a product."""

    of_change: Tensor
    of_A: Tensor | None


def directions(model: Llama, adapter: Adapter, original: Original) -> dict[str, Directions]:
    """The directions of every change, for `compared`."""
    found = {}
    for one in changes(model, adapter, original):
        of_A = one.change.basis()[:, :MOST_DIRECTIONS] if isinstance(one.change, Product) else None
        _, S, V = one.change.svd()
        kept = min(numerical_rank(S), MOST_DIRECTIONS)
        found[one.name] = Directions(V[:, :kept], of_A)
    return found


def compared(first: Mapping[str, Directions], second: Mapping[str, Directions]) -> dict[str, Any]:
    """phi(i, j) of the two in every weight that both change, at powers of 2, and its mean. Raises AdapterError.

    Of A where both are LoRA, as in the LoRA paper, else of D. `at_random`: max(i, j) / in.
    """
    shared = [name for name in first if name in second]
    if not shared:
        raise AdapterError(
            f"--against: no weight is changed by both (here {next(iter(first))} and others, there "
            f"{next(iter(second))}); compare adapters with target modules in common"
        )
    of_A = all(directions[name].of_A is not None for directions in (first, second) for name in shared)
    weights = {}
    for name in shared:
        ours, theirs = (d.of_A if of_A and d.of_A is not None else d.of_change for d in (first[name], second[name]))
        if len(ours) != len(theirs):
            raise AdapterError(f"--against: {name} has {len(ours)} inputs here and {len(theirs)} there: other bases")
        weights[name] = _phi(similarity(ours, theirs), len(ours))
    keys = set.intersection(*(set(entry["phi"]) for entry in weights.values()))
    mean = {
        part: {key: sum(w[part][key] for w in weights.values()) / len(weights) for key in _ordered(keys)}
        for part in ("phi", "at_random")
    }
    return {"directions_of": "A" if of_A else "D", "mean": mean, "weights": weights}


def _phi(table: Tensor, width: int) -> dict[str, dict[str, float]]:
    pairs = {(i, j) for i in _powers(table.shape[0]) for j in _powers(table.shape[1])}
    return {
        "phi": {f"{i},{j}": float(table[i - 1, j - 1]) for i, j in sorted(pairs)},
        "at_random": {f"{i},{j}": max(i, j) / width for i, j in sorted(pairs)},
    }


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most`."""
    return sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | ({most} if most else set()))


def _ordered(keys: set[str]) -> list[str]:
    return sorted(keys, key=lambda key: tuple(map(int, key.split(","))))


def _row(one: Changed, against_weights: bool) -> dict[str, Any]:
    values = one.change.values()
    size, of_weight = float(values.norm()), float(one.weight.double().norm())
    row: dict[str, Any] = {
        "name": one.name,
        "layer": layer_of(one.name),
        "module": one.name.removesuffix(".weight").rpartition(".")[2],
        "shape": list(one.change.shape),
        "norm": size,
        "relative": size / of_weight if of_weight else math.inf,
        "rank": (rank := numerical_rank(values)),
        "rank90": rank90(values),
        "effective_rank": effective_rank(values),
        "singular_values": values[:SHOWN].tolist(),
    }
    if against_weights and rank:
        # as many directions as a low-rank change has; of a full one, those that hold most of it
        r = rank if isinstance(one.change, Product) else row["rank90"]
        wide = one.weight.double()
        own = torch.linalg.svdvals(wide)
        row["amplification"] = asdict(amplification(one.change, wide, r, own))
        row["shift"] = shift(own, torch.linalg.svdvals(wide + _dense(one.change)))
    return row


_AVERAGED = ("relative", "rank", "rank90", "effective_rank", "shift")


def _means(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Means over the rows that have the same `key`, in order of appearance."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    means = []
    for value, members in groups.items():
        entry = {key: value, "weights": len(members)}
        for name in _AVERAGED:
            found = [row[name] for row in members if name in row]
            entry |= {name: sum(found) / len(found)} if found else {}
        factors = [row["amplification"]["factor"] for row in members if "amplification" in row]
        means.append(entry | ({"amplification": sum(factors) / len(factors)} if factors else {}))
    return means


def _dense(change: Change) -> Tensor:
    U, S, V = change.svd()
    return U * S @ V.T


def _by_weight(adapter: Adapter) -> dict[str, list[str]]:
    """Places by the path of the weight that they edit the product of: at its output and, by another part, its input."""
    on: dict[str, list[str]] = {}
    for place in adapter.deltas:
        on.setdefault(weight_path(place), []).append(place)
    return on


def _weight(host: nn.Module) -> Tensor | None:
    """W; None for a module that has no matrix."""
    quantized = isinstance(host, Linear) and host.quant is not None
    held = host.dense_weight(torch.float32) if isinstance(host, Linear) and quantized else getattr(host, "weight", None)
    return held.detach() if isinstance(held, Tensor) and held.ndim == 2 else None


def _change(weight: Tensor, deltas: Sequence[Delta]) -> Change | None:
    """D by its factors where it is a LoRA's, else W + D - W in float64; None where the weight stays as it is."""
    first = deltas[0] if len(deltas) == 1 else None
    if type(first) is LoRADelta:  # not a DoRA's, which is one
        A, B = (factor.detach().cpu().double() for factor in first.factors())
        return Product(first.scale * B, A)
    if isinstance(first, EmbeddingDelta):  # s (B A)^T, of W (vocabulary, hidden)
        A, B = (factor.detach().cpu().double() for factor in (first.A, first.B))
        return Product(first.scale * A.T, B.T)
    wide = weight.double()
    whole = wide
    try:
        for delta in deltas:
            whole = delta.fold(whole, None)[0]
    except CannotMerge:
        return None
    change = (whole.detach() - wide).cpu()
    return Dense(change) if bool(change.any()) else None
