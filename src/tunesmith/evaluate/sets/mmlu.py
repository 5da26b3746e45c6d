"""MMLU: 57 subjects, four options each, answered by letter   (arXiv:2009.03300).

    data/test/SUBJECT_test.csv, data/dev/SUBJECT_dev.csv: question, A, B, C, D, letter, without a header   as published
    {"question", "subject", "choices": [4], "answer": 2}                                                   on the hub
    {"subject", "input": "...\\nAnswer:", "output": "A"}                                                    in QLoRA

The five examples of the paper, shots=5, are the subject's in `dev`. `acc` is over all questions, as in the paper; the
four categories are the paper's too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.evaluate.choice import ChoiceSettings, Question, measure, question, with_examples
from tunesmith.evaluate.sets.rows import Raw, examples_of, number, rows_of, text, texts
from tunesmith.evaluate.tasks import Task

LETTERS = ("A", "B", "C", "D")
HEADING = "The following are multiple choice questions (with answers) about"
PARTS = ("_test", "_dev", "_val")
CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics
        high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


def describe(subject: str) -> str:
    """What comes before a subject's questions."""
    return f"{HEADING} {subject.replace('_', ' ')}.\n\n"


def put(where: str, asked: str, subject: str, answer: int) -> Question:
    """A question whose options are letters; it counts in its category and its subject."""
    strata = tuple(s for s in (CATEGORY.get(subject), subject) if s)
    return question(where, asked, LETTERS, answer, group=subject, strata=strata)


def listed(asked: str, options: tuple[str, ...]) -> str:
    """The question with its lettered options."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([asked.strip(), *lines, "Answer:"])


def row(raw: Raw, where: str) -> Question:
    """A question of a row with keys."""
    subject = text(raw, "subject", where)
    if "input" in raw:
        heading, parted, rest = text(raw, "input", where).partition("\n\n")
        asked = rest if parted and heading.startswith(HEADING) else raw["input"]
        return put(where, asked, subject, _letter(raw.get("output"), where))
    options = texts(raw, "choices", where)
    if len(options) != len(LETTERS):
        raise DataError(f"{where}: has {len(options)} choices where MMLU has four; measure it as task choice")
    return put(
        where, listed(text(raw, "question", where), options), subject, number(raw.get("answer"), 4, where, "answer")
    )


def published(file: Path) -> Iterator[Question]:
    """The questions of one SUBJECT_test.csv. Raises DataError."""
    subject = file.stem
    for part in PARTS:
        subject = subject.removesuffix(part)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for cells in (reader := csv.reader(lines)):
                where = f"{file}:{reader.line_num}"
                if len(cells) != 6:
                    raise DataError(f"{where}: has {len(cells)} fields where MMLU has six; download the file again")
                yield put(where, listed(cells[0], tuple(cells[1:5])), subject, _letter(cells[5], where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from None


def read(path: Path, settings: ChoiceSettings) -> list[Question]:
    """The questions of a file, of the folder as published, or of the hub's. Raises DataError."""
    found = _questions(path, settings.split or "test")
    pool = _questions(examples_of(path, settings), "dev") if settings.shots else []
    return with_examples(found, pool, settings.shots, describe)


def _questions(path: Path, split: str) -> list[Question]:
    files = sorted(path.glob(f"**/{split}/*_{split}.csv")) if path.is_dir() else [path] if path.suffix == ".csv" else []
    if files:
        found = [one for file in files for one in published(file)]
        if not found:
            raise DataError(f"{path}: holds no question; download it again")
        return found
    return [row(raw, where) for where, raw in rows_of(path, split, "all" if (path / "all").is_dir() else "")]


def _letter(value: object, where: str) -> int:
    if value not in LETTERS:
        raise DataError(f"{where}: the answer is {str(value)[:40]!r}; it must be one of {', '.join(LETTERS)}")
    return LETTERS.index(str(value))


MMLU = Task("mmlu", "57 subjects, four options each", ChoiceSettings, read, measure)
