"""Ratings and answers written by hand in the form in which Vicuna's and QLoRA's are published."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

SYSTEMS = ("alpha", "beta", "gamma")
QUESTIONS = 6
STRENGTH = {"alpha": 9, "beta": 7, "gamma": 4}


def answer_of(system: str, question: int) -> str:
    """Question 1 has one right answer, which alpha and beta both give word for word."""
    return "42" if question == 1 and system != "gamma" else f"{system} says {question}."


def id_of(system: str, question: int) -> str:
    """An id given by the author, the same for the same text."""
    return f"id-{answer_of(system, question)}"


def answers() -> dict[str, list[dict[str, Any]]]:
    """Rows of each file of answers, in Vicuna's form."""
    return {
        f"answer_{system}": [
            {"answer_id": id_of(system, q), "model_id": f"{system}:20230327", "question_id": q,
             "text": answer_of(system, q), "metadata": {}}
            for q in range(1, QUESTIONS + 1)
        ]
        for system in SYSTEMS
    }  # fmt: skip


def rating(first: str, second: str, question: int, score: Any) -> dict[str, Any]:
    """One review, in QLoRA's form."""
    return {
        "review_id": f"{first}-{second}-{question}-{isinstance(score, list)}", "question_id": question,
        "answer1_id": id_of(first, question), "answer2_id": id_of(second, question), "reviewer_id": 1,
        "metadata": {}, "text": "Some words.", "score": score,
    }  # fmt: skip


def verdict(first: str, second: str, question: int) -> int:
    """Strength decides, but a judge that sees the stronger second says tie at question 2, and fails at question 3."""
    if question == 3 and first == "gamma" and second == "alpha":
        return -1
    stronger = 1 if STRENGTH[first] > STRENGTH[second] else 2
    return 3 if question == 2 and stronger == 2 else stronger


def pairwise() -> dict[str, list[dict[str, Any]]]:
    """Every pair in both orders; the name of a file says the opposite order as often as the right one."""
    draw = random.Random(0)
    files = {}
    for first in SYSTEMS:
        for second in SYSTEMS:
            if first < second:
                names = [f"answer-{first}-vs-answer-{second}", f"answer-{second}-vs-answer-{first}"]
                draw.shuffle(names)
                for name, order in zip(names, ((first, second), (second, first)), strict=True):
                    rows = [rating(*order, q, verdict(*order, q)) for q in range(1, QUESTIONS + 1)]
                    files[f"{name}-gpt-4-reviewer-threeclass"] = rows
    return files


def relative(reference: str = "beta") -> dict[str, list[dict[str, Any]]]:
    """Scores beside a reference: who is first gets half a point more. Named in the wrong order, all of them."""
    files = {}
    for system in SYSTEMS:
        for first, second in ((system, reference), (reference, system)):
            if system != reference:
                rows = [
                    rating(first, second, q, [STRENGTH[first] + 0.5, STRENGTH[second]])
                    for q in range(1, QUESTIONS + 1)
                ]  # fmt: skip
                files[f"{second}-vs-{first}-gpt4-reviewer"] = rows
    return files


def write_zip(path: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A zip archive with a folder of .jsonl files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in files.items():
            archive.writestr(f"eval/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_folder(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """The same as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
