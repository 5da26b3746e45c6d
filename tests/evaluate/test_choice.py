"""The options chosen are those of a plain pass of transformers over every question with every option."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import edit_weights, write_base

from tunesmith import api
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError
from tunesmith.evaluate.calibration import calibration_error
from tunesmith.evaluate.choice import ChoiceSettings, Question, _result, encode_pair, measure, question, with_examples
from tunesmith.evaluate.figures import mean, share
from tunesmith.evaluate.subject import Subject

QUESTIONS = [
    question("a:1", "Question: What is a film?\nAnswer:", ["a joy", "a mess without a plot", "dull"], 0, strata=("X",)),
    question("a:2", "Question: What is a year?\nAnswer:", ["the end", "naïve café", "warm and funny"], 1),
    question("a:3", "The worst film of the", ["year", "plot and the end of it all"], 1, strata=("X", "Y")),
    Question("a:4", ("A joy in", "A mess in"), (" the film.", " the film."), ("the film.", "the film."), 0),
    question("a:5", "ends in a space ", ["and more", "long"], 0, strata=("Y",)),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("choice") / "tiny", max_position_embeddings=96)
    edit_weights(folder, lambda tensors: [t.mul_(3) for name, t in tensors.items() if "norm" not in name])
    return folder


@pytest.fixture(scope="module")
def subject(base) -> Subject:
    loaded = api.load(str(base), dtype="float32", device="cpu")
    return Subject(loaded.model, loaded.tokenizer, get_template("chat", loaded.tokenizer))


@pytest.fixture(scope="module")
def theirs(base):
    """Log-probability of a continuation, from transformers and its tokenizer, by the harness's way of cutting."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    @torch.no_grad()
    def score(context: str, continuation: str) -> float:
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        ids = torch.tensor([whole[-97:]])
        chances = model(ids[:, :-1]).logits[0].log_softmax(-1)
        return float(chances.gather(1, ids[0, 1:, None])[-(len(whole) - before) :].sum())

    return score


def test_choices_equal_transformers(subject, theirs):
    found = measure(subject, QUESTIONS, ChoiceSettings())
    scores = [[theirs(c, o) for c, o in zip(q.contexts, q.continuations, strict=True)] for q in QUESTIONS]
    for sample, expected in zip(found.samples, scores, strict=True):
        np.testing.assert_allclose(sample["scores"], expected, rtol=1e-4)
    lengths = {
        "acc": [[1] * len(q.choices) for q in QUESTIONS],
        "acc_norm": [[len(c) for c in q.choices] for q in QUESTIONS],
        "acc_bytes": [[len(c.encode()) for c in q.choices] for q in QUESTIONS],
    }
    for name, sizes in lengths.items():
        chosen = [int(np.argmax(np.array(s) / np.array(n))) for s, n in zip(scores, sizes, strict=True)]
        assert [sample[name] for sample in found.samples] == chosen
        right = [c == q.answer for c, q in zip(chosen, QUESTIONS, strict=True)]
        assert found.figures[name].value == sum(right) / 5 and list(found.each[name]) == right
    assert [s["acc"] for s in found.samples] != [s["acc_norm"] for s in found.samples]
    confidence = [max(np.exp(s - np.logaddexp.reduce(s))) for s in map(np.array, scores)]
    assert found.figures["ece"].value == pytest.approx(their_ece(confidence, found.each["acc"]), rel=1e-3)
    acc = found.each["acc"]
    assert found.figures["acc.X"].value == (acc[0] + acc[2]) / 2 and found.figures["acc.X"].count == 2
    assert found.figures["acc.Y"].value == (acc[2] + acc[4]) / 2
    assert found.stated["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 2 + 1 / 2) / 5)
    assert found.stated["ece_bins"] == 15 and found.stated["truncated"] == 0


def test_lengths_are_characters_and_bytes():
    one = question("a:1", "Q", ["aaaa", "\u00e9\u00e9\u00e9"], 1)
    found = _result([one], [torch.tensor([-4.0, -3.6], dtype=torch.float64)], ChoiceSettings(), 0)
    # -4 and -3.6; -4/4 and -3.6/3; -4/4 and -3.6/6
    assert [found.figures[name].value for name in ("acc", "acc_norm", "acc_bytes")] == [1, 0, 1]


def test_options_of_one_length_need_no_norm(subject):
    found = measure(subject, [QUESTIONS[3]], ChoiceSettings())
    assert list(found.figures) == ["acc", "ece"]


def test_what_is_too_long_loses_its_beginning(subject, theirs):
    long = question("a:9", "the film is " * 60 + "The end is", ["warm", "a mess of a film"], 0)
    found = measure(subject, [long, QUESTIONS[0]], ChoiceSettings())
    assert found.stated["truncated"] == 2 and found.notes == [
        "2 options were cut at their beginning to fit the model's context"
    ]
    expected = [theirs(long.contexts[0], option) for option in long.continuations]
    np.testing.assert_allclose(found.samples[0]["scores"], expected, rtol=1e-4)


def test_what_questions_share_is_computed_once(subject):
    shots = [question("b:1", "Question: Is a film dull and far too long?\nAnswer:", ["no", "yes"], 1)] * 1
    questions = [
        question(f"c:{n}", f"Question: Is {word} a joy from start to end?\nAnswer:", ["no", "yes"], 0)
        for n, word in enumerate(("film", "plot", "year", "mess"))
    ]
    with_shots = with_examples(questions, shots, 1, lambda group: "")
    alone = [measure(subject, [one], ChoiceSettings()).samples[0]["scores"] for one in with_shots]
    fed = []
    run = subject.model.run
    subject.model.run = lambda tokens, ctx: (fed.append(len(tokens)), run(tokens, ctx))[1]
    try:
        together = [sample["scores"] for sample in measure(subject, with_shots, ChoiceSettings()).samples]
    finally:
        del subject.model.run
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    encode = subject.tokenizer.encode
    begin = len(encode(with_shots[0].contexts[0])) - len(encode(questions[0].contexts[0]))
    assert sum(fed) <= begin + sum(len(encode(q.contexts[0])) for q in questions) + 8


def test_pairs_are_cut_where_the_context_ends(subject):
    encode = subject.tokenizer.encode
    assert encode_pair(subject.tokenizer, "the film", " is") == (
        encode("the film"),
        encode("the film is")[len(encode("the film")) :],
    )
    context, option = encode_pair(subject.tokenizer, "the film ", "is")
    assert context == encode("the film") and subject.tokenizer.decode(option) == " is"
    context, option = encode_pair(subject.tokenizer, "", "the film")
    assert context == [subject.tokenizer.eos_id] and option == encode("the film")


def test_a_template_asks_as_in_training(subject):
    one = replace(QUESTIONS[0], asked="What is a film?")
    ids = subject.tokenizer.encode
    found = measure(subject, [one], ChoiceSettings(template=True))
    prompt = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt += "<|im_start|>user\nWhat is a film?<|im_end|>\n<|im_start|>assistant\n"
    from tunesmith.inference import score_continuations

    options = [ids(choice) for choice in one.choices]
    (expected,) = score_continuations(subject.model, [ids(prompt, special=True)], [options])
    np.testing.assert_allclose(found.samples[0]["scores"], expected, rtol=1e-5)
    assert found.stated["template"] is True
    with pytest.raises(ConfigError, match="a:4 fills a blank, which no template asks for"):
        measure(subject, [QUESTIONS[3]], ChoiceSettings(template=True))


def their_ece(confidence, right, bins: int = 15) -> float:
    """The equation of arXiv:1706.04599, bin by bin."""
    confidence, right = np.array(confidence), np.array(right, float)
    total = 0.0
    for low, high in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_calibration_error_by_hand():
    # two answers of 0.9 with one right: |0.5 - 0.9|; two of 0.6, both right: |1 - 0.6|
    assert calibration_error([0.9, 0.9, 0.6, 0.6], [True, False, True, True]).value == pytest.approx(0.4)
    assert calibration_error([1.0, 0.0], [True, False]).value == 0
    assert calibration_error([0.9, 0.1], [True, False], bins=1).value == pytest.approx(0)
    # 0.5 ends the first of two bins: (|1 - 0.5| + |0 - 0.6|) / 2
    assert calibration_error([0.5, 0.6], [True, False], bins=2).value == pytest.approx(0.55)
    draw = np.random.default_rng(0)
    confidence = draw.random(2000)
    right = draw.random(2000) < confidence**2
    assert calibration_error(confidence, right).value == pytest.approx(their_ece(confidence, right))


def test_intervals():
    # Wilson's interval of 81 of 263, from Newcombe, Statistics in Medicine 17 (1998), table I
    low, high = share([True] * 81 + [False] * 182).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = share([False] * 20).interval
    assert low == 0 and round(high, 4) == 0.1611
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2 and found.interval == pytest.approx(
        (2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3))
    )
    assert mean([4.0]).interval is None
