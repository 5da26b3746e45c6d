"""Rows with opened images: what is missing or broken is named by row, and features come from the cache.

rows -> `open_rows` -> rows whose image is a Picture -> ... -> `look_all`, once the adapter says what it looks at
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.data.encode import picture_of
from tunesmith.data.image_field import image_at
from tunesmith.data.schemas import Row
from tunesmith.errors import DataError, GenerationError
from tunesmith.model.sight import Look, Picture
from tunesmith.vision.cache import FeatureCache
from tunesmith.vision.encoders import Encoder, features, open_encoder
from tunesmith.vision.images import decode, read_bytes

BATCH = 16  # images encoded at once: 80 MB of feature maps
SHARD = 256  # images in a file of the cache
HELD = 256 << 20  # bytes of features held in memory


@dataclass
class Gallery:
    """Encoders and their caches, opened when they are first needed; `root` is where features are kept."""

    root: Path | None = None
    _encoders: dict[str, Encoder] = field(default_factory=dict, repr=False)
    _caches: dict[Look, FeatureCache] = field(default_factory=dict, repr=False)
    _held: OrderedDict[tuple[Look, str], Tensor] = field(default_factory=OrderedDict, repr=False)

    def encoder(self, name: str) -> Encoder:
        """The encoder called `name`."""
        if name not in self._encoders:
            self._encoders[name] = open_encoder(name)
        return self._encoders[name]

    def cache(self, look: Look) -> FeatureCache:
        """Where the features of a look are kept."""
        if look not in self._caches:
            self._caches[look] = FeatureCache(look, self.encoder(look.encoder).identity(), self.root)
        return self._caches[look]

    def look(self, picture: Seen, look: Look) -> Tensor:
        """The features of one image, computed if they are not there yet."""
        at = look, picture.key
        if at in self._held:
            self._held.move_to_end(at)
            return self._held[at]
        found = self.cache(look).get(picture.key)
        if found is None:
            self.compute([picture], [look])
            found = self.cache(look).get(picture.key)
        if found is None:
            raise DataError(f"{picture.where}: the features that were just kept in {self.cache(look).folder} are gone")
        self._held[at] = found
        while len(self._held) * found.nbytes > HELD:
            self._held.popitem(last=False)
        return found

    def compute(
        self, pictures: Sequence[Seen], looks: Sequence[Look], done: Callable[[int], None] | None = None
    ) -> None:
        """Compute and keep what these looks make of these images. Raises DataError for one that is broken."""
        for name in dict.fromkeys(look.encoder for look in looks):
            own, encoder = [look for look in looks if look.encoder == name], self.encoder(name)
            caches = {look: self.cache(look) for look in own}
            encoder.move(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            try:
                for first in range(0, len(pictures), SHARD):
                    shard = pictures[first : first + SHARD]
                    for look, found in _computed(encoder, shard, own, done).items():
                        caches[look].put(found)
            finally:
                encoder.move(torch.device("cpu"))  # the model's memory is not its own


def _computed(
    encoder: Encoder, pictures: Sequence[Seen], looks: Sequence[Look], done: Callable[[int], None] | None
) -> dict[Look, dict[str, Tensor]]:
    """What each look makes of these images, by their keys."""
    found: dict[Look, dict[str, Tensor]] = {look: {} for look in looks}
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        pixels = torch.stack([encoder.pixels(decode(p.read(), p.where, p.image)) for p in batch])
        for look, values in features(encoder, pixels, looks).items():
            found[look] |= zip([p.key for p in batch], values, strict=True)
        if done is not None:
            done(len(batch))
    return found


@dataclass(frozen=True, eq=False)
class Seen:
    """An opened image: a Picture. `where` names its row in errors."""

    image: Path | bytes
    key: str
    where: str
    gallery: Gallery = field(repr=False)

    def read(self) -> bytes:
        """Its bytes. Raises DataError where the file is gone or has changed since."""
        data = read_bytes(self.image, self.where)
        if hashlib.sha256(data).hexdigest() != self.key:
            raise DataError(f"{self.where}: image {self.image!s:.200} has changed since it was opened; start again")
        return data

    def look(self, look: Look) -> Tensor:
        """See `Picture`."""
        return self.gallery.look(self, look)


GALLERY = Gallery()  # of this process: encoders are opened once


def open_image(image: Path | bytes | str, where: str, gallery: Gallery = GALLERY) -> Seen:
    """An image from a path, bytes or a data URL. Raises DataError for one that is missing, empty or too large."""
    if isinstance(image, str):
        image = image_at(image, where)
    if isinstance(image, Path):
        image = image.expanduser()
    return Seen(image, hashlib.sha256(read_bytes(image, where)).hexdigest(), where, gallery)


def open_rows(rows: Iterable[Row], gallery: Gallery = GALLERY) -> list[Row]:
    """The rows with their images opened. Raises DataError naming the row of one that is missing."""
    return [
        replace(row, image=open_image(row.image, row.source, gallery)) if isinstance(row.image, (Path, bytes)) else row
        for row in rows
    ]


def look_all(pictures: Iterable[Picture | None], looks: Sequence[Look], show: bool = True) -> tuple[int, int]:
    """Compute what is not in the cache of these images for these looks; (images, how many were computed).

    `show`: a progress bar on stderr. Raises DataError naming the row of an image that is broken.
    """
    found = {picture.key: picture for picture in pictures if isinstance(picture, Seen)}
    if not found or not looks:
        return len(found), 0
    gallery = next(iter(found.values())).gallery
    missing = {look: set(gallery.cache(look).missing(list(found))) for look in looks}
    computed = set().union(*missing.values())
    groups: dict[tuple[Look, ...], list[Seen]] = {}
    for key in (key for key in found if key in computed):
        groups.setdefault(tuple(look for look in looks if key in missing[look]), []).append(found[key])
    with _bar(len(computed)) if show and computed else nullcontext() as done:
        for wanted, some in groups.items():
            gallery.compute(some, wanted, done)
    return len(found), len(computed)


def rows_seen(rows: Sequence[Row], looks: Sequence[Look]) -> list[Row]:
    """The rows as something sees them that looks at this of images: opened, features at hand. Raises DataError."""
    if not looks:
        return list(rows)
    opened = open_rows(rows)
    look_all([picture_of(row) for row in opened], looks)
    return opened


def with_images(
    rows: Sequence[Row], images: Sequence[Path | bytes | str | None], looks: Sequence[Look], gallery: Gallery = GALLERY
) -> list[Row]:
    """Rows about these images, one or None for each (none at all: ()), for something that looks at this of them.

    Raises GenerationError where nothing looks, DataError for an image that is missing or broken.
    """
    if all(image is None for image in images):
        return list(rows)
    if not looks:
        raise GenerationError("an image was given, and nothing here looks at images; use an adapter that does")
    pictures = [
        None if image is None else open_image(image, row.source, gallery)
        for row, image in zip(rows, images, strict=True)
    ]
    look_all(pictures, looks, show=False)
    return [replace(row, image=picture) for row, picture in zip(rows, pictures, strict=True)]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of images; gives what to call with how many are done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
