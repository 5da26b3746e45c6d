"""Reading images: formats, limits, what is upright and opaque, and one line for whatever is wrong."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.vision.small import as_bytes, draw, write_image

from tunesmith.errors import DataError
from tunesmith.vision import images
from tunesmith.vision.images import decode, read_bytes, square

RED = (255, 0, 0)


def plain(size: tuple[int, int] = (4, 3), colour: object = RED, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats(kind: str) -> None:
    image = decode(as_bytes(plain(), kind), "row")
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 6


def test_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match="row 3: image in the data is broken, or none of PNG, JPEG"):
        decode(as_bytes(plain(), "TIFF"), "row 3")


def test_what_is_transparent_is_white() -> None:
    assert decode(as_bytes(plain(colour=(0, 0, 0, 0), mode="RGBA")), "row").getpixel((0, 0)) == (255, 255, 255)
    assert decode(as_bytes(plain(colour=(0, 0, 0, 255), mode="RGBA")), "row").getpixel((0, 0)) == (0, 0, 0)


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(as_bytes(plain(), "JPEG", exif=exif), "row").size == (3, 4)


def test_an_animation_is_its_first_frame() -> None:
    frames = [plain(), plain(colour=(0, 0, 255))]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "row").getpixel((0, 0)) == RED


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few bytes: only its header is honest."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8000, 20_000, 1_000_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:7: image .*(unpacks to|broken)") as caught:
        decode(bomb(side), "data.jsonl:7")
    assert "\n" not in str(caught.value)


def test_the_limit_is_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode(as_bytes(plain((10, 10))), "row").size == (10, 10)
    with pytest.raises(DataError, match="unpacks to 10 x 11 pixels"):
        decode(as_bytes(plain((10, 11))), "row")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_what_is_cut_short_is_said_or_read(kind: str, cut: float) -> None:
    data = as_bytes(draw("red", "disc", side=64), kind)
    try:
        decode(data[: int(len(data) * cut)], "row")
    except DataError as error:
        assert "row: image" in str(error)


def test_mutated_files_give_one_line() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        whole = as_bytes(draw("blue", "square"), kind)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = int(rng.integers(256))
            try:
                decode(bytes(data), "row")
            except DataError as error:
                assert "\n" not in str(error) and len(str(error)) < 300


def test_files_are_read_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_bytes(write_image(tmp_path / "a.png"), "row")[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="data.jsonl:2: image .*gone.png: no such file"):
        read_bytes(tmp_path / "gone.png", "data.jsonl:2")
    with pytest.raises(DataError, match="row: image .*: no such file"):
        read_bytes(tmp_path, "row")
    with pytest.raises(DataError, match="row: image .*: no such file|embedded null"):
        read_bytes(tmp_path / "a\0b", "row")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="empty.png is empty"):
        read_bytes(tmp_path / "empty.png", "row")
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    with pytest.raises(DataError, match="a.png is larger than"):
        read_bytes(tmp_path / "a.png", "row")


def test_square_is_pillows_resize_and_crop() -> None:
    image = draw("red", "square", side=40).crop((0, 0, 40, 30))
    whole = square(image, 16, None)
    assert torch.equal(whole, torch.from_numpy(np.asarray(image.resize((16, 16), 3)).copy()).permute(2, 0, 1))
    middle = square(image, 16, 20)
    expected = image.resize((26, 20), 3).crop((5, 2, 21, 18))
    assert torch.equal(middle, torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))
