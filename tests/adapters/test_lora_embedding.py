"""LoRA on the token embedding: its formula and start, whose rows it edits, files both ways, merging."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tests.adapters.exchange import check_merged, check_ours, check_theirs, our_logits
from tests.laws.small import VOCAB, build, disturb, logits_of, sample_row
from tests.model.checkpoints import reference

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.lora import EmbeddingDelta, LoRASettings
from tunesmith.export.merge import merged_weights
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

PLACE = "model.embed"
ONE = {"kind": "lora", "rank": 3, "alpha": 5, "target_modules": ["embed_tokens"]}


def embedded(model: Llama, ids: list[int], adapters: tuple[str, ...] | None = None) -> torch.Tensor:
    ctx = model.context(sample_row()[1], adapters=adapters)
    return model.embedded(torch.tensor(ids), ctx)


def test_formula() -> None:
    model = build()
    adapter = attach(model, ONE)
    disturb(adapter)
    delta = adapter.deltas[PLACE]
    ids = torch.tensor([3, 60, 3, 0])
    changed = model.model.embed_tokens.weight + 5 / 3 * (delta.B @ delta.A).T
    assert torch.allclose(embedded(model, ids.tolist()), changed[ids], atol=1e-14)
    assert torch.equal(embedded(model, ids.tolist(), ()), model.model.embed_tokens.weight[ids])


def test_starts_at_zero_and_normal() -> None:
    delta = attach(build(), {**ONE, "rank": 100}).deltas[PLACE]
    assert isinstance(delta, EmbeddingDelta) and delta.A.shape == (100, VOCAB) and delta.B.shape == (24, 100)
    assert not delta.A.any() and delta.B.std().item() == pytest.approx(1, rel=0.05)


def test_count() -> None:
    """r (vocabulary + hidden) for LLaMA-7B's embedding, 2 r hidden for each q_proj."""
    with torch.device("meta"):
        model = Llama(shape("llama-7b"))
    placed = find_method("lora").place(model, LoRASettings(rank=16, target_modules=["embed_tokens", "q_proj"]))
    assert sum(p.numel() for one in placed for p in one.delta.parameters()) == 16 * (32_000 + 4096) + 32 * 16 * 8192


def test_rows_that_are_no_tokens_are_left_alone() -> None:
    """Virtual and infix tokens have ids below 0; their rows are another method's."""
    model = build()
    adapter = attach(model, ONE)
    disturb(adapter)
    value = torch.zeros(4, 24, dtype=torch.float64)
    ctx = model.context(sample_row()[1])
    out = adapter.deltas[PLACE](value, model.model, ctx, torch.tensor([-(1 << 30), 5, -1, 5]))
    assert not out[[0, 2]].any() and torch.equal(out[1], out[3]) and out[1].any()


def test_routed_to_some_segments_only() -> None:
    """The embedding's seam is called on the whole row: a delta in it must itself spare the others' tokens."""
    model = build()
    disturb(attach(model, ONE, name="mine"))
    tokens, layout = sample_row()
    ctx = model.context(layout, routes=[("mine",), ("mine",), ("mine",), ()])
    with torch.no_grad():
        rows = model.embedded(tokens, ctx)
        plain = model.embedded(tokens, model.context(layout, adapters=()))
    changed = (rows != plain).any(1)
    assert changed[:23].all() and not changed[23:].any()


TARGETS = {
    "alone": ["embed_tokens"],
    "and others": ["embed_tokens", "q_proj", "lm_head"],
    "by regular expression": r"(model\.embed_tokens|.*v_proj)",
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_ours_in_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    """A tied head stays the base's, in PEFT as here."""
    check_ours({"kind": "lora", "rank": 4, "rslora": True, "target_modules": TARGETS[name]}, tmp_path, family)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_theirs_here_and_back(name: str, family: str, tmp_path: Path) -> None:
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=TARGETS[name], rank_pattern={"embed_tokens": 3}
    )
    check_theirs(options, tmp_path, family)


def test_merged_as_peft_merges(tmp_path: Path) -> None:
    check_merged(peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"]), 4, tmp_path)


def test_merging_unties_the_head(tmp_path: Path) -> None:
    """The head keeps the base's weight, and the merged model computes what the adapter did."""
    reference("llama-tied").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, ONE)
    disturb(adapter)
    tensors, _, config = merged_weights(model, adapter, torch.float32)
    assert not config.tie_word_embeddings
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    plain = Llama(config)
    plain.load_state_dict(tensors)
    assert (our_logits(plain) - our_logits(model)).abs().max() < 1e-5 * our_logits(model).abs().max()
    assert not torch.equal(logits_of(model, *sample_row()), logits_of(model, *sample_row(), ()))
