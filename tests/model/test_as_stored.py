"""Weights put back into a GGUF file's blocks: the same numbers, the same answers, and never where it would be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.laws.small import logits_of, sample_row
from tests.model.checkpoints import reference, write_gguf

from tunesmith.adapters import attach
from tunesmith.inference import GenerationSettings, generate
from tunesmith.model import native
from tunesmith.model.as_stored import EMBEDDING, HEAD, hold_as_stored
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model

pytestmark = pytest.mark.skipif(native.built()[0] is None, reason=f"NOT TESTED: {native.built()[1]}")
PROMPTS = [[1, 5, 9, 2, 7], [1, 3], [1, 4, 4, 8]]


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    yield
    native.select("auto")


def written(folder: Path, kind: str = "Q4_1", **changes: object) -> Path:
    file = folder / "m.gguf"
    write_gguf(file, reference("llama", **changes), quant=kind)
    return file


def linears(model: Llama) -> dict[str, Linear]:
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_same_numbers_and_the_same_answers(kind: str, tied: bool, tmp_path: Path) -> None:
    file = written(tmp_path, kind, tie_word_embeddings=tied)
    dense, held = load_model(file), load_model(file)
    count = hold_as_stored(held, file)
    assert count == len(linears(held)) == len(linears(dense))
    for name, linear in linears(held).items():
        assert linear.quant is not None
        assert torch.equal(linear.dense_weight(), linears(dense)[name].weight), name
    assert torch.equal(held.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    row = sample_row(dense.config.vocab_size)
    truth, found = logits_of(dense, *row), logits_of(held, *row)
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    settings = GenerationSettings(max_new_tokens=12)
    answers = [[r.ids for r in generate(m, PROMPTS, settings, eos_ids=[])] for m in (dense, held)]
    assert answers[0] == answers[1]


def test_what_was_trained_since_stays_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path)
    model = load_model(file)
    adapter = attach(model, {"kind": "full"})
    with torch.no_grad():
        for parameter in adapter.base.values():
            parameter.mul_(1.5)
    truth = logits_of(model, *(row := sample_row(model.config.vocab_size)))
    assert hold_as_stored(model, file, adapter.base) == 0
    assert torch.equal(logits_of(model, *row), truth)


def test_a_tied_head_goes_with_its_embedding(tmp_path: Path) -> None:
    file = written(tmp_path, tie_word_embeddings=True)
    model = load_model(file)
    changed = [EMBEDDING, "model.layers.0.mlp.up_proj.weight"]
    count = hold_as_stored(model, file, changed)
    left = {name for name, linear in linears(model).items() if linear.quant is None}
    assert left == {HEAD, changed[1]} and count == len(linears(model)) - 2
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_is_done_where_nothing_reads_blocks(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert hold_as_stored(load_model(file, dtype=torch.float16), file) == 0
    native.select("torch")
    assert hold_as_stored(load_model(file), file) == 0
    native.select("auto")
    write_gguf(whole := tmp_path / "whole.gguf", reference("llama"))
    assert hold_as_stored(load_model(whole), whole) == 0  # F32
    assert hold_as_stored(load_model(file), file) > 0


def test_an_adapter_comes_and_acts_on_it(tmp_path: Path) -> None:
    file = written(tmp_path)
    dense, held = load_model(file), load_model(file)
    hold_as_stored(held, file)
    for model in (dense, held):
        adapter = attach(model, {"kind": "lora", "rank": 4, "target_modules": "all-linear"})
        with torch.no_grad():
            for number, parameter in enumerate(adapter.trainable.values()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 4)
    row = sample_row(dense.config.vocab_size)
    truth = logits_of(dense, *row)
    assert (logits_of(held, *row) - truth).abs().max() < 1e-5 * truth.abs().max()
