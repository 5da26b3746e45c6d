"""The context of a batch: virtual tokens that adapters put before the examples, and which adapter acts where.

    layout as given      [ example 1 | example 2 ]
    with virtual tokens  [ P P P | example 1 | example 2 ]      one root segment for all examples: computed once a row
    with images          [ P P a a | P P b b | example 1 (sees a) | example 2 (sees b) ]        one for each image

Virtual tokens have positions and cache slots of their own; examples begin behind them. So have an image's visual
tokens.
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
from tunesmith.model.sight import Groups, Look, Picture, Sight, distinct, looked_up

if TYPE_CHECKING:
    from tunesmith.model.llama import Llama

VIRTUAL = -(1 << 30)  # what stands for a virtual token among token ids; infix tokens are -1, -2, ...
Names = tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """What adapters must find in a row: `infix` tokens (ids -1, -2, ...) right before every answer, and, for the last
    `ends` tokens of every prompt, how far before the answer they stand (`Layout.answer_ends`).

    `looks`: the features of its image. What looks at an image makes every token of its example depend on it, so
    examples with different images then have no token in common; without `looks`, images are not seen.
    """

    ends: int = 0
    infix: int = 0
    looks: tuple[Look, ...] = ()

    @property
    def by_answer(self) -> bool:
        """Must every answer of a conversation be learned, and a prompt be fed, as the last one?"""
        return bool(self.ends or self.infix)


@dataclass(frozen=True)
class _Kind:
    """Segments that are computed alike: by the same adapters (None: all), with the same image (-1: none)."""

    names: Names | None
    image: int


@dataclass(frozen=True)
class _Own:
    """The tokens that an adapter puts before examples: `virtual` ones, and `visual` ones behind them."""

    name: str
    virtual: int
    visual: int

    @property
    def size(self) -> int:
        """Of both."""
        return self.virtual + self.visual


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
    needs = model.needs(acting)
    _check_ends(needs.ends, layout, cache)
    fresh = cache is None or not any(cache.lengths)
    pictures, images = _images(layout, needs)
    segments = [_Kind(names, image) for names, image in zip(given, images, strict=True)]
    kinds = list(dict.fromkeys(segments))  # one chain for every kind: others would compute its rows differently
    which = [kinds.index(kind) for kind in segments]
    chains = [_chain(model, kind) if fresh else [] for kind in kinds]
    lengths = [[own.size for own in chain] for chain in chains]
    extra = sum(map(sum, lengths))
    full = layout.behind(lengths, which) if extra else layout
    before = [sum(lengths[kind]) for kind in which]
    positions = full.position_array if cache is None else cache.begin(full, before)
    cos, sin = rotary_tables(model.config, torch.from_numpy(positions).to(model.device), model.dtype)
    device = model.device
    owner = np.concatenate(
        [np.repeat(np.arange(len(kinds)), list(map(sum, lengths))), np.repeat(which, layout.lengths)]
    )
    owner = owner.astype(np.int64)
    acting_on = [kind.names for kind in kinds]
    choice = _choices(model, acting_on, owner, device)
    rows = _rows(acting_on, owner, device) if routes is not None else {}
    virtual = _before(chains, device)
    sight = None
    if pictures:
        seen = np.array([kind.image for kind in kinds])[owner]
        routed = {name: Groups.of(seen[at.cpu().numpy()], len(pictures), device) for name, at in rows.items()}
        values = looked_up(pictures, needs.looks, device)
        sight = Sight(values, Groups.of(seen, len(pictures), device), routed, *_shown(chains, kinds, device))
    held = np.repeat(before if cache is None or fresh else cache.virtual, layout.lengths)
    own = np.concatenate([np.full(extra, -1), positions[extra:] - held]) if extra or held.any() else positions
    return Context(
        full,
        cos,
        sin,
        acting if acting is None else (*acting, *choice),
        cache,
        rows,
        virtual,
        extra,
        positions=torch.from_numpy(own).to(device),
        choice=choice,
        sight=sight,
    )


def _images(layout: Layout, needs: Needs) -> tuple[list[Picture], list[int]]:
    """The images of a batch, and the number of every segment's (-1: none). Raises ModelError where one is shared."""
    if not needs.looks or not layout.pictures:
        return [], [-1] * len(layout.lengths)
    pictures, images = distinct(layout.pictures)
    for segment, parent in enumerate(layout.parents):
        if parent >= 0 and images[parent] != images[segment]:
            raise ModelError(
                f"pictures: segment {segment} and the segment it continues see different images: what is shared must "
                "be computed alike"
            )
    return pictures, images


def _chain(model: Llama, kind: _Kind) -> list[_Own]:
    """The tokens that adapters put before examples of this kind, in the order of attachment."""
    found = []
    for name, delta in model.model.embed.items():
        if kind.names is None or name in kind.names:
            visual = getattr(delta, "visual_tokens", 0) if kind.image >= 0 else 0
            found.append(_Own(name, getattr(delta, "virtual_tokens", 0), visual))
    return [own for own in found if own.size]


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


def _before(chains: Sequence[Sequence[_Own]], device: torch.device) -> dict[str, Tensor]:
    """The rows of each adapter's virtual tokens, (copies, size)."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for chain in chains:
        for own in chain:
            if own.virtual:
                found.setdefault(own.name, []).append(torch.arange(start, start + own.virtual, device=device))
            start += own.size
    return {name: torch.stack(rows) for name, rows in found.items()}


def _shown(
    chains: Sequence[Sequence[_Own]], kinds: Sequence[_Kind], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of each adapter's visual tokens, (copies, size), and the image of each copy, (copies,)."""
    found: dict[str, list[Tensor]] = {}
    images: dict[str, list[int]] = {}
    start = 0
    for chain, kind in zip(chains, kinds, strict=True):
        for own in chain:
            if own.visual:
                first = start + own.virtual
                found.setdefault(own.name, []).append(torch.arange(first, first + own.visual, device=device))
                images.setdefault(own.name, []).append(kind.image)
            start += own.size
    rows = {name: torch.stack(rows) for name, rows in found.items()}
    return rows, {name: torch.tensor(numbers, device=device) for name, numbers in images.items()}


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
