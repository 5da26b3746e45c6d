"""The context of a batch: virtual tokens that adapters put before the examples, and which adapter acts where.

    layout as given      [ example 1 | example 2 ]
    with virtual tokens  [ P P P | example 1 | example 2 ]      one root segment for all examples: computed once a row

Virtual tokens have positions and cache slots of their own; examples begin behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.rope import rotary_tables
from tunesmith.model.seam import Choice, Context

if TYPE_CHECKING:
    from tunesmith.model.llama import Llama

VIRTUAL = -(1 << 30)  # what stands for a virtual token among token ids; infix tokens are -1, -2, ...
Names = tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """What adapters must find in a row: `infix` tokens (ids -1, -2, ...) right before every answer, and, for the last
    `ends` tokens of every prompt, how far before the answer they stand (`Layout.answer_ends`).
    """

    ends: int = 0
    infix: int = 0


def make_context(
    model: Llama,
    layout: Layout,
    cache: Cache | None,
    adapters: Names | None,
    routes: Sequence[Names] | None,
) -> Context:
    """See `Llama.context`."""
    given = _routes_of(layout, adapters, routes)
    acting = adapters if routes is None else tuple(sorted({name for names in routes for name in names}))
    _check_ends(model.needs(acting).ends, layout, cache)
    fresh = cache is None or not any(cache.lengths)
    sizes = {name: size for name, delta in model.model.embed.items() if (size := getattr(delta, "virtual_tokens", 0))}
    chosen = [[n for n in sizes if names is None or n in names] if fresh else [] for names in given]
    kinds = list(dict.fromkeys(given))  # one chain for every set of adapters: others might edit its rows differently
    chains = [chosen[given.index(names)] for names in kinds]
    extra = sum(sizes[name] for chain in chains for name in chain)
    full = layout
    if extra:
        which = [kinds.index(names) for names in given]
        full = layout.behind([[sizes[name] for name in chain] for chain in chains], which)
    before = [sum(sizes[name] for name in chain) for chain in chosen]
    positions = full.position_array if cache is None else cache.begin(full, before)
    cos, sin = rotary_tables(model.config, torch.from_numpy(positions).to(model.device), model.dtype)
    device = model.device
    owner = _owner(layout, kinds, given, chains, sizes)
    choice = _choices(model, kinds, owner, device)
    held = np.repeat(before if cache is None or fresh else cache.virtual, layout.lengths)
    own = np.concatenate([np.full(extra, -1), positions[extra:] - held]) if extra or held.any() else positions
    return Context(
        full,
        cos,
        sin,
        acting if acting is None else (*acting, *choice),
        cache,
        _rows(kinds, owner, device) if routes is not None else {},
        _virtual(chains, sizes, device),
        extra,
        positions=torch.from_numpy(own).to(device),
        choice=choice,
    )


def _check_ends(ends: int, layout: Layout, cache: Cache | None) -> None:
    """A method that edits prompts' last tokens must be told where prompts end, or it would silently do nothing."""
    step = cache is not None and any(cache.lengths) and all(length == 1 for length in layout.lengths)
    if ends and layout.answer_ends is None and not step:
        raise ModelError(
            "an attached adapter edits the last tokens of prompts, and this batch does not say where prompts end: "
            f"lay it out with answer_ends (the adapter asks for {ends})"
        )


def _routes_of(layout: Layout, adapters: Names | None, routes: Sequence[Names] | None) -> list[Names | None]:
    if routes is None:
        return [adapters] * len(layout.lengths)
    if len(routes) != len(layout.lengths):
        raise ModelError(f"routes: {len(routes)} for {len(layout.lengths)} segments; give one a segment")
    for segment, parent in enumerate(layout.parents):
        if parent >= 0 and tuple(routes[parent]) != tuple(routes[segment]):
            raise ModelError(
                f"routes: segment {segment} uses {routes[segment]}, the segment it continues {routes[parent]}: what is "
                "shared must be computed alike"
            )
    return [tuple(names) for names in routes]


def _virtual(chains: Sequence[Sequence[str]], sizes: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """The rows of each adapter's virtual tokens, (copies, size)."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for chain in chains:
        for name in chain:
            found.setdefault(name, []).append(torch.arange(start, start + sizes[name], device=device))
            start += sizes[name]
    return {name: torch.stack(rows) for name, rows in found.items()}


def _owner(
    layout: Layout,
    kinds: Sequence[Names | None],
    given: Sequence[Names | None],
    chains: Sequence[Sequence[str]],
    sizes: dict[str, int],
) -> np.ndarray:
    """Of every row, virtual ones included, the number of its set of adapters in `kinds`."""
    owners: list[np.ndarray] = [np.repeat(i, sum(sizes[n] for n in chain)) for i, chain in enumerate(chains)]
    owners.append(np.repeat([kinds.index(names) for names in given], layout.lengths))
    return np.concatenate(owners)


def _rows(kinds: Sequence[Names | None], owner: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """The rows that each adapter acts on."""
    found = {}
    for name in sorted({name for kind in kinds if kind for name in kind}):
        acting = [i for i, kind in enumerate(kinds) if name in (kind or ())]
        found[name] = torch.from_numpy(np.flatnonzero(np.isin(owner, acting))).to(device)
    return found


def _choices(model: Llama, kinds: Sequence[Names | None], owner: np.ndarray, device: torch.device) -> dict[str, Choice]:
    """Of every bank that is used, which member acts on which rows; members act only where they are named."""
    found = {}
    for bank, delta in model.model.embed.items():
        members: dict[str, int] = getattr(delta, "members", {})
        chosen = [[members[name] for name in kind or () if name in members] for kind in kinds]
        if crowded := [kind for kind, some in zip(kinds, chosen, strict=True) if len(some) > 1]:
            raise ModelError(
                f"routes: {crowded[0]} are members of one bank, {bank!r}: one of them can act on a segment"
            )
        if any(chosen):
            of_kind = np.array([some[0] if some else -1 for some in chosen])
            found[bank] = Choice.of(of_kind[owner], device)
    return found
