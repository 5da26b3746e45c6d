"""ScienceQA: multiple choice for schools, some with a hint, some with an image   (arXiv:2209.09513).

Read as it is published (data/scienceqa.py). A question is put as rows for training are: question, context (hint, then
the image's caption), options by letter; what is scored is "The answer is (X)". Its strata are those of the published
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from tunesmith.config import STRICT
from tunesmith.data.schemas import LETTERS, Row
from tunesmith.data.scienceqa import CAPTIONS, read_scienceqa, splits_of, strata
from tunesmith.evaluate.choice import ChoiceSettings, Question, measure, question, with_examples
from tunesmith.evaluate.sets.rows import examples_of
from tunesmith.evaluate.tasks import Task

MEASURED = ("test", "val")  # the first of these that is there


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScienceSettings(ChoiceSettings):
    """How questions are read and put."""

    captions: bool | None = Field(default=None, description="Captions stand in for images; none: where there are any.")


def put(row: Row) -> Question:
    """A question of a row."""
    letters = LETTERS[: len(row.choices)]
    replies = tuple(f"The answer is ({letter})" for letter in letters)
    asked = row.turns[-2].text
    answer = letters.index(row.label or "")
    rest = {"strata": strata(row), "asked": asked, "replies": replies, "image": row.image}
    return question(row.source, f"{asked}\nAnswer:", replies, answer, **rest)


def read(path: Path, settings: ScienceSettings) -> Sequence[Question]:
    """The questions of the folder with problems.json. Raises DataError."""

    def questions(folder: Path, split: str) -> list[Question]:
        captions = (folder / CAPTIONS).is_file() if settings.captions is None else settings.captions
        return [put(row) for row in read_scienceqa(folder, split, captions=captions)]

    named = splits_of(path)
    split = settings.split or next((one for one in MEASURED if one in named), MEASURED[0])
    pool = questions(examples_of(path, settings), "train") if settings.shots else []
    return with_examples(questions(path, split), pool, settings.shots, lambda group: "")


SCIENCEQA = Task("scienceqa", "multiple choice for schools, by strata", ScienceSettings, read, measure)
