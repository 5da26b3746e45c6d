"""movie-reviews: sentences of film reviews, rated by people, as two classes (Hutto and Gilbert, ICWSM 2014).

Source: movieReviewSnippets_GroundTruth.txt (UTF-8, tab-separated: id, mean rating in [-4, 4], text) inside
additional_resources/hutto_ICWSM_2014.tar.gz of vaderSentiment 3.3.2; 10,605 sentences, each rated by 15 to 29 people.

    label     the sign of the mean rating: "positive" or "negative"; the 37 sentences whose mean is 0 are dropped
    repeats   sentences with the same letters and digits (case, spaces and punctuation aside): the first id stays if all
              agree on the label, none does if they differ (two repeats, no disagreement: 10,566 rows)
    split     rows in the order of their ids, random.Random(0).shuffle, then 1,000 test, 1,000 valid, the rest train

Never combine it with SST-2: both were cut from the same reviews and share sentences.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import IO

from tunesmith.data.fetch import open_member
from tunesmith.errors import CatalogError
from tunesmith.files import atomic_write_text

ROWS = {"train": 8566, "valid": 1000, "test": 1000}
_OUTER = "vaderSentiment-3.3.2/"
_INNER = _OUTER + "additional_resources/hutto_ICWSM_2014.tar.gz"
_TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_README = "hutto_ICWSM_2014/_README_.txt"
_LIMIT = 2**24


def build_reviews(archive: Path, folder: Path) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl ({"text", "label"}) with licence and readme into `folder`.

    Raises CatalogError if the archive does not hold what it should.
    """
    with open_member(archive, _OUTER + "LICENSE.txt", limit=_LIMIT) as (source, _):
        atomic_write_text(folder / "LICENSE", source.read().decode("utf-8"))
    with open_member(archive, _INNER, limit=_LIMIT) as (inner, _):
        atomic_write_text(folder / "README", _read(inner, _README).decode("cp1252"))
    with open_member(archive, _INNER, limit=_LIMIT) as (inner, _):
        rows = read_ratings(_read(inner, _TEXTS).decode("utf-8"))
    splits = split(without_repeats(rows))
    counts = {name: len(part) for name, part in splits.items()}
    if counts != ROWS:
        raise CatalogError(f"{archive.name}: gave {counts} rows where {ROWS} were expected; the archive is another one")
    for name, part in splits.items():
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for _, label, text in part)
        atomic_write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def read_ratings(table: str) -> list[tuple[int, str, str]]:
    """Give (id, label, text), in the order of the ids, for every line of `table` whose mean rating is not 0."""
    rows = []
    for number, line in enumerate(table.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            identity, mean, text = line.split("\t", 2)
            row, rating = int(identity), float(mean)
        except ValueError as error:
            raise CatalogError(f"{_TEXTS}:{number}: expected id, mean rating and text, found {line[:60]!r}") from error
        if not -4 <= rating <= 4:
            raise CatalogError(f"{_TEXTS}:{number}: mean rating {mean} is not in [-4, 4]")
        if rating != 0 and text.strip():
            rows.append((row, "positive" if rating > 0 else "negative", text.strip()))
    return sorted(rows)


def without_repeats(rows: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Keep the first of rows with the same letters and digits if their labels agree, and none if they differ."""
    same: dict[str, list[tuple[int, str, str]]] = {}
    for row in rows:
        same.setdefault("".join(filter(str.isalnum, row[2].casefold())), []).append(row)
    return [group[0] for group in same.values() if len({label for _, label, _ in group}) == 1]


def split(rows: list[tuple[int, str, str]]) -> dict[str, list[tuple[int, str, str]]]:
    """Shuffle with seed 0; the first 1,000 rows are test, the next 1,000 valid, the rest train."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    held = ROWS["test"], ROWS["test"] + ROWS["valid"]
    return {"train": rows[held[1] :], "valid": rows[held[0] : held[1]], "test": rows[: held[0]]}


def _read(archive: IO[bytes], member: str) -> bytes:
    with open_member(archive, member, limit=_LIMIT) as (source, _):
        return source.read()
