"""From rows to features: computed once, kept by content, made anew when image, preprocessing or weights change."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vision.small import COLOURS, SIDE, WIDTH, as_bytes, draw, write_encoder, write_image

from tunesmith.data.schemas import Row, Turn
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError, DiskError, GenerationError
from tunesmith.model.sight import POOLED, TOKENS, Look
from tunesmith.vision import open as opening
from tunesmith.vision.open import Gallery, look_all, open_image, open_rows, with_images


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoders") / "clip"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of an encoder was given."""
    calls: list[int] = []
    features = opening.features

    def counting(encoder, pixels, looks):
        calls.append(len(pixels))
        return features(encoder, pixels, looks)

    monkeypatch.setattr(opening, "features", counting)
    return calls


def pooled(encoder: str) -> Look:
    return Look(encoder, POOLED, (2, 3), (2 * WIDTH,))


def row(image: Path | bytes, source: str = "data.jsonl:1") -> Row:
    return Row(source, "messages", (Turn("user", "what?"), Turn("assistant", "a disc", True)), image=image)


def images(folder: Path, count: int = 5) -> list[Row]:
    colours = list(COLOURS)
    return [row(write_image(folder / f"{i}.png", colours[i % 3], seed=i), f"data.jsonl:{i + 1}") for i in range(count)]


def test_each_image_is_computed_once(encoder: str, tmp_path: Path, counted: list[int]) -> None:
    look = pooled(encoder)
    rows = images(tmp_path)
    rows.append(row((tmp_path / "0.png").read_bytes(), "data.jsonl:6"))  # the first image again, as bytes
    for number, expected in ((1, [5]), (2, [])):  # the second time in a process of its own
        counted.clear()
        opened = open_rows(rows, Gallery(tmp_path / "kept"))
        pictures = [r.image for r in opened]
        assert look_all(pictures, [look], show=False) == (5, sum(expected)), number
        assert counted == expected
        values = torch.stack([p.look(look) for p in pictures])
        assert counted == expected and torch.equal(values[0], values[5]) and values.unique(dim=0).shape[0] == 5
    assert values.dtype == torch.float32 and not values.is_inference()


def test_features_are_those_of_the_encoder(encoder: str, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    seen = open_image(as_bytes(draw("red", "disc")), "row", gallery)
    own = gallery.encoder(encoder)
    with torch.no_grad():
        layers = own.layers(own.pixels(draw("red", "disc"))[None], [1, 2, 3])
    assert torch.allclose(seen.look(pooled(encoder))[:WIDTH], layers[2][0][0], atol=1e-6)
    tokens = Look(encoder, TOKENS, (1,), (16, WIDTH))
    assert torch.allclose(seen.look(tokens), layers[1][1][0], atol=1e-6)


def test_the_second_epoch_is_read_from_the_cache(encoder: str, tmp_path: Path) -> None:
    """Not only counted: it takes a fraction of the time."""
    look, rows = pooled(encoder), images(tmp_path, 40)
    took = []
    for _ in range(2):
        opened = open_rows(rows, gallery := Gallery(tmp_path / "kept"))
        gallery.encoder(encoder)
        began = time.perf_counter()
        look_all([r.image for r in opened], [look], show=False)
        took.append(time.perf_counter() - began)
    assert took[1] < took[0] / 3, took


def change_image(folder: Path, encoder: Path) -> None:
    write_image(folder / "0.png", "green", "square", seed=77)


def change_preprocessing(folder: Path, encoder: Path) -> None:
    write_encoder(encoder, image_mean=[0.3, 0.3, 0.3])


def change_weights(folder: Path, encoder: Path) -> None:
    tensors = load_file(encoder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, encoder / "model.safetensors", {"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "image": (change_image, 1),
    "preprocessing": (change_preprocessing, 3),
    "weights": (change_weights, 3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_is_computed_anew(what: str, tmp_path: Path, counted: list[int]) -> None:
    change, expected = CHANGES[what]
    folder = write_encoder(tmp_path / "clip")
    look, rows = pooled(str(folder)), images(tmp_path / "images", 3)
    before = [r.image.look(look) for r in open_rows(rows, Gallery(tmp_path / "kept"))]
    change(tmp_path / "images", folder)
    counted.clear()
    pictures = [r.image for r in open_rows(rows, Gallery(tmp_path / "kept"))]
    assert look_all(pictures, [look], show=False) == (3, expected) and sum(counted) == expected
    moved = [not torch.equal(a, p.look(look)) for a, p in zip(before, pictures, strict=True)]
    assert sum(moved) == expected


def test_a_damaged_file_of_the_cache_is_made_again(encoder: str, tmp_path: Path, counted: list[int]) -> None:
    look, rows = pooled(encoder), images(tmp_path, 3)
    first = [r.image.look(look) for r in open_rows(rows, Gallery(tmp_path / "kept"))]
    for number, file in enumerate(sorted((tmp_path / "kept").rglob("*.safetensors"))):
        file.write_bytes(b"" if number else file.read_bytes()[:-5])
    counted.clear()
    again = [r.image.look(look) for r in open_rows(rows, Gallery(tmp_path / "kept"))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and sum(counted) == 3


def test_an_image_that_is_missing_or_broken_is_named_by_its_row(encoder: str, tmp_path: Path) -> None:
    rows = images(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no image")
    opened = open_rows(rows, Gallery(tmp_path / "kept"))
    with pytest.raises(DataError, match=r"data.jsonl:2: image .*1.png is broken, or none of"):
        look_all([r.image for r in opened], [pooled(encoder)], show=False)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"data.jsonl:3: image .*2.png: no such file"):
        open_rows(rows, Gallery(tmp_path / "kept"))


def test_an_image_that_changes_while_it_is_used_is_refused(encoder: str, tmp_path: Path) -> None:
    (seen,) = open_rows(images(tmp_path, 1), Gallery(tmp_path / "kept"))
    write_image(tmp_path / "0.png", "blue", seed=9)
    with pytest.raises(DataError, match="data.jsonl:1: image .* has changed since it was opened"):
        seen.image.look(pooled(encoder))


def test_a_disk_that_cannot_be_written_to_is_said(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the cache should be")
    (seen,) = open_rows(images(tmp_path, 1), Gallery(tmp_path / "kept"))
    with pytest.raises(DiskError, match="could not be written"):
        seen.image.look(pooled(encoder))


def test_images_from_paths_and_data_urls(encoder: str, tmp_path: Path) -> None:
    data = as_bytes(draw("red", "disc"))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    file = tmp_path / "a.png"
    file.write_bytes(data)
    assert len({open_image(image, "row").key for image in (data, url, file, str(file))}) == 1
    with pytest.raises(DataError, match="row: image 'https://example.org/a.png' is an address, and images are never"):
        open_image("https://example.org/a.png", "row")


def test_rows_of_a_file_find_their_images_beside_it(tmp_path: Path) -> None:
    write_image(tmp_path / "data/pictures/1.png")
    (tmp_path / "data/rows.jsonl").write_text('{"prompt": "a", "completion": "b", "image": "pictures/1.png"}\n')
    (found,) = open_rows(read_rows(tmp_path / "data/rows.jsonl"))
    assert found.image.key == open_image(tmp_path / "data/pictures/1.png", "row").key


def test_images_for_what_does_not_look_are_refused() -> None:
    asked = [row(None)]  # type: ignore[arg-type]
    assert with_images(asked, [None], []) == asked and with_images(asked, (), []) == asked
    with pytest.raises(GenerationError, match="nothing here looks at images"):
        with_images(asked, [as_bytes(draw("red", "disc"))], [])


def test_memory_holds_a_bounded_part(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = pooled(encoder)
    monkeypatch.setattr(opening, "HELD", 3 * 4 * 2 * WIDTH)
    gallery = Gallery(tmp_path / "kept")
    for seen in open_rows(images(tmp_path, 6), gallery):
        seen.image.look(look)
    assert len(gallery._held) == 3 and SIDE
