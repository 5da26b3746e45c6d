"""Rows of published sets, written by hand in their formats, become the questions that the sets' own tables measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.choice import ChoiceSettings, Question
from tunesmith.evaluate.sets.mmlu import CATEGORY
from tunesmith.evaluate.suite import find_task


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(task: str, path: Path, **settings) -> list[Question]:
    found = find_task(task)
    return list(found.read(path, found.settings(**settings)))


SCENE = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
    "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}  # fmt: skip
STEPS = {
    "ind": 1, "activity_label": "Home and Garden", "ctx_a": "[header] How to clean [title] Look first. [step]  Go.",
    "ctx_b": "", "label": "0", "endings": ["[step] Now  stop. [substeps] Wait.", "B", "C", "D"],
}  # fmt: skip


def test_hellaswag(tmp_path):
    first, second = read("hellaswag", write(tmp_path / "hellaswag_val.jsonl", SCENE, STEPS))
    assert first.contexts[0] == "Roof shingle removal: A man is sitting on a roof. He" and first.answer == 3
    assert first.continuations[1] == " is ripping level tiles off." and len(first.choices) == 4
    assert first.source.endswith("hellaswag_val.jsonl:1")
    # as in lm-evaluation-harness: [title] ends a sentence, other marks go, then two spaces become one, so three two
    assert second.contexts[0] == "Home and Garden: How to clean. Look first.  Go."
    assert second.choices[0] == " Now stop. Wait." and second.answer == 0


def test_winogrande(tmp_path):
    row = {"qID": "3F-2", "sentence": "The plant took over the lawn because the _ was big.", "option1": "plant",
           "option2": "lawn", "answer": "1"}  # fmt: skip
    (one,) = read("winogrande", write(tmp_path / "dev.jsonl", row))
    assert one.contexts[1] == "The plant took over the lawn because the lawn"
    assert one.continuations == (" was big.", " was big.") and one.answer == 0
    with pytest.raises(DataError, match=r"dev\.jsonl:1: has no 'answer': a file without answers"):
        read("winogrande", write(tmp_path / "dev.jsonl", {**row, "answer": ""}))
    with pytest.raises(DataError, match="must be from 1 to 2"):
        read("winogrande", write(tmp_path / "dev.jsonl", {**row, "answer": "3"}))
    with pytest.raises(DataError, match="has no blank"):
        read("winogrande", write(tmp_path / "dev.jsonl", {**row, "sentence": "No blank."}))


OPTIONS = [{"text": "cold", "label": "1"}, {"text": "heat", "label": "2"}]
ARC = {"id": "Mercury_7", "question": {"stem": "What melts ice?", "choices": OPTIONS}, "answerKey": "2"}
HUB_ARC = {"id": "x", "question": "What melts ice?", "choices": {"text": ["cold", "heat"], "label": ["A", "B"]}}


def test_arc_and_openbookqa(tmp_path):
    (one,) = read("arc_easy", write(tmp_path / "ARC-Easy-Test.jsonl", ARC))
    assert one.contexts[0] == "Question: What melts ice?\nAnswer:" and one.answer == 1
    assert one.continuations == (" cold", " heat")
    (same,) = read("arc_challenge", write(tmp_path / "test.jsonl", {**HUB_ARC, "answerKey": "B"}))
    assert (same.contexts, same.choices, same.answer) == (one.contexts, one.choices, one.answer)
    hub = {"question_stem": "The sun is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": " A"}
    (book,) = read("openbookqa", write(tmp_path / "test.jsonl", hub))
    assert book.contexts[0] == "The sun is" and book.continuations[0] == " hot" and book.answer == 0
    with pytest.raises(DataError, match="answerKey 'E' is not among the labels A, B"):
        read("arc_easy", write(tmp_path / "bad.jsonl", {**HUB_ARC, "answerKey": "E"}))


def test_boolq(tmp_path):
    row = {"question": "is water wet", "title": "Water", "answer": True, "passage": "Water is a liquid."}
    (one,) = read("boolq", write(tmp_path / "dev.jsonl", row))
    assert one.contexts[0] == "Water is a liquid.\nQuestion: is water wet?\nAnswer:"
    assert one.continuations == (" no", " yes") and one.answer == 1
    (same,) = read("boolq", write(tmp_path / "val.jsonl", {"question": "q", "passage": "p", "idx": 0, "label": 0}))
    assert same.answer == 0
    with pytest.raises(DataError, match="must be true or false"):
        read("boolq", write(tmp_path / "test.jsonl", {"question": "q", "passage": "p", "label": -1}))


@pytest.mark.parametrize(
    ("task", "instruction", "answer", "context", "choices", "right"),
    [
        (
            "arc_easy",
            "Please choose the correct answer to the question: What melts: ice?\n\nAnswer1: cold Answer2: dry heat"
            "\n\nAnswer format: answer1/answer2",
            "answer2", "Question: What melts: ice?\nAnswer:", ("cold", "dry heat"), 1,
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: Pool: A man plays. he\n\nEnding1: wins. "
            "Ending2: [step] sits. Ending3: a\n\nAnswer format: ending1/ending2/ending3",
            "ending3", "Pool: A man plays. he", ("wins.", " sits.", "a"), 2,
        ),
        (
            "boolq",
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
            "true", "Question: is it?\nAnswer:", ("no", "yes"), 1,
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: Tim beat _ at chess."
            "\n\nOption1: Bob Option2: Ann\n\nAnswer format: option1/option2",
            "option1", "Tim beat Bob", ("at chess.", "at chess."), 0,
        ),
    ],
)  # fmt: skip
def test_rows_of_llm_adapters(tmp_path, task, instruction, answer, context, choices, right):
    row = {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    (one,) = read(task, write(tmp_path / "train.jsonl", row))
    assert (one.contexts[0], one.choices, one.answer) == (context, choices, right)
    with pytest.raises(DataError, match=r"train\.jsonl:1: is not an instruction of LLM-Adapters"):
        read(task, write(tmp_path / "train.jsonl", {**row, "answer": "answer9"}))


CSV = 'What is 2 + 2?,3,4,5,6,B\n"Is 7, or 9, prime?",7,9,both,none,A\n'


def test_mmlu_as_published(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "test" / "abstract_algebra_test.csv").write_text(CSV)
    (tmp_path / "dev" / "abstract_algebra_dev.csv").write_text("Is 1 prime?,yes,no,maybe,often,B\n")
    heading = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    one, two = read("mmlu", tmp_path)
    assert one.contexts[0] == heading + "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    assert one.continuations == (" A", " B", " C", " D") and one.answer == 1 and two.answer == 0
    assert one.strata == ("STEM", "abstract_algebra")
    (shot, _) = read("mmlu", tmp_path, shots=1)
    solved = "Is 1 prime?\nA. yes\nB. no\nC. maybe\nD. often\nAnswer: B\n\n"
    assert shot.contexts[0] == heading + solved + "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    with pytest.raises(ConfigError, match="shots=2: there are 1 examples of abstract_algebra"):
        read("mmlu", tmp_path, shots=2)
    (tmp_path / "test" / "abstract_algebra_test.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"abstract_algebra_test\.csv:1: has 2 fields where MMLU has six"):
        read("mmlu", tmp_path)


def test_mmlu_of_the_hub_and_of_qlora(tmp_path):
    hub = {"question": "What is 2 + 2? ", "subject": "virology", "choices": ["3", "4", "5", "6"], "answer": 1}
    heading = "The following are multiple choice questions (with answers) about  virology."
    asked = "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    (one,) = read("mmlu", write(tmp_path / "hub.jsonl", hub))
    qlora = {"subject": "virology", "input": f"{heading}\n\n{asked}", "output": "B"}
    (same,) = read("mmlu", write(tmp_path / "qlora.jsonl", qlora))
    assert one.contexts == same.contexts and one.answer == same.answer == 1 and one.strata == ("other", "virology")
    assert one.contexts[0] == f"{heading.replace('  ', ' ')}\n\n{asked}"
    with pytest.raises(DataError, match="has 2 choices where MMLU has four"):
        read("mmlu", write(tmp_path / "hub.jsonl", {**hub, "choices": ["3", "4"]}))


def test_mmlu_has_57_subjects():
    assert len(CATEGORY) == 57 and sorted(set(CATEGORY.values())) == ["STEM", "humanities", "other", "social_sciences"]


def scienceqa(folder: Path) -> Path:
    problem = {
        "question": "Which is farthest north?", "choices": ["Ohio", "Utah"], "answer": 1, "hint": "Look at the map.",
        "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science", "lecture": "",
        "topic": "geography", "category": "Geography", "skill": "Read a map", "solution": "", "split": "test",
    }  # fmt: skip
    other = {**problem, "image": None, "hint": "", "grade": "grade8", "subject": "natural science", "answer": 0}
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps({"1": problem, "2": other, "3": {**other, "question": "Why?"}}))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["3"], "val": [], "test": ["1", "2"]}))
    (folder / "captions.json").write_text(json.dumps({"captions": {"1": "a map of states"}}))
    return folder


def test_scienceqa_with_its_strata(tmp_path):
    one, two = read("scienceqa", scienceqa(tmp_path / "scienceqa"))
    asked = "Which is farthest north?\nContext: Look at the map. a map of states\n(A) Ohio\n(B) Utah"
    assert one.contexts[0] == f"{asked}\nAnswer:" and one.asked == asked
    assert one.continuations == (" The answer is (A)", " The answer is (B)") and one.answer == 1
    assert one.strata == ("SOC", "TXT", "IMG", "G1-6") and two.strata == ("NAT", "NO", "G7-12")
    (bare, _) = read("scienceqa", tmp_path / "scienceqa", captions=False)
    assert "states" not in bare.contexts[0]
    (shot, _) = read("scienceqa", tmp_path / "scienceqa", shots=1)
    assert shot.contexts[0] == f"Why?\n(A) Ohio\n(B) Utah\nAnswer: The answer is (A)\n\n{asked}\nAnswer:"


def test_own_questions(tmp_path):
    row = {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "context": "Sums."}
    (one,) = read("choice", write(tmp_path / "mine.jsonl", row))
    assert one.contexts[0] == "Sums.\nQuestion: 2 + 2?\nAnswer:" and one.continuations == (" 3", " 4")
    assert one.asked == "2 + 2?\nContext: Sums.\n(A) 3\n(B) 4" and one.replies[1] == "The answer is (B)"


def test_a_folder_as_on_the_hub(tmp_path):
    test = {**HUB_ARC, "answerKey": "B"}
    write(tmp_path / "ARC-Easy" / "test-00000-of-00002.jsonl", test)
    write(tmp_path / "ARC-Easy" / "test-00001-of-00002.jsonl", {**test, "question": "Second?"})
    write(tmp_path / "ARC-Easy" / "train-00000-of-00001.jsonl", {**test, "question": "Solved?"}, test)
    write(tmp_path / "ARC-Challenge" / "test-00000-of-00001.jsonl", {**test, "question": "Hard?"})
    assert [q.contexts[0].split("\n")[0] for q in read("arc_easy", tmp_path)] == [
        "Question: What melts ice?", "Question: Second?"
    ]  # fmt: skip
    assert len(read("arc_challenge", tmp_path)) == 1
    with_shot = read("arc_easy", tmp_path, shots=1)
    assert all(q.contexts[0].startswith("Question: Solved?\nAnswer: heat\n\nQuestion: ") for q in with_shot)
    with pytest.raises(ConfigError, match="shots=2: there are 1 examples that are not measured themselves"):
        read("arc_easy", tmp_path, shots=2)  # the other training row is one of those measured
    with pytest.raises(DataError, match="has no validation file of ARC-Easy"):
        read("arc_easy", tmp_path, split="validation")
    with pytest.raises(DataError, match="is one file, so examples must come from another"):
        read("arc_easy", tmp_path / "ARC-Easy" / "test-00000-of-00002.jsonl", shots=1)
    write(tmp_path / "ARC-Easy" / "other-test.jsonl", test)
    with pytest.raises(DataError, match="more than one test file"):
        read("arc_easy", tmp_path)


def test_bad_rows_are_named(tmp_path):
    with pytest.raises(DataError, match=r"empty\.jsonl: (is empty|holds no row)"):
        read("hellaswag", write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a row must be an object"):
        read("hellaswag", write(tmp_path / "rows.jsonl", [1]))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: field 'ctx_a' must be a string \(.*\); did you mean 'ctx_'"):
        broken = {("ctx_" if k == "ctx_a" else k): v for k, v in SCENE.items() if k not in ("ctx", "ctx_b")}
        read("hellaswag", write(tmp_path / "rows.jsonl", SCENE, broken))
    with pytest.raises(DataError, match="'endings' must be a list of two strings"):
        read("hellaswag", write(tmp_path / "rows.jsonl", {**SCENE, "endings": ["a"]}))
    with pytest.raises(DataError, match="no such file"):
        read("hellaswag", tmp_path / "none.jsonl")
    assert ChoiceSettings().shots == 0
