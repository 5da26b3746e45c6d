"""The real model: what the cached steps chose is what one plain pass over the whole text would choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.data.encode import encode_prompt
from tunesmith.data.templates import get_template
from tunesmith.inference import ChatSession, GenerationSettings, generate, prompt_row, score_continuations
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.smollm2

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea and the wind."]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Llama, Tokenizer]:
    return load_model(smollm2_gguf, dtype=torch.float32), load_tokenizer(smollm2_gguf)


def logits_after(model: Llama, row: list[int], positions: range) -> torch.Tensor:
    layout = Layout.single(len(row))
    with torch.inference_mode():
        hidden = model(torch.tensor(row), layout)
        return model.logits(hidden[positions.start : positions.stop], model.context(layout))


def test_greedy_is_the_argmax_of_a_full_pass(smollm2) -> None:
    model, tokenizer = smollm2
    template = get_template("chat", tokenizer)
    prompts = [encode_prompt(prompt_row(q), template, tokenizer) for q in QUESTIONS]
    settings = GenerationSettings(max_new_tokens=64)
    results = generate(model, prompts, settings, eos_ids=tokenizer.eos_ids, tokenizer=tokenizer)
    assert "Paris" in results[0].text
    assert results[0].finish_reason == "eos"
    for prompt, result in zip(prompts, results, strict=True):
        first = len(prompt) - 1
        logits = logits_after(model, [*prompt, *result.ids], range(first, first + len(result.ids)))
        chosen = logits.gather(1, torch.tensor(result.ids)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-3  # fp32 ties aside, the argmax
        assert (
            logits.argmax(-1).tolist() == list(result.ids) or (logits.argmax(-1) != torch.tensor(result.ids)).sum() < 2
        )


def test_labels_are_scored_as_a_full_pass_does(smollm2) -> None:
    model, tokenizer = smollm2
    prompts = [tokenizer.encode(t) for t in ("The film was wonderful. It is", "The film was a bore. It is")]
    options = [tokenizer.encode(t) for t in (" positive", " negative", " a waste of time")]
    scores = score_continuations(model, prompts, [options, options])
    for prompt, got in zip(prompts, scores, strict=True):
        for option, score in zip(options, got.tolist(), strict=True):
            first = len(prompt) - 1
            chances = logits_after(model, [*prompt, *option], range(first, first + len(option))).log_softmax(-1)
            expected = sum(chances[i, token].item() for i, token in enumerate(option))
            assert score == pytest.approx(expected, abs=1e-3)
    assert scores[0][0] - scores[0][2] > scores[1][0] - scores[1][2]


def test_a_second_turn_feeds_little(smollm2) -> None:
    model, tokenizer = smollm2
    session = ChatSession(model, tokenizer, get_template("chat", tokenizer), GenerationSettings(max_new_tokens=12))
    "".join(session.say(QUESTIONS[0]))
    held = len(session._held)
    "".join(session.say("And of Italy?"))
    row = encode_prompt(prompt_row(QUESTIONS[0]), session.template, tokenizer)
    assert held > len(row)
    assert session._held[: held - 1][: len(row)] == row
    assert "Rome" in session.messages[-1]["content"]
