"""HumanEval: rows as published, pass@k against brute force, completions run to their ends."""

from __future__ import annotations

import gzip
import itertools
import json
import os

import pytest
from tests.tiny import write_rows

from tunesmith.config import validate_section
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate import humaneval
from tunesmith.evaluate.humaneval import TASK, HumanEvalSettings, completion_of, pass_at_k, program
from tunesmith.evaluate.subject import Subject
from tunesmith.inference.answers import Generation
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="NOT TESTED: this system cannot limit a process")
# Written by hand, with the keys and the shape of the published rows.
ROWS = [
    {
        "task_id": "Own/0",
        "prompt": "from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n"
        '    """ Return the largest number of the list.\n    >>> largest([1, 3, 2])\n    3\n    """\n',
        "entry_point": "largest",
        "canonical_solution": "    return max(numbers)\n",
        "test": "\n\nMETADATA = {\n    'author': 'by hand'\n}\n\n\ndef check(candidate):\n"
        "    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1, -2]) == -1\n",
    },
    {
        "task_id": "Own/1",
        "prompt": "import math\n\n\ndef twice(word: str) -> str:\n"
        '    """ Write the word two times.\n    >>> twice("ab")\n    \'abab\'\n    """\n',
        "entry_point": "twice",
        "canonical_solution": "    return word * 2\n",
        "test": "def check(candidate):\n    assert candidate('ab') == 'abab'\n    assert candidate('') == ''\n",
    },
]
RIGHT = [row["canonical_solution"] for row in ROWS]


def by_counting(n: int, c: int, k: int) -> float:
    """The share of all sets of k samples in which one passes."""
    chosen = list(itertools.combinations(range(n), k))
    return sum(any(sample < c for sample in some) for some in chosen) / len(chosen)


def test_pass_at_k_is_the_share_of_all_choices():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            assert pass_at_k(n, c, k) == pytest.approx(by_counting(n, c, k), abs=1e-12)
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 101, 100) == 1


@pytest.fixture(scope="module")
def subject(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    return Subject(load_model(tiny_base), tokenizer, get_template("chat", tokenizer))


@pytest.fixture
def problems(tmp_path):
    return TASK.read(write_rows(tmp_path / "rows.jsonl", ROWS), HumanEvalSettings())


def said(monkeypatch, *texts: str) -> list:
    asked = []

    def answers(subject, prompts, settings):
        asked.append((prompts, settings))
        return [Generation((), text, "stop") for text in texts]

    monkeypatch.setattr(humaneval, "answers_to", answers)
    return asked


def test_solutions_pass_and_others_do_not(subject, problems, monkeypatch):
    asked = said(monkeypatch, RIGHT[0], "    return word\n")
    result = TASK.measure(subject, problems, HumanEvalSettings())
    assert result.figures["pass@1"].value == 0.5 and result.each["pass@1"] == [1.0, 0.0]
    assert [(s["task_id"], s["how"], s["detail"]) for s in result.samples] == [
        ("Own/0", "passed", ""), ("Own/1", "failed", "AssertionError: "),
    ]  # fmt: skip
    ((prompts, settings),) = asked
    assert [subject.tokenizer.decode(prompt) for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert settings.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint") and settings.temperature == 0
    assert result.stated["confined_by"][0] in ("seccomp filter", "audit hook")


def test_several_samples(subject, problems, monkeypatch):
    loop = "    while True: pass\n"
    said(
        monkeypatch, RIGHT[0], RIGHT[0], "    return 3\n", loop, RIGHT[1], "    return word + word\n", loop, "    ret\n"
    )
    settings = HumanEvalSettings(samples=4, k=(1, 2), temperature=0.8, seconds=1)
    result = TASK.measure(subject, problems, settings)
    found = {name: figure.value for name, figure in result.figures.items()}
    assert found["pass@1"] == pytest.approx(0.5) and found["pass@2"] == pytest.approx(by_counting(4, 2, 2))
    assert found["timed_out"] == 0.25 and result.each["pass@2"] == pytest.approx([5 / 6, 5 / 6])
    assert (found["unique"], found["unique_passing"], found["unique_failing"]) == (3.5, 1.5, 2.0)
    assert found["distinct_2"] == pytest.approx(9 / 13)  # pairs of words, counted by hand


def test_a_completion_that_ends_the_process_early_has_not_passed(subject, problems, monkeypatch):
    said(monkeypatch, "    import os\n    os._exit(0)\n", "    raise SystemExit(0)\n")
    assert TASK.measure(subject, problems, HumanEvalSettings()).figures["pass@1"].value == 0


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (f"Here it is:\n```python\n{ROWS[0]['prompt']}{RIGHT[0]}```\nIt takes the largest.", True),
        ("```\ndef largest(numbers):\n    return sorted(numbers)[-1]\n```", True),
        ("```py\n    return max(numbers)\n```", True),
        ("    return max(numbers)\n", True),
        ("```python\ndef largest(numbers):\n    return max(numbers)\n", True),  # cut before its end
        ("def largest(numbers):\n    return max(numbers)", True),
        ("```python\ndef smallest(numbers):\n    return max(numbers)\n```", False),
        ("It returns the largest number.", False),
    ],
)
def test_the_code_of_a_chat_answer(answer, passes, problems):
    source = program(problems[0], completion_of(answer))
    assert humaneval.run_programs([source])[0].passed is passes


def test_asked_in_the_template(subject, problems, monkeypatch):
    asked = said(monkeypatch, *(f"```python\n{row['prompt']}{row['canonical_solution']}```" for row in ROWS))
    result = TASK.measure(subject, problems, HumanEvalSettings(template=True))
    assert result.figures["pass@1"].value == 1
    text = subject.tokenizer.decode(asked[0][0][0], skip_special=False)
    assert "<|im_start|>user\nComplete this Python function." in text and ROWS[0]["prompt"].rstrip() in text


def test_the_model_itself_completes(subject, problems):
    settings = HumanEvalSettings(max_new_tokens=4, samples=2, temperature=1.0)
    result = TASK.measure(subject, problems, settings)
    assert len(result.samples) == 4 and 0 <= result.figures["pass@1"].value <= 1
    again = TASK.measure(subject, problems, settings)
    assert [s["completion"] for s in again.samples] == [s["completion"] for s in result.samples]


def test_rows_as_published_packed(tmp_path):
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert [p.task_id for p in TASK.read(packed, HumanEvalSettings())] == ["Own/0", "Own/1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "rows.jsonl:1: has no text under 'test'"),
        ({"entry_point": "a(); b"}, "rows.jsonl:1: entry_point 'a.*' is no name of a function"),
    ],
)
def test_a_bad_row_is_named(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        TASK.read(write_rows(tmp_path / "rows.jsonl", [{**ROWS[0], **change}]), HumanEvalSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": (2,)}, "each should be from 1 to samples=1"),
        ({"samples": 4}, "with temperature=0 they would all be the same"),
        ({"samples": 0}, "samples"),
        ({"memory": 1}, "memory"),
        ({"shots": 1}, "unknown key"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate_section(HumanEvalSettings, settings, "humaneval")
