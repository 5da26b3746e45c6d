"""The last k layers: which weights are trained, their counts, and how far down the backward goes."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, build, disturb, examples, logits_of, run_packs, sample_row
from torch import nn

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.last_layers import LastLayersSettings
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.data.pack import plan_packs
from tunesmith.errors import AdapterError
from tunesmith.model.llama import Llama
from tunesmith.model.shapes import shape

DEEP = replace(TINY, num_hidden_layers=4, qkv_bias=True, tie_word_embeddings=False)
LAYER_7B = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, LAYER_7B + 4096),
        ({"layers": 4, "norm": False}, 4 * LAYER_7B),
        ({"layers": 2, "head": True}, 2 * LAYER_7B + 4096 + 32000 * 4096),
        ({"layers": 32, "head": True}, 6_738_415_616 - 32000 * 4096),
    ],
)
def test_counts_on_llama_7b(settings: dict, count: int) -> None:
    with torch.device("meta"):
        model = Llama(shape("llama-7b"))
    names = list(find_method("last_layers").unfreeze(model, LastLayersSettings(**settings)))
    assert len(set(names)) == len(names)
    assert sum(model.get_parameter(name).numel() for name in names) == count


def test_what_is_trained_is_the_top() -> None:
    model = build(DEEP)
    attach(model, {"kind": "lora", "target_modules": ["q_proj"]}, name="other")
    adapter = attach(model, {"kind": "last_layers", "layers": 2})
    base = dict(build(DEEP).named_parameters())
    expected = {name for name in base if name.startswith(("model.layers.2.", "model.layers.3.", "model.norm."))}
    assert set(adapter.trainable) == expected and any(name.endswith("q_proj.bias") for name in expected)


def test_the_backward_ends_at_the_lowest_of_them() -> None:
    model = build(DEEP)
    adapter = attach(model, {"kind": "last_layers", "layers": 1})
    seen = []

    class Spy(nn.Module):
        def forward(self, value: torch.Tensor, *_: object) -> torch.Tensor:
            seen.append(value.requires_grad)
            return value

    for block in model.model.layers:
        block.resid["spy"] = Spy()
    run_packs(model, plan_packs(examples(), budget=10_000), adapter)
    assert seen == [False, False, False, True]


def test_a_tied_head_takes_the_embedding_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adapter = attach(build(), {"kind": "last_layers", "head": True})
    assert "model.embed_tokens.weight" in adapter.trainable and "the embedding is trained as well" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        untied = attach(build(DEEP), {"kind": "last_layers", "head": True})
    assert "lm_head.weight" in untied.trainable and not caplog.text


def test_more_layers_than_there_are() -> None:
    with pytest.raises(AdapterError, match="3 of the last layers, and this model has 2"):
        attach(build(), {"kind": "last_layers", "layers": 3})


def test_saved_and_loaded(tmp_path) -> None:
    model = build(dtype=torch.float32)
    adapter = attach(model, {"kind": "last_layers", "head": True})
    disturb(adapter)
    save_adapter(tmp_path, adapter, base="base", identity={})
    fresh = build(dtype=torch.float32)
    load_adapter(tmp_path, fresh)
    assert torch.equal(logits_of(fresh, *sample_row()), logits_of(model, *sample_row()))
