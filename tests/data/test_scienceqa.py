"""ScienceQA in the published layout, on rows made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.data.scienceqa import STRATA, is_scienceqa, read_scienceqa, splits_of, strata
from tunesmith.errors import DataError

FIRST = {
    "question": "Which is farthest north?",
    "choices": ["Texas", "Maine"],
    "answer": 1,
    "hint": "",
    "image": "image.png",
    "grade": "grade2",
    "subject": "social science",
    "split": "train",
    "lecture": "Look at the map.",
}
SECOND = {**FIRST, "hint": "Ice melts.", "image": None, "grade": "grade7", "subject": "natural science", "answer": 0}
THIRD = {**FIRST, "image": None, "grade": "grade12", "subject": "language science"}
FOURTH = {**FIRST, "hint": "See the figure.", "grade": "grade6", "split": "test"}


def write(folder: Path, images: str | None = None) -> Path:
    problems = {"1": FIRST, "2": SECOND, "3": THIRD, "4": FOURTH}
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["2", "1", "3"], "test": ["4"]}), encoding="utf-8")
    captions = {"url": "x", "captions": {"1": "A map.", "4": "A figure."}}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    if images is not None:
        for split, pid in (("train", "1"), ("test", "4")):
            place = folder / images / split / pid
            place.mkdir(parents=True)
            (place / "image.png").write_bytes(b"")
    return folder


def test_rows_ask_as_published(tmp_path: Path) -> None:
    rows = read_scienceqa(write(tmp_path), "train", captions=True)
    assert [row.source.rpartition(":")[2] for row in rows] == ["2", "1", "3"], "in the order of the split"
    asked = "Which is farthest north?\nContext: A map.\n(A) Texas\n(B) Maine"
    assert (rows[1].turns[0].text, rows[1].turns[1].text) == (asked, "The answer is (B)")
    assert rows[0].turns[0].text == "Which is farthest north?\nContext: Ice melts.\n(A) Texas\n(B) Maine"
    assert (rows[0].label, rows[0].choices) == ("A", ("Texas", "Maine"))
    assert "Context" not in rows[2].turns[0].text, "neither a hint nor a caption"


def test_captions_stand_behind_the_hint_if_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (plain,) = read_scienceqa(folder, "test")
    (both,) = read_scienceqa(folder, "test", captions=True)
    assert plain.turns[0].text.splitlines()[1] == "Context: See the figure."
    assert both.turns[0].text.splitlines()[1] == "Context: See the figure. A figure."


def test_strata_are_those_of_the_published_tables(tmp_path: Path) -> None:
    folder = write(tmp_path)
    found = [strata(row) for split in ("train", "test") for row in read_scienceqa(folder, split)]
    assert found == [
        ("NAT", "TXT", "G7-12"),
        ("SOC", "IMG", "G1-6"),
        ("LAN", "NO", "G7-12"),
        ("SOC", "TXT", "IMG", "G1-6"),
    ]
    assert {name for row in found for name in row} == set(STRATA)


@pytest.mark.parametrize("images", ["images", "."])
def test_images_in_either_place(tmp_path: Path, images: str) -> None:
    folder = write(tmp_path, images)
    rows = read_scienceqa(folder, "train")
    assert [row.image is not None for row in rows] == [False, True, False]
    assert rows[1].image is not None and (folder / images / "train" / "1" / "image.png").samefile(str(rows[1].image))


def test_without_an_images_folder_there_are_none(tmp_path: Path) -> None:
    rows = read_scienceqa(write(tmp_path), "train")
    assert all(row.image is None for row in rows) and "IMG" in strata(rows[1])


def test_folder_is_recognised(tmp_path: Path) -> None:
    assert not is_scienceqa(tmp_path)
    assert is_scienceqa(write(tmp_path)) and splits_of(tmp_path) == ["train", "test"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("problems.json", "{", "cannot be read as JSON"),
        ("problems.json", "[]", "should hold an object"),
        ("problems.json", "{}", "names this question"),
        ("problems.json", json.dumps({"2": {**SECOND, "grade": "grade13"}}), "problems.json:2: subject"),
        ("problems.json", json.dumps({"2": {**SECOND, "choices": "a"}}), "problems.json:2: field 'choices'"),
        ("problems.json", json.dumps({"2": {**SECOND, "hint": 3}}), "problems.json:2: field 'hint'"),
        ("pid_splits.json", '{"training": ["1"]}', "did you mean 'training'"),
        ("pid_splits.json", '{"train": []}', "holds no question"),
        ("captions.json", '{"captions": [1]}', "captions.json: should hold"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, file: str, text: str, said: str) -> None:
    folder = write(tmp_path)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_scienceqa(folder, "train", captions=True)
