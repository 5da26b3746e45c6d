"""Settings refuse what would be ignored; each step on logits equals transformers' LogitsProcessor."""

from __future__ import annotations

import pytest
import torch
import transformers.generation.logits_process as reference

from tunesmith.errors import GenerationError
from tunesmith.inference import sample
from tunesmith.inference.sample import GenerationSettings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beams": 4, "temperature": 0.7}, "temperature=0.7 has no effect with beams=4"),
        ({"beams": 4, "top_k": 5}, "top_k=5 has no effect with beams=4"),
        ({"beams": 4, "top_p": 0.9}, "top_p=0.9 has no effect with beams=4"),
        ({"beams": 4, "min_p": 0.1}, "min_p=0.1 has no effect with beams=4"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect with temperature=0"),
        ({"top_k": 9}, "top_k=9 has no effect with temperature=0"),
        ({"min_p": 0.1}, "min_p=0.1 has no effect with temperature=0"),
        ({"length_penalty": 0.5}, "length_penalty=0.5 has no effect with beams=1"),
        ({"n": 3}, "n=3 answers would all be the same with temperature=0"),
        ({"n": 3, "beams": 2}, "n=3 is more than beams=2"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature=nan: must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p=-0.1: must be from 0 to 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be a whole number of at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be"),
        ({"beams": 0}, "beams=0: must be"),
        ({"stop": ("",)}, "stop=('',): must be a sequence of non-empty strings"),
        ({"stop": "abc"}, "stop='abc': must be a sequence"),
        ({"seed": -1}, "seed=-1: must be"),
    ],
)
def test_inconsistent_settings_are_refused_by_name(values: dict, said: str) -> None:
    with pytest.raises(GenerationError) as error:
        GenerationSettings(**values)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_consistent_settings_are_accepted() -> None:
    GenerationSettings()
    GenerationSettings(beams=4, n=4, length_penalty=0.0)
    GenerationSettings(
        temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, n=8, seed=0, stop=("\n",), repetition_penalty=0.9
    )


def test_an_unknown_setting_is_named_with_the_nearest() -> None:
    with pytest.raises(GenerationError, match="unknown setting 'temprature'; did you mean 'temperature'"):
        GenerationSettings().changed(temprature=1.0)
    assert GenerationSettings().changed(temperature=1.0).temperature == 1.0


@pytest.fixture
def logits() -> torch.Tensor:
    values = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 3
    values[0, 10:20] = values[0].max()  # ties at the top
    values[1] = 0.0  # all equal
    return values


IDS = torch.zeros(7, 0, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 3, 50, 80])
def test_top_k(logits: torch.Tensor, k: int) -> None:
    assert torch.equal(sample.keep_top_k(logits, k), reference.TopKLogitsWarper(k)(IDS, logits))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(sample.keep_top_p(logits, p), reference.TopPLogitsWarper(p)(IDS, logits))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(sample.keep_min_p(logits, p), reference.MinPLogitsWarper(p)(IDS, logits))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(logits: torch.Tensor, penalty: float) -> None:
    ids = torch.randint(0, 50, (7, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(7, 50, dtype=torch.bool).scatter_(1, ids, True)
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(sample.penalize_repetition(logits, seen, penalty), expected)


def test_the_whole_chain_has_the_order_of_transformers(logits: torch.Tensor) -> None:
    ids = torch.randint(0, 50, (7, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(7, 50, dtype=torch.bool).scatter_(1, ids, True)
    settings = GenerationSettings(temperature=0.6, top_k=20, top_p=0.8, min_p=0.03, repetition_penalty=1.4)
    expected = reference.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone())
    for step in (
        reference.TemperatureLogitsWarper(0.6),
        reference.TopKLogitsWarper(20),
        reference.TopPLogitsWarper(0.8),
        reference.MinPLogitsWarper(0.03),
    ):
        expected = step(ids, expected)
    assert torch.equal(sample.process(logits, settings, seen), expected)


def test_the_draw_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    generator = sample.generator_for(5, 0)
    settings = GenerationSettings(temperature=1.0)
    draws = torch.cat([sample.choose(logits, settings, [generator]) for _ in range(20000)])
    share = torch.bincount(draws, minlength=5) / len(draws)
    assert share[2] == 0
    assert torch.allclose(share, logits.softmax(-1)[0], atol=0.015)  # four standard deviations


def test_a_seed_fixes_a_row_whatever_stands_beside_it() -> None:
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(2))
    settings = GenerationSettings(temperature=1.0)
    together = sample.choose(logits, settings, [sample.generator_for(9, i) for i in range(6)])
    alone = [sample.choose(logits[i : i + 1], settings, [sample.generator_for(9, i)]).item() for i in range(6)]
    assert together.tolist() == alone
    assert len(set(alone)) > 3  # answers to one prompt differ


def test_a_token_of_no_probability_is_never_drawn(monkeypatch) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    settings = GenerationSettings(temperature=1.0)
    for uniform, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):  # the ends of the range, and a boundary
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor([u], dtype=torch.float64))
        assert sample.choose(logits, settings, [torch.Generator()]).tolist() == [token]
