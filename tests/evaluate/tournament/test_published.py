"""Published ratings: who is answer 1 is told by ids, whatever the files are called; votes; what is refused."""

from __future__ import annotations

import csv
import json
import random
import uuid
import zipfile
from pathlib import Path

import pytest
from tests.evaluate.tournament.published_files import (
    QUESTIONS,
    SYSTEMS,
    answer_of,
    answers,
    pairwise,
    rating,
    relative,
    verdict,
    write_folder,
    write_zip,
)

from tunesmith.errors import DataError
from tunesmith.evaluate.tournament.answers import read_questions, read_replies
from tunesmith.evaluate.tournament.files import sort_out
from tunesmith.evaluate.tournament.judgments import Judgment, read_judgments
from tunesmith.evaluate.tournament.published import answer_id, names_in, plain, short_name


def judgments(*paths: Path) -> tuple[list[Judgment], list[str]]:
    notes: list[str] = []
    files = sort_out(paths, notes.append)
    found, left_out = read_judgments(files["ratings"], files["votes"], read_replies(files["answers"]))
    return found, notes + left_out


def expected() -> list[tuple]:
    """Every verdict from the rule that made it, not from a file."""
    said = {1: 1.0, 2: 0.0, 3: 0.5, -1: None}
    pairs = [(a, b) for a in SYSTEMS for b in SYSTEMS if a != b]
    return sorted((str(q), a, b, str(said[verdict(a, b, q)])) for a, b in pairs for q in range(1, QUESTIONS + 1))


def seen(found: list[Judgment]) -> list[tuple]:
    return sorted((one.question, one.first, one.second, str(one.outcome)) for one in found)


def test_the_made_files_have_wrong_names_and_equal_answers() -> None:
    right = [name for name, rows in pairwise().items() if rows[3]["answer1_id"].startswith(f"id-{names_in(name)[0]}")]
    assert 0 < len(right) < len(pairwise())
    assert answer_of("alpha", 1) == answer_of("beta", 1)


def test_a_zip_in_a_folder_beside_answers_and_questions(tmp_path) -> None:
    write_folder(tmp_path / "answers", answers())
    write_folder(tmp_path / "prompts", {"questions": [{"question_id": 1, "text": "Why?", "category": "x"}]})
    write_zip(tmp_path / "ratings.zip", pairwise())
    found, notes = judgments(tmp_path)
    assert seen(found) == expected() and len(found) == 6 * QUESTIONS
    assert notes == [f"{tmp_path}: left out 1 .jsonl files that hold neither judgments nor answers"]


def test_swapped_names_change_nothing(tmp_path) -> None:
    """First A-vs-B and B-vs-A swap names, then any file takes any other's; answers tell who is who."""
    files = {**pairwise(), **relative()}
    known = write_zip(tmp_path / "answers.zip", answers())
    honest, _ = judgments(write_zip(tmp_path / "honest.zip", files), known)

    def other_order(name: str) -> str:
        left, _, right = name.partition("-vs-")
        for ending in ("-gpt-4-reviewer-threeclass", "-gpt4-reviewer"):
            if right.endswith(ending):
                return f"{right.removesuffix(ending)}-vs-{left}{ending}"
        raise AssertionError(name)

    swapped = {other_order(name): rows for name, rows in files.items()}
    assert set(swapped) == set(files) and swapped != files
    assert judgments(write_zip(tmp_path / "swapped.zip", swapped), known)[0] == honest
    names = list(files)
    random.Random(2).shuffle(names)
    shuffled = dict(zip(names, files.values(), strict=True))
    assert judgments(write_zip(tmp_path / "shuffled.zip", shuffled), known)[0] == honest


def test_without_answers_the_ids_of_many_files_tell(tmp_path) -> None:
    found, notes = judgments(write_folder(tmp_path / "ratings", pairwise()))
    assert seen(found) == expected() and notes == []


def test_one_pair_without_answers_is_refused(tmp_path) -> None:
    files = {name: rows for name, rows in pairwise().items() if "gamma" not in name}
    with pytest.raises(DataError, match="its name is not believed; give the systems' answers too"):
        judgments(write_folder(tmp_path / "ratings", files))
    found, _ = judgments(tmp_path / "ratings", write_folder(tmp_path / "answers", answers()))
    assert len(found) == 2 * QUESTIONS


def test_lines_may_be_in_either_order(tmp_path) -> None:
    rows = [rating(*(("alpha", "gamma") if q % 2 else ("gamma", "alpha")), q, 1) for q in range(1, QUESTIONS + 1)]
    write_folder(tmp_path, {"answer-gamma-vs-answer-alpha-gpt4-reviewer": rows, **answers()})
    found, _ = judgments(tmp_path)
    assert [one.first for one in found] == ["alpha", "gamma"] * 3


def test_equal_answers_follow_the_rest_of_their_file(tmp_path) -> None:
    """At question 1 alpha's answer is beta's: the ids are equal, the order is that of the other lines."""
    rows = [rating("beta", "alpha", q, 2) for q in range(1, QUESTIONS + 1)]
    write_folder(tmp_path, {"answer-alpha-vs-answer-beta-gpt4-reviewer": rows, **answers()})
    found, _ = judgments(tmp_path)
    assert {(one.first, one.second) for one in found} == {("beta", "alpha")}
    write_folder(tmp_path, {"answer-alpha-vs-answer-beta-gpt4-reviewer": rows[:1]})
    with pytest.raises(DataError, match="do not tell"):
        judgments(tmp_path)


def test_a_file_of_strangers_is_left_out_and_named(tmp_path) -> None:
    """gamma's file of answers does not hold what was rated, so nobody knows whose those answers are."""
    known = answers()
    known["answer_gamma"] = [{**row, "answer_id": "else" + row["answer_id"]} for row in known["answer_gamma"]]
    write_folder(tmp_path, {**known, **pairwise()})
    found, notes = judgments(tmp_path)
    assert {one.first for one in found} == {"alpha", "beta"} and len(found) == 2 * QUESTIONS
    assert len(notes) == 4 and all("gamma" in note and note.startswith("left out ") for note in notes)


def test_a_system_without_answers_is_called_as_its_files(tmp_path) -> None:
    known = {name: rows for name, rows in answers().items() if "gamma" not in name}
    write_folder(tmp_path, {**known, **pairwise()})
    assert seen(judgments(tmp_path)[0]) == expected()


def test_a_line_of_other_systems_is_refused(tmp_path) -> None:
    rows = [rating("beta", "alpha", q, 2) for q in range(1, 5)] + [rating("gamma", "gamma", 5, 1)]
    write_folder(tmp_path, {"a-vs-b-gpt4-reviewer": rows, **answers()})
    with pytest.raises(DataError, match="b-gpt4-reviewer.jsonl:5: holds answers of gamma and gamma, the file of alpha"):
        judgments(tmp_path)


def test_a_review_twice_is_refused(tmp_path) -> None:
    write_folder(tmp_path / "folder", {**pairwise(), **answers()})
    archive = write_zip(tmp_path / "ratings.zip", pairwise())
    with pytest.raises(DataError, match="is the same review as"):
        judgments(tmp_path / "folder", archive)


def test_scores_keep_their_order(tmp_path) -> None:
    found, _ = judgments(write_folder(tmp_path, {**relative(), **answers()}))
    assert all(one.kind == "scores" and one.outcome is None for one in found)
    by_order = {(one.first, one.second): one.scores for one in found}
    assert by_order == {
        ("alpha", "beta"): (9.5, 7), ("beta", "alpha"): (7.5, 9),
        ("gamma", "beta"): (4.5, 7), ("beta", "gamma"): (7.5, 4),
    }  # fmt: skip


def test_ids_of_generated_answers_are_made_from_their_text(tmp_path) -> None:
    """The base-57 digits of a UUID whose value Python's own documentation gives."""
    digits = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    value = 0
    for digit in answer_id("python.org"):
        value = 57 * value + digits.index(digit)
    assert uuid.UUID(int=value) == uuid.UUID("886313e1-3b8a-5372-9b90-0c9aee199e5d")
    assert len(answer_id("")) == len(answer_id("http://a.example")) == 22
    generations = {
        f"{system}-vicuna-generations-topp0.9-temp0.7": [
            {"question_id": q, "text": "?", "generation": f"{system} {q} tail", "generation_truncated": f"{system} {q}"}
            for q in (1, 2)
        ]
        for system in ("7b-a", "13b-b")
    }  # fmt: skip
    rows = [
        {"question_id": q, "answer1_id": answer_id(f"13b-b {q}"), "answer2_id": answer_id(f"7b-a {q}"), "score": 1}
        for q in (1, 2)
    ]
    write_folder(tmp_path, {**generations, "x-vs-y-gpt-4-reviewer-threeclass": rows})
    found, _ = judgments(tmp_path)
    assert [(one.first, one.second) for one in found] == [("13b-b", "7b-a")] * 2


def test_names_of_files() -> None:
    assert short_name("65b-guanaco-vicuna-generations-topp0.9-temp0.7") == "65b-guanaco"
    assert names_in("answer-gpt35-vs-answer-vicuna-13b-gpt-4-reviewer-threeclass") == ("gpt35", "vicuna-13b")
    assert names_in("gpt-3.5-vs-bard-gpt4-reviewer") == ("gpt-3.5", "bard")
    assert names_in("notes") == names_in("a-vs-a") == ()
    assert plain("answer_gpt35") == plain("gpt-3.5") == "gpt35"


def votes(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_votes_of_people(tmp_path) -> None:
    words = ["1", "2", "3", "tie", "a", "b", "", "-1"]
    rows = [{"question_id": i, "model_1": "a", "model_2": "b", "verdict": word} for i, word in enumerate(words)]
    found, _ = judgments(votes(tmp_path / "votes.csv", rows))
    assert [one.outcome for one in found] == [1, 0, 0.5, 0.5, 1, 0, None, None]
    words = ["model_a", "model_b", "tie", "tie (bothbad)"]
    arena = [{"question_id": "q", "model_a": "a", "model_b": "b", "winner": w, "judge": f"p{i}", "turn": 2}
             for i, w in enumerate(words)]  # fmt: skip
    (tmp_path / "arena.jsonl").write_text("\n".join(map(json.dumps, arena)))
    found, _ = judgments(tmp_path / "arena.jsonl")
    assert [(one.judge, one.turn, one.outcome) for one in found] == [
        ("p0", 2, 1),
        ("p1", 2, 0),
        ("p2", 2, 0.5),
        ("p3", 2, 0.5),
    ]
    rows = [
        {"prompt_id": 1, "model_1": "a", "model_2": "b", "score_1": x, "score_2": y} for x, y in ((9, 7.5), (-1, -1))
    ]
    found, _ = judgments(votes(tmp_path / "scores.csv", rows))
    assert [(one.kind, one.scores) for one in found] == [("scores", None), ("scores", (9, 7.5))]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"verdict": "first one"}, "votes.jsonl:1: verdict 'first one'.*should be 1, 2, 3"),
        ({"verdict": 4}, "verdict '4'"),
        ({"verdict": True}, "verdict 'True'"),
        ({"model_2": "a", "verdict": 1}, "'a' is compared with itself"),
        ({"model_1": "", "verdict": 1}, "field 'model_1' should be a text"),
        ({"verdict": 1, "turn": "x"}, "field 'turn'"),
        ({"score_1": 1, "score_2": "many"}, "should be two scores"),
        ({"score_1": 1, "score_2": float("inf")}, "should be two scores"),
        ({}, "has neither 'verdict'"),
        ({"question_id": [1], "verdict": 1}, "field 'question_id'"),
    ],
)
def test_a_wrong_vote_is_named(tmp_path, row, said) -> None:
    (tmp_path / "votes.jsonl").write_text(json.dumps({"question_id": 1, "model_1": "a", "model_2": "b", **row}))
    with pytest.raises(DataError, match=said):
        judgments(tmp_path / "votes.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.zip", b"no zip", "is not a readable zip archive"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: should be an object"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"holds neither judgments nor answers \(found: prompt\)"),
        ("a.txt", b"x", "unknown kind of file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, data, said) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        judgments(tmp_path / name)


def test_bad_lines_inside_of_an_archive_are_named(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a-vs-b.jsonl", '\n{"answer1_id": 1}\nnonsense\n')
        archive.writestr("x/readme.md", "text")
    with pytest.raises(DataError, match=r"a.zip:x/a-vs-b.jsonl:3: is not JSON"):
        judgments(tmp_path / "a.zip")
    for missing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"no such file or folder|holds no .jsonl and no .zip"):
            judgments(missing)


def test_a_large_member_is_not_unpacked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tunesmith.evaluate.tournament.files.MAX_MEMBER", 100)
    archive = write_zip(tmp_path / "ratings.zip", pairwise())
    with pytest.raises(DataError, match="MiB when unpacked; unpack it yourself"):
        judgments(archive)


def test_questions_and_answers_of_mt_bench(tmp_path) -> None:
    asked = [{"question_id": 81, "category": "w", "turns": ["One?", "Two?"]}, {"question_id": 82, "turns": ["x", "y"]}]
    answered = [{"question_id": 82, "answer_id": "z", "model_id": "m", "choices": [{"index": 0, "turns": ["4", "5"]}]}]
    write_folder(tmp_path, {"question": asked, "reference": answered})
    first, second = read_questions(tmp_path / "question.jsonl", tmp_path / "reference.jsonl")
    assert (first.id, first.turns, first.reference) == ("81", ("One?", "Two?"), ())
    assert second.reference == ("4", "5")
    files = sort_out([tmp_path / "reference.jsonl"], print)
    assert read_replies(files["answers"])["m"]["82"].turns == ("4", "5")
    with pytest.raises(DataError, match="has answered question 82 already"):
        read_replies(files["answers"] * 2)
    write_folder(tmp_path, {"question": asked + asked[:1]})
    with pytest.raises(DataError, match="question.jsonl:3: question 81 is there twice"):
        read_questions(tmp_path / "question.jsonl")
