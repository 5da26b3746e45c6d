"""The `image` of a row in every schema, and folders of labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.vision.small import as_bytes, draw, write_image

from tunesmith.data.schemas import SCHEMAS
from tunesmith.data.sources import read_rows, read_splits, split_rows
from tunesmith.errors import DataError

ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
    "classification": {"text": "a", "label": "b"},
    "dolly": {"instruction": "a", "context": "", "response": "b"},
    "multiple-choice": {"question": "a", "choices": ["b", "c"], "answer": 0},
}


def read(tmp_path: Path, row: dict[str, Any]) -> Any:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return read_rows(tmp_path / "rows.jsonl")[0]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_may_have_one(name: str, tmp_path: Path) -> None:
    plain, seeing = read(tmp_path, ROWS[name]), read(tmp_path, {**ROWS[name], "image": "1.png"})
    assert plain.kind == seeing.kind == name
    assert plain.image is None and seeing.image == tmp_path / "1.png"
    assert plain.turns == seeing.turns, "what is asked and answered stays"


@pytest.mark.parametrize("nothing", [None, "", {"bytes": None, "path": None}])
def test_none_is_none(nothing: object, tmp_path: Path) -> None:
    assert read(tmp_path, {**ROWS["text"], "image": nothing}).image is None


def test_bytes_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = as_bytes(draw("red", "disc"))
    rows = [{**ROWS["prompt-completion"], "image": {"bytes": data, "path": "x.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet")[0].image == data


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (3, "field 'image' must be a path, a data URL or bytes, not int"),
        (["a.png"], "not list"),
        ("http://example.org/a.png", "is an address, and images are never fetched"),
        ("FTP://example.org/a.png", "is an address"),
        ("file:///etc/passwd", "is an address"),
        ("data:text/html;base64,AAAA", "is no data URL of an image"),
        ("data:image/png,AAAA", "is no data URL of an image"),
        ("data:image/png;base64,A*A", "is not base64"),
    ],
)
def test_what_is_no_image_is_named(image: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{said}"):
        read(tmp_path, {**ROWS["text"], "image": image})


def test_data_url(tmp_path: Path) -> None:
    assert read(tmp_path, {**ROWS["text"], "image": "data:image/png;base64,aGk="}).image == b"hi"


def folders(root: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 3) -> Path:
    for split in splits:
        for colour in ("red", "blue"):
            for number in range(count):
                write_image(root / split / colour / f"{number}.png", colour, seed=number)
    return root


@pytest.mark.parametrize("splits", [("train", "val"), (".",)])
def test_folders_of_labelled_images(splits: tuple[str, ...], tmp_path: Path) -> None:
    found = read_splits(folders(tmp_path, splits))
    assert [row.label for row in found.train] == ["blue", "red"] * 3, "in turns, so that the first rows have all"
    assert len(found.valid) == (6 if "val" in splits else 0) and not found.test
    first = found.train[0]
    assert first.kind == "classification" and str(first.image) == first.source
    assert [turn.text for turn in first.turns] == ["Classify the image as blue or red.", "blue"]
    assert [row.label for row in read_splits(tmp_path, limit=2).train] == ["blue", "red"]
    asked = read_splits(tmp_path, instruction="Which colour?").train[0]
    assert asked.turns[0].text == "Which colour?"


def test_rows_of_equal_text_and_other_images_can_be_held_out(tmp_path: Path) -> None:
    train, valid = split_rows(read_splits(folders(tmp_path)).train, 2)
    assert (len(train), len(valid)) == (4, 2)


def test_a_folder_without_images_is_none(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no train file"):
        read_splits(tmp_path)


def test_rows_with_pictures_beside_them_are_no_image_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures/1.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({**ROWS["alpaca"], "image": "pictures/1.png"}) + "\n")
    (row,) = read_splits(tmp_path).train
    assert (row.kind, row.image) == ("alpaca", tmp_path / "pictures/1.png")


def test_folders_that_disagree_are_refused(tmp_path: Path) -> None:
    folders(tmp_path)
    write_image(tmp_path / "val/green/0.png")
    with pytest.raises(DataError, match="valid has a class 'green' that train has not"):
        read_splits(tmp_path)
    folders(tmp_path, ("valid",))
    with pytest.raises(DataError, match="holds both val(id)? and val(id)?, the same split"):
        read_splits(tmp_path)
