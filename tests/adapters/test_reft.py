"""ReFT against its formula on transformers' model, at positions by hand; orthonormal rows; counts; files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.adapters.exchange import SIZES, our_logits, save
from tests.laws.peers import twin_models, wide_norms
from tests.laws.small import build, disturb, examples, logits_of, packs_of, relative, run_packs, sample_row
from tests.model.checkpoints import reference
from torch import Tensor

from tunesmith.adapters import attach
from tunesmith.adapters.peft_format import load_adapter
from tunesmith.adapters.reft import ends_of_prompts
from tunesmith.data.encode import Example
from tunesmith.errors import AdapterError, ConfigError, ModelError
from tunesmith.export.counts import count
from tunesmith.model.cache import Cache
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_model
from tunesmith.train.loss import plain_loss

# tokens of the prompt -> which of them are edited first and last, with first_positions 3 and last_positions 2
PLACES = {
    1: ([], [0]),
    2: ([0], [1]),
    3: ([0], [1, 2]),
    4: ([0, 1], [2, 3]),
    5: ([0, 1, 2], [3, 4]),
    6: ([0, 1, 2], [4, 5]),
    11: ([0, 1, 2], [9, 10]),
}
SPEC = {"kind": "reft", "rank": 3, "first_positions": 3, "last_positions": 2}


def gram_schmidt(matrix: Tensor) -> Tensor:
    """Row by row, as in a textbook."""
    rows: list[Tensor] = []
    for row in matrix.detach():
        rest = row - sum((row @ done) * done for done in rows)
        rows.append(rest / rest.norm())
    return torch.stack(rows)


FORMULAS = {  # of one hidden state, as the paper writes them
    "loreft": lambda h, W, b, V: h + gram_schmidt(V).T @ (W @ h + b - gram_schmidt(V) @ h),
    "noreft": lambda h, W, b, V: h + V.T @ (W @ h + b - V @ h),
    "direft": lambda h, W, b, V: h + V.T @ (W @ h + b),
}


def edited(theirs: Any, adapter: Any, ids: list[int], chosen: dict[str, list[int]]) -> Tensor:
    """Logits of transformers' model, hidden states edited one by one after each layer."""
    variant = adapter.settings.variant

    def hook(layer: int) -> Any:
        def edit(module: Any, given: Any, out: Tensor) -> Tensor:
            new = out.clone()
            for part, positions in chosen.items():
                place = f"model.layers.{layer}.resid.edits.{part}"
                if f"{place}.source" in adapter.trainable:
                    W, b, V = (adapter.trainable[f"{place}.{name}"] for name in ("source", "bias", "basis"))
                    for position in positions:
                        new[0, position] = FORMULAS[variant](out[0, position], W, b, V)
            return new

        return edit

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(theirs.model.layers)]
    try:
        with torch.no_grad():
            return theirs(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", FORMULAS)
def test_formula_at_positions_by_hand(variant: str, tied: bool) -> None:
    """Prompts of every length, packed together with what they share, against one pass of transformers each."""
    draw = np.random.default_rng(0)
    begin = draw.integers(0, 61, 11)
    some = []
    for size in PLACES:
        ids = np.concatenate([begin[:size], draw.integers(0, 61, 4)])
        some += [Example(ids.astype(np.int32), np.arange(size + 4) >= size, str(size))] * 2
    with wide_norms():
        ours, theirs = twin_models(tf.LlamaConfig(**SIZES, tie_word_embeddings=False), torch.float64)
        adapter = attach(ours, {**SPEC, "variant": variant, "tied": tied})
        disturb(adapter)
        (pack,) = packs_of(ours, some)
        assert len(pack.tokens) < sum(len(e.ids) for e in some)
        logits = logits_of(ours, pack.tokens, pack.layout)
        for index, rows in zip(pack.examples, pack.rows, strict=True):
            first, last = PLACES[int(some[index].source)]
            chosen = {"both": first + last} if tied else {"first": first, "last": last}
            expected = edited(theirs, adapter, some[index].ids.tolist(), chosen)
            assert relative(logits[torch.from_numpy(rows)], expected) < 1e-12, some[index].source
            assert relative(edited(theirs, adapter, some[index].ids.tolist(), {}), expected) > 1e-3


def test_every_answer_of_a_conversation_has_its_prompt() -> None:
    """All before it, edited at its own ends only: as it is when the answer is generated."""
    ids = list(range(5, 19))
    told = np.isin(np.arange(14), [5, 6, 11, 12, 13])
    with wide_norms():
        ours, theirs = twin_models(tf.LlamaConfig(**SIZES, tie_word_embeddings=False), torch.float64)
        adapter = attach(ours, SPEC)
        disturb(adapter)
        (pack,) = packs_of(ours, [Example(np.array(ids, np.int32), told, "")])
        logits = logits_of(ours, pack.tokens, pack.layout)
        assert pack.examples == (0, 0) and sorted(pack.target.tolist()) == [10, 11, 16, 17, 18]
        for rows in pack.rows:
            last = {7: [3, 4], 14: [9, 10]}[len(rows)]
            expected = edited(theirs, adapter, ids[: len(rows)], {"first": [0, 1, 2], "last": last})
            assert relative(logits[torch.from_numpy(rows)], expected) < 1e-12


@pytest.mark.parametrize("size", PLACES)
def test_which_tokens_are_edited(size: int) -> None:
    first, last = PLACES[size]
    ends = [size - i if size - i <= 5 else 0 for i in range(size)] + [-1] * 3
    found = ends_of_prompts(torch.arange(size + 3), torch.tensor(ends), 3, 2)
    assert [part.nonzero()[:, 0].tolist() for part in found] == [first, last]


def test_one_end_alone_is_not_halved() -> None:
    position, ends = torch.arange(6), torch.tensor([3, 2, 1, -1, -1, -1])
    for first, last, expected in ((4, 0, ([0, 1, 2], [])), (0, 4, ([], [0, 1, 2]))):
        found = ends_of_prompts(position, ends, first, last)
        assert tuple(part.nonzero()[:, 0].tolist() for part in found) == expected


def test_rows_stay_orthonormal_through_training() -> None:
    model = build(dtype=torch.float32)
    adapter = attach(model, {**SPEC, "rank": 5})
    bases = {name: p.detach() for name, p in adapter.trainable.items() if name.endswith(".basis")}
    start = {name: p.clone() for name, p in bases.items()}
    optimizer = torch.optim.AdamW(list(adapter.trainable.values()), lr=0.3, weight_decay=0.1)
    packs = packs_of(model, examples())
    losses = []
    for _ in range(8):
        losses.append(run_packs(model, packs, adapter)[0])
        optimizer.step()
        free = max(float((p @ p.T - torch.eye(5)).abs().max()) for p in bases.values())
        adapter.after_step()
        held = max(float((p @ p.T - torch.eye(5)).abs().max()) for p in bases.values())
        assert held < 1e-6 < 0.1 < free, "without the step's end they would not be"
    assert all(not torch.allclose(p, start[name], atol=0.1) for name, p in bases.items())
    assert losses[-1] < losses[0]


def test_an_orthonormal_matrix_is_its_own_rotation() -> None:
    """So what is trained is what is used, and a step's end changes nothing of what the model computes."""
    model = build()
    adapter = attach(model, SPEC)
    disturb(adapter)
    (pack,) = packs_of(model, examples())
    before = logits_of(model, pack.tokens, pack.layout)
    adapter.after_step()
    assert torch.allclose(logits_of(model, pack.tokens, pack.layout), before, rtol=0, atol=1e-12)
    held = adapter.trainable["model.layers.0.resid.edits.first.basis"].detach().clone()
    assert torch.allclose(held, gram_schmidt(held), atol=1e-14)


def test_the_start() -> None:
    adapter = attach(build(), {**SPEC, "rank": 8})
    edit = adapter.deltas["model.layers.0.resid"].edits["first"]
    assert torch.allclose(edit.basis @ edit.basis.T, torch.eye(8, dtype=torch.float64), atol=1e-6)
    bound = 24**-0.5  # torch.nn.Linear's
    assert 0.5 * bound < edit.source.abs().max() <= bound and 0 < edit.bias.abs().max() <= bound


def test_steps_of_generation_cost_nothing() -> None:
    model = build()
    adapter = attach(model, SPEC)
    disturb(adapter)
    tokens, _ = sample_row()
    cache = Cache(model.config, 1, 20, torch.float64)
    with torch.no_grad():
        model(tokens[:2], Layout.of([2], answer_ends=np.array([2, 1])), cache=cache)
        ctx = model.context(Layout.single(1), cache)
        value = torch.randn(1, 24, dtype=torch.float64)
        assert adapter.deltas["model.layers.0.resid"](value, None, ctx, None) is value


def test_the_last_layer_edits_last_tokens_only() -> None:
    """What stands at first tokens there has no gradient: nothing reads it."""
    model = build()
    adapter = attach(model, {**SPEC, "tied": True})
    disturb(adapter)
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, value: Tensor, *_: Any) -> Tensor:
            value.register_hook(lambda grad: seen.append(grad))
            return value

    model.model.layers[1].resid["spy"] = Spy()
    draw = np.random.default_rng(1)
    (pack,) = packs_of(model, [Example(draw.integers(0, 61, 12).astype(np.int32), np.arange(12) >= 9, "")])
    run_packs(model, [pack], adapter, plain_loss)  # pack_loss would run the last block for 8, 9 and 10 alone
    assert seen[0].abs().sum(1).gt(0).nonzero()[:, 0].tolist() == [8, 9, 10]
    assert set(attach(model, SPEC, "b").deltas["model.layers.1.resid"].edits) == {"last"}


def test_saved_in_our_own_format(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, {**SPEC, "layers_to_transform": [0, 2]})
    disturb(adapter)
    before = probe(model)
    save(adapter, tmp_path / "ours")
    assert not (tmp_path / "ours/adapter_config.json").exists()
    shapes = {k: list(t.shape) for k, t in load_file(tmp_path / "ours/adapter.safetensors").items()}
    assert len(shapes) == 3 * 3 and shapes["model.layers.2.resid.edits.last.basis"] == [3, 64]
    again = load_model(tmp_path / "base")
    load_adapter(tmp_path / "ours", again)
    assert torch.equal(probe(again), before)
    with pytest.raises(ModelError, match="does not say where prompts end"):
        our_logits(again)


def probe(model: Any) -> Tensor:
    (pack,) = packs_of(model, examples())
    return logits_of(model, pack.tokens, pack.layout)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        # 2 r d + r a place: rank 4 and d = 4096 are 32,772
        ("llama-7b", {"tied": True, "layers_to_transform": [3, 9, 18, 24]}, 4 * 32_772),
        ("llama-7b", {"layers_to_transform": [3, 9, 18, 24]}, 8 * 32_772),
        ("llama-7b", {}, 63 * 32_772),  # the last layer has one place
        ("llama-7b", {"variant": "direft", "first_positions": 0}, 32 * 32_772),
    ],
)
def test_count(model: str, settings: dict, expected: int) -> None:
    assert count(model, "reft", settings)["trainable_parameters"] == expected


@pytest.mark.parametrize(("model", "percent"), [("llama-7b", 0.031), ("llama-13b", 0.025)])
def test_count_is_the_papers(model: str, percent: float) -> None:
    """Rank 8, all layers, tied: 0.031% of LLaMA-7B and 0.025% of LLaMA-13B."""
    found = count(model, "reft", {"rank": 8, "tied": True, "first_positions": 7, "last_positions": 7})
    assert round(100 * found["trainable_parameters"] / found["base_parameters"], 3) == percent


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"first_positions": 0, "last_positions": 0}, "both 0, so there is nothing to edit"),
        ({"rank": 25}, "25 dimensions of a hidden size of 24"),
        ({"layers_to_transform": [2]}, "no layer 2; this model has layers 0 to 1"),
        ({"layers_to_transform": [1], "last_positions": 0}, "layer 1 is the last: nothing reads"),
        ({"layers_to_transform": []}, "selects no layer"),
        ({"variant": "lobireft"}, "variant"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {"kind": "reft", **spec})
