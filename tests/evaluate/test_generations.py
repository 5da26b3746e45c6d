"""What free generation shows: rates by hand, overlap against another library, one generation for all of them."""

from __future__ import annotations

import random

import pytest
from tests.tiny import reviews, write_rows

from tunesmith.config import DataSection
from tunesmith.data.encode import encode_rows
from tunesmith.data.schemas import labels
from tunesmith.data.sources import read_rows
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError
from tunesmith.evaluate import run
from tunesmith.evaluate.diversity import distinct, unique_strings
from tunesmith.evaluate.generations import copied_share, greedy_answers, loops
from tunesmith.evaluate.overlap import overlap
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer


def answer(text: str, ids=(1,), reason: str = "eos") -> Generation:
    return Generation(tuple(ids), text, reason)


@pytest.fixture(scope="module")
def subject(tiny_base, tmp_path_factory):
    tokenizer = load_tokenizer(tiny_base)
    template = get_template("alpaca-short", tokenizer)
    rows = read_rows(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(4)))
    encoded = encode_rows(rows, template, tokenizer, cutoff=DataSection(train="-").cutoff)
    return Subject(load_model(tiny_base), tokenizer, template, tuple(rows), encoded.examples, tuple(labels(rows)))


def test_one_generation_serves_all_of_them(subject, monkeypatch):
    made = []

    def answers(given):
        made.append(given)
        return [
            answer(" positive \n"), answer("positive", (1, 2, 3, 4) * 4, "length"),
            answer("the positive", range(100, 110), "length"), answer("negative"),
        ]  # fmt: skip

    monkeypatch.setattr(run, "greedy_answers", answers)
    assert [row.label for row in subject.rows] == ["negative", "positive"] * 2
    names = ["exact_match", "unfinished_rate", "looping_rate", "distinct_1", "unique_rate", "rouge_l", "token_f1",
             "squad_match", "prompt_copy_rate"]  # fmt: skip
    found = run.measure(subject, names)
    assert len(made) == 1
    assert {name: found[name] for name in names} == pytest.approx(
        {
            "exact_match": 0.25,
            "unfinished_rate": 0.5,
            "looping_rate": 0.25,
            "distinct_1": 3 / 5,  # positive, the, negative among five words
            "unique_rate": 1.0,
            "rouge_l": 0.25,
            "token_f1": 0.25,
            "squad_match": 0.25,
            "prompt_copy_rate": 0.0,
        }
    )


def test_measures_without_answers_generate_nothing(subject, monkeypatch):
    monkeypatch.setattr(run, "greedy_answers", None)
    assert set(run.measure(subject, ["eval_loss", "accuracy"])) >= {"eval_loss", "accuracy"}


def test_the_model_itself(subject):
    found = run.measure(subject, ["exact_match", "looping_rate", "distinct_2", "rouge_l"])
    assert len(greedy_answers(subject)) == 4
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((7,) * 4, True),
        ((7,) * 3, False),
        ((9, 1, 2, 1, 2, 1, 2, 1, 2), True),
        ((1, 2, 1, 2, 1, 2, 1, 2, 9), False),
        ((1, 2, 3) * 4, True),
        ((), False),
    ],
)
def test_an_answer_is_caught_in_a_loop(ids, expected):
    assert loops(answer("", ids)) is expected


def test_the_copied_share():
    prompt = list(range(20))
    assert copied_share(prompt, prompt[3:12]) == 1.0
    assert copied_share(prompt, prompt[3:10]) == 0.0  # seven in a row are not yet a copy
    assert copied_share(prompt, [50, 51, *prompt[:8]]) == 0.8
    assert copied_share(prompt, []) == 0.0


def test_overlap_agrees_with_another_library():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="NOT TESTED: rouge_score is not installed")
    theirs = scorer.RougeScorer(["rougeL"])
    draw = random.Random(0)
    words = ["the", "a", "Cat", "sat", "on", "mat,", "mat.", "it's", "10%", "dog"]
    pairs = [(" ".join(draw.choices(words, k=9)), " ".join(draw.choices(words, k=6))) for _ in range(12)]
    ours = overlap([a for a, _ in pairs], [b for _, b in pairs])["rouge_l"]
    assert ours == pytest.approx([theirs.score(b, a)["rougeL"].fmeasure for a, b in pairs], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "reference", "rouge", "f1", "match"),
    [
        ("the cat sat on", "the cat on the mat", 2 * 0.75 * 0.6 / 1.35, 2 * (2 / 3) * (2 / 3) / (4 / 3), 0.0),
        ("The CAT!", "a cat", 0.5, 1.0, 1.0),  # articles and marks count in ROUGE alone
        ("one two", "two one", 0.5, 1.0, 0.0),
        ("", "word", 0.0, 0.0, 0.0),
        ("word word", "word", 2 / 3, 2 / 3, 0.0),
    ],
)
def test_overlap_by_hand(text, reference, rouge, f1, match):
    found = overlap([text], [reference])
    assert (found["rouge_l"], found["token_f1"], found["squad_match"]) == (
        pytest.approx([rouge]), pytest.approx([f1]), [match],
    )  # fmt: skip


def test_a_library_that_is_missing_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rouge_l needs torchmetrics; pip install 'tunesmith\[overlap\]'"):
        run.find_metric("rouge_l")
    assert run.find_metric("exact_match").higher_is_better


def test_distinct_n():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["a b", "a b", "c"], 2) == 0.5  # over all texts together
    assert distinct(["a"], 2) == distinct([], 1) == 0.0


def test_unique_strings_passing_and_failing_apart():
    texts = [["x", "x", "y", "z"], ["x", "x", "x", "x"]]
    passed = [[True, True, True, False], [False, False, False, False]]
    figures = unique_strings(texts, passed)
    assert {name: figure.value for name, figure in figures.items()} == {
        "unique": 2.0, "unique_passing": 1.0, "unique_failing": 1.0,
    }  # fmt: skip
