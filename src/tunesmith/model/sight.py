"""What a batch sees: images that belong to its segments, and what a frozen encoder made of them.

A row's image travels as a `Picture` from the data to the context, where the features that attached deltas ask for are
looked up once a pass:

    Layout.pictures   one or None a segment          Context.sight   values[look]: (images, *look.shape)
                                                                     groups: which rows of the pass see which image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

POOLED, TOKENS = "pooled", "tokens"


@dataclass(frozen=True)
class Look:
    """Features that a delta asks for: what the encoder called `encoder` makes of an image at these layers.

    `what`: POOLED, one vector a layer, end to end, (sum of widths,); or TOKENS, a sequence at one layer, (count,
    width). `shape` is the shape that they must have.
    """

    encoder: str
    what: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]


class Picture(Protocol):
    """An image, and its features."""

    @property
    def key(self) -> str:
        """Equal for images of equal content."""

    def look(self, look: Look) -> Tensor:
        """Its features, `look.shape`, float32, on the CPU. Raises DataError for an image that cannot be read."""


@dataclass(frozen=True)
class StandIn:
    """An image that is only counted: a Picture without content, for the meta device."""

    key: str

    def look(self, look: Look) -> Tensor:
        """See `Picture`."""
        return torch.empty(look.shape, device="meta")


@dataclass(frozen=True)
class Groups:
    """Rows of a pass by the image that they see, each group filled up to the longest.

    `image`, (groups,): the number of its image; as many as there are images where it sees none. `rows`, (groups,
    longest): row numbers, filled up with 0. `place`, (rows,): where each row stands in the flattened `rows`.
    """

    image: Tensor
    rows: Tensor
    place: Tensor

    @classmethod
    def of(cls, owner: np.ndarray, images: int, device: torch.device) -> Groups:
        """From the image of every row, (rows,); -1: none."""
        found, group = np.unique(owner, return_inverse=True)
        order = np.argsort(group, kind="stable")
        counts = np.bincount(group, minlength=len(found))
        longest = int(counts.max(initial=0))
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows, place = np.zeros((len(found), longest), np.int64), np.zeros(len(owner), np.int64)
        rows[group[order], within] = order
        place[order] = group[order] * longest + within
        image = np.where(found < 0, images, found)
        return cls(*(torch.from_numpy(a).to(device) for a in (image, rows, place)))


@dataclass(frozen=True)
class Sight:
    """What a pass sees.

    `values[look]`: (images, *look.shape). `whole`: all rows of the pass by image; `routed[NAME]`: the rows that an
    adapter acts on, numbered as it gets them. `visual[NAME]`: the rows that an adapter put before examples with an
    image, (copies, its visual tokens), and `shown[NAME]`, (copies,), the image of each copy.
    """

    values: dict[Look, Tensor]
    whole: Groups
    routed: dict[str, Groups] = field(default_factory=dict)
    visual: dict[str, Tensor] = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)

    def groups(self, adapter: str) -> Groups:
        """The rows that `adapter` is given, by image."""
        return self.routed.get(adapter, self.whole)


def distinct(pictures: Sequence[Picture | None]) -> tuple[list[Picture], list[int]]:
    """Each image once, in order of appearance, and the number of every entry's (-1: none)."""
    number: dict[str, int] = {}
    found: list[Picture] = []
    owner = []
    for picture in pictures:
        if picture is not None and picture.key not in number:
            number[picture.key] = len(found)
            found.append(picture)
        owner.append(-1 if picture is None else number[picture.key])
    return found, owner


def looked_up(pictures: Sequence[Picture], looks: Sequence[Look], device: torch.device) -> dict[Look, Tensor]:
    """The features of these images, (images, *look.shape) for each look; on the meta device, their shapes alone."""
    if device.type == "meta":
        return {look: torch.empty(len(pictures), *look.shape, device=device) for look in looks}
    none = {look: torch.zeros(0, *look.shape) for look in looks}
    found = {look: torch.stack([p.look(look) for p in pictures]) if pictures else none[look] for look in looks}
    return {look: values.to(device) for look, values in found.items()}
