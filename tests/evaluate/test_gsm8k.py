"""GSM8K: numbers as lm-evaluation-harness finds and compares them, prompts as it writes them, rows as published."""

from __future__ import annotations

import gzip
import json

import pytest
from tests.tiny import write_rows

from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate import gsm8k
from tunesmith.evaluate.gsm8k import TASK, GSM8KSettings, flexible, strict
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

ROWS = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "A thousand dollars and 50 cents?", "answer": "It is $1,000.50.\n#### 1,000.50"},
    {"question": "Three less than one?", "answer": "1 - 3 = -2\n#### -2"},
]
ANSWERS = [
    "2 + 2 = 4\n#### 4",
    "#### 4.",
    "The answer is 4.",
    "#### $4",
    "#### 4 and then #### 5",
    "####4",
    "1,000.50 in all",
    "#### 1,000.50",
    "It costs $1,000.50.",
    "minus two is -2",
    "#### -2",
    "no number at all",
    "",
    "1 2 3",
    "5.",
    "a - 7",
    "...",
    "$",
    "####  4",
    "10%",
    "x=12,345,678.",
]


@pytest.mark.parametrize("text", ANSWERS)
def test_numbers_are_those_of_lm_evaluation_harness(text):
    lm_eval = pytest.importorskip("lm_eval.filters.extraction", reason="NOT TESTED: lm_eval is not installed")
    pytest.importorskip("lm_eval.api.metrics")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    filters = {
        strict: lm_eval.RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)"),
        flexible: lm_eval.RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    for ours, theirs in filters.items():
        found = theirs.apply([[text]], [{}])
        for row in ROWS:
            right = exact_match_hf_evaluate(
                predictions=list(found)[0], references=[row["answer"]], regexes_to_ignore=ignored, ignore_case=True
            )["exact_match"]
            assert (ours(text) == strict(row["answer"])) == bool(right), (ours.__name__, text, row["answer"])


def test_numbers_by_hand():
    assert [strict(t) for t in ("#### 1,234", "a\n#### -5.", "#### x", "5")] == ["1234", "-5", None, None]
    assert [flexible(t) for t in ("1 and $2,000.", "-3", "none", "a 4.5 b")] == ["2000", "-3", None, "4.5"]


@pytest.fixture(scope="module")
def subject(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    return Subject(load_model(tiny_base), tokenizer, get_template("chat", tokenizer))


def said(monkeypatch, *texts: str, reason: str = "eos") -> list:
    """Let the model say these; returns what it was asked, as (prompts, settings)."""
    asked = []

    def answers(subject, prompts, settings):
        asked.append((prompts, settings))
        return [Generation((1,) * len(text), text, reason) for text in texts]

    monkeypatch.setattr(gsm8k, "answers_to", answers)
    return asked


def test_figures_by_hand(subject, tmp_path, monkeypatch):
    problems = TASK.read(write_rows(tmp_path / "dev.jsonl", ROWS), GSM8KSettings())
    asked = said(monkeypatch, "so\n#### 4", "so #### it is 1,000.50", "never")
    result = TASK.measure(subject, problems, GSM8KSettings())
    assert {name: figure.value for name, figure in result.figures.items()} == pytest.approx(
        {"strict": 1 / 3, "flexible": 2 / 3, "unparsed": 1 / 3, "unfinished": 0.0, "distinct_2": 5 / 6}
    )
    assert result.each == {"strict": [1.0, 0.0, 0.0], "flexible": [1.0, 1.0, 0.0]}
    assert not result.figures["unparsed"].higher_is_better and result.figures["strict"].interval is not None
    ((prompts, settings),) = asked
    assert subject.tokenizer.decode(prompts[0]) == "Question: Two and two?\nAnswer:"
    assert settings.stop == ("Question:", "</s>", "<|im_end|>") and settings.temperature == 0


def test_examples_are_put_before_and_are_never_measured_ones(subject, tmp_path, monkeypatch):
    rows = [*ROWS, {"question": "Six?", "answer": "#### 6"}, {"question": "Seven?", "answer": "#### 7"}]
    pool = write_rows(tmp_path / "train.jsonl", rows)
    problems = TASK.read(write_rows(tmp_path / "dev.jsonl", ROWS[:1]), GSM8KSettings())
    asked = said(monkeypatch, "#### 4")
    plain = GSM8KSettings(shots=2, shots_from=str(pool))
    TASK.measure(subject, problems, plain)
    examples = [(r["question"], r["answer"]) for r in ROWS[1:]]
    expected = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples) + "Question: Two and two?\nAnswer:"
    assert subject.tokenizer.decode(asked[0][0][0]) == expected
    TASK.measure(subject, problems, GSM8KSettings(shots=2, shots_from=str(pool), template=True))
    chat = subject.tokenizer.decode(asked[1][0][0], skip_special=False)
    assert chat.count("<|im_start|>user") == chat.count("<|im_start|>assistant") == 3
    assert all(a in chat for _, a in examples) and "Question:" not in chat
    with pytest.raises(ConfigError, match="has 4 examples that are not measured"):
        TASK.measure(subject, problems, GSM8KSettings(shots=5, shots_from=str(pool)))
    with pytest.raises(ConfigError, match="shots_from=FILE"):
        TASK.measure(subject, problems, GSM8KSettings(shots=1))


def test_the_model_itself_answers(subject, tmp_path):
    problems = TASK.read(write_rows(tmp_path / "dev.jsonl", ROWS), GSM8KSettings())
    result = TASK.measure(subject, problems, GSM8KSettings(max_new_tokens=4, template=True))
    assert result.figures["strict"].value == 0 and [s["number"] for s in result.samples] == ["4", "1000.50", "-2"]


def test_rows_as_published(tmp_path):
    packed = tmp_path / "test.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    problems = TASK.read(packed, GSM8KSettings())
    assert [(p.question, p.number) for p in problems] == [
        ("Two and two?", "4"), ("A thousand dollars and 50 cents?", "1000.50"), ("Three less than one?", "-2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "no end"}, "rows.jsonl:2: the answer should end with '#### NUMBER'"),
        ({"question": "a", "anser": "#### 1"}, "rows.jsonl:2: has no text under 'answer' .*did you mean 'anser'"),
        ({"question": "", "answer": "#### 1"}, "rows.jsonl:2: has no text under 'question'"),
        (["a"], "rows.jsonl:2: has no text under 'question' .keys here: none"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        TASK.read(write_rows(tmp_path / "rows.jsonl", [ROWS[0], row]), GSM8KSettings())


def test_an_empty_file_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no problem"):
        TASK.read(tmp_path / "a.jsonl", GSM8KSettings())
