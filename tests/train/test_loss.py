"""The chunked loss against its autograd twin, wherever a gradient may be wanted."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, build, disturb, examples, relative, run_packs
from torch import Tensor
from torch.nn import functional

from tunesmith.adapters import attach
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.model import llama as llama_module
from tunesmith.model.llama import Llama
from tunesmith.train.loss import pack_loss, plain_loss

loss_module = importlib.import_module("tunesmith.train.loss")
UNTIED = replace(TINY, tie_word_embeddings=False)
SPECS = {
    "head frozen": {"kind": "lora", "target_modules": ["q_proj"]},
    "head edited": {"kind": "lora", "target_modules": ["lm_head", "v_proj"]},
    "head alone": {"kind": "lora", "target_modules": ["lm_head"]},
    "all trained": {"kind": "full"},
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's packs have some 60 targets: let them take several chunks, the last one short."""
    for module in (llama_module, loss_module):
        monkeypatch.setattr(module, "HEAD_ROWS", 17)


def pack() -> Pack:
    (made,) = plan_packs(examples(), budget=10_000)
    assert len(made.where) > 3 * 17 and len(made.where) % 17
    return made


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("spec", SPECS)
def test_chunked_is_plain(spec: str, config) -> None:
    model = build(config)
    adapter = attach(model, SPECS[spec])
    disturb(adapter)
    loss, gradient = run_packs(model, [pack()], adapter)
    twin_loss, twin = run_packs(model, [pack()], adapter, plain_loss)
    assert abs(loss - twin_loss) < 1e-12 * twin_loss and relative(gradient, twin) < 1e-12
    for name, p in adapter.trainable.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_tied_head_collects_both_gradients() -> None:
    """What a tied matrix gets is the sum of what an untied model's embedding and head get."""
    tied, untied = build(TINY), build(UNTIED)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.model.embed_tokens.weight.detach().clone()})
    for model in (tied, untied):
        run_packs(model, [pack()], attach(model, {"kind": "full"}))
    both = untied.model.embed_tokens.weight.grad + untied.lm_head.weight.grad
    assert untied.model.embed_tokens.weight.grad.abs().max() > 0
    assert relative(tied.model.embed_tokens.weight.grad, both) < 1e-12


def scalar_of(model: Llama, made: Pack, hidden: Tensor, loss=pack_loss) -> Tensor:
    return loss(model, made, model.context(made.layout), hidden)


def test_value_is_weighted_cross_entropy() -> None:
    model, made = build(), pack()
    hidden = model.run(made.tokens, model.context(made.layout))
    table = model.model.embed_tokens.weight
    each = functional.cross_entropy((hidden @ table.T)[made.where], made.target, reduction="none")
    assert torch.allclose(scalar_of(model, made, hidden[made.read]), (each * made.weight).sum(), rtol=1e-13)


def test_gradcheck_of_the_hidden_states() -> None:
    model, made = build(), pack()
    hidden = torch.randn(len(made.read), TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: scalar_of(model, made, h), hidden, fast_mode=True)


def test_scale_of_the_incoming_gradient_passes_through() -> None:
    model, made = build(), pack()
    hidden = torch.randn(len(made.read), TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(scalar_of(model, made, hidden), hidden)
    (scaled,) = torch.autograd.grad(scalar_of(model, made, hidden) * 1024 / 7, hidden)
    assert torch.allclose(scaled, once * 1024 / 7, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    model, made = build(dtype=dtype), pack()
    hidden = torch.randn(len(made.read), TINY.hidden_size, dtype=dtype, requires_grad=True)
    loss = scalar_of(model, made, hidden)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.dtype == dtype
    wide = build(dtype=torch.float64)
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact = hidden.detach().double().requires_grad_(True)
    expected = scalar_of(wide, made, exact)
    assert abs(loss.double() - expected) < 5e-3 * expected
    limit = 2e-2 if dtype == torch.bfloat16 else 4e-3
    assert relative(grad.double(), torch.autograd.grad(expected, exact)[0]) < limit


def test_without_targets_the_loss_is_zero_and_so_is_its_gradient() -> None:
    model, made = build(), pack()
    none = replace(made, place=made.place[:0], target=made.target[:0], weight=made.weight[:0])
    hidden = torch.randn(len(made.read), TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    loss = scalar_of(model, none, hidden)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_the_last_block_runs_for_the_positions_that_are_read(recompute: bool | str) -> None:
    model, made = build(), pack()
    attach(model, SPECS["head frozen"])
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    ctx = model.context(made.layout)
    hidden = model.run(made.tokens, ctx, recompute, made.read)
    *others, last = seen
    assert set(others) == {len(made.tokens)} and last == len(made.read) < len(made.tokens)
    torch.testing.assert_close(hidden, model.run(made.tokens, ctx)[made.read], rtol=1e-12, atol=1e-12)


def test_an_adapter_on_the_head_that_does_not_act_gets_no_gradient() -> None:
    """Two adapters edit the head, one acts on the batch: the other is neither an error nor trained."""
    model, made = build(), pack()
    first = attach(model, SPECS["head edited"], name="first")
    second = attach(model, SPECS["head edited"], name="second")
    disturb(first), disturb(second)
    ctx = model.context(made.layout, adapters=("first",))
    pack_loss(model, made, ctx, model.run(made.tokens, ctx, rows=made.read)).backward()
    assert all(p.grad.abs().max() > 0 for p in first.trainable.values())
    assert not any(p.grad is not None and p.grad.any() for p in second.trainable.values())


def test_logits_of_the_whole_row_never_exist() -> None:
    """No tensor of the forward has more rows of the vocabulary than a chunk."""
    model, made = build(), pack()
    largest = 0
    plain = model.logits

    class Spy(Llama):
        def logits(self, hidden: Tensor, ctx) -> Tensor:
            nonlocal largest
            out = plain(hidden, ctx)
            largest = max(largest, len(out))
            return out

    model.__class__ = Spy
    hidden = torch.randn(len(made.read), TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    scalar_of(model, made, hidden).backward()
    assert 0 < largest <= 17
