"""Schedules against transformers', the optimizer against its formula, clipping against torch's, loss scaling."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn import Parameter

from tunesmith.errors import ConfigError, NumericalError
from tunesmith.train.optim import (
    SCHEDULES,
    LossScaler,
    Schedule,
    build_optimizer,
    check_warmup,
    clip_gradients,
    gradient_norm,
    set_learning_rate,
    warmup_in_steps,
)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 10), (30, 1000), (2, 11)])
def test_schedules_agree_with_transformers(name, warmup, total):
    transformers = pytest.importorskip("transformers")
    reference_optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=3e-4)
    steps = {} if name == "constant" else {"num_training_steps": total}
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    reference = make(reference_optimizer, num_warmup_steps=warmup, **steps)
    schedule = Schedule(name, 3e-4, total, warmup)
    for step in range(total + 1):
        assert schedule.learning_rate_at(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-20)
        reference_optimizer.step()
        reference.step()


def test_schedule_is_pure_and_frozen():
    schedule = Schedule("cosine", 1.0, 10, 2)
    assert schedule.learning_rate_at(7) == schedule.learning_rate_at(7)
    assert schedule.learning_rate_at(1) == 0.5 and schedule.learning_rate_at(2) == 1.0
    with pytest.raises(AttributeError):
        schedule.warmup_steps = 3


def test_unknown_schedule_and_bad_rate_are_named():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Schedule("cosin", 1.0, 10)
    with pytest.raises(ConfigError, match="learning_rate"):
        Schedule("cosine", math.nan, 10)


def test_warmup_has_one_unit():
    assert warmup_in_steps(1000) == 0
    assert warmup_in_steps(1000, warmup_steps=30) == 30
    assert warmup_in_steps(1000, warmup_ratio=0.03) == 30
    assert warmup_in_steps(101, warmup_ratio=0.03) == 4
    assert warmup_in_steps(1000, warmup_steps=30, warmup_ratio=0.0) == 30
    assert warmup_in_steps(1, warmup_ratio=0.03) == 0 and check_warmup(warmup_in_steps(2, warmup_ratio=0.03), 2) is None
    with pytest.raises(ConfigError, match="only one"):
        warmup_in_steps(1000, 30, 0.1)
    with pytest.raises(ConfigError, match="warmup_ratio"):
        warmup_in_steps(1000, warmup_ratio=30)
    with pytest.raises(ConfigError, match="warmup_steps"):
        warmup_in_steps(1000, warmup_steps=-1)


def test_warmup_longer_than_training_is_an_error_and_a_long_one_is_said(caplog):
    with pytest.raises(ConfigError, match="never reached"):
        check_warmup(100, 100)
    assert "67%" in check_warmup(6504, 9756)  # the case of the alpaca-lora blog
    assert check_warmup(20, 100) is None and check_warmup(0, 1) is None
    with caplog.at_level(logging.WARNING):
        Schedule("linear", 1.0, 9756, 6504)
    assert "6504 of 9756 optimizer steps" in caplog.text


def parameters() -> dict[str, Parameter]:
    torch.manual_seed(0)
    return {
        "q_proj.lora_A.weight": Parameter(torch.randn(1, 4)),
        "q_proj.lora_B.weight": Parameter(torch.randn(4, 1)),
        "q_proj.bias": Parameter(torch.randn(4)),
        "input_layernorm.weight": Parameter(torch.randn(4)),
        "self_attn.adaption_gate": Parameter(torch.randn(1, 4)),
    }


def test_groups_carry_scale_and_decay():
    named = parameters()
    optimizer = build_optimizer(
        named, learning_rate=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6, lr_scale={"q_proj.lora_B.weight": 16}
    )
    found = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert found.keys() == named.keys()
    assert {name for name, group in found.items() if group["weight_decay"]} == {
        "q_proj.lora_A.weight",
        "q_proj.lora_B.weight",
    }
    set_learning_rate(optimizer, 0.5)
    assert found["q_proj.lora_B.weight"]["lr"] == 8.0 and found["q_proj.bias"]["lr"] == 0.5
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    everything = build_optimizer(named, learning_rate=0.1, weight_decay=0.3, decay_all=True)
    assert [group["weight_decay"] for group in everything.param_groups] == [0.3]


def test_first_step_is_the_formula():
    """After one step m / sqrt(v) is the gradient's sign: p <- p (1 - lr k d) - lr k sign(g)."""
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = build_optimizer(
        named, learning_rate=0.1, weight_decay=0.3, eps=0.0, lr_scale={"q_proj.lora_B.weight": 2.0}
    )
    for p in named.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in named.items():
        rate = 0.2 if name.endswith("lora_B.weight") else 0.1
        decay = 0.3 if "lora" in name else 0.0
        expected = before[name] * (1 - rate * decay) - rate * p.grad.sign()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_steps_are_torchs():
    """Beside torch.optim.AdamW, also where a gradient's numbers lie in another order than its parameter's."""
    start = {**parameters(), "down_proj.weight": torch.randn(6, 5)}
    ours, theirs = ({name: Parameter(p.detach().clone()) for name, p in start.items()} for _ in range(2))
    made = build_optimizer(ours, learning_rate=0.1, weight_decay=0.3, decay_all=True)
    reference = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.3)
    for step in range(5):
        for name, p in ours.items():
            p.grad = torch.randn(p.shape[::-1]).t() if p.ndim == 2 and step % 2 else torch.randn_like(p)
            theirs[name].grad = p.grad.clone(memory_format=torch.contiguous_format)
        made.step()
        reference.step()
        for name, p in ours.items():
            torch.testing.assert_close(p.detach(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
    made.zero_grad()
    assert all(p.grad is None for p in ours.values())


def test_nothing_to_train_and_unknown_scale_are_errors():
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer({}, learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"lora_C"):
        build_optimizer(parameters(), learning_rate=0.1, lr_scale={"lora_C": 2.0})


@pytest.mark.parametrize("max_norm", [0.3, 1e9, None, 0])
def test_clipping_agrees_with_torch(max_norm):
    named, twin = parameters(), parameters()
    torch.manual_seed(1)
    for p, q in zip(named.values(), twin.values(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    named["extra"] = Parameter(torch.ones(1))  # has no gradient
    norm = clip_gradients(named.values(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(twin.values(), max_norm or math.inf)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(named.values(), twin.values(), strict=False):
        torch.testing.assert_close(p.grad, q.grad)


def test_norm_survives_what_fp32_squares_do_not():
    large, small = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    large.grad, small.grad = torch.full((4,), 1e30), torch.full((4,), 1e-30)
    assert gradient_norm([large]) == pytest.approx(2e30)
    assert gradient_norm([small]) == pytest.approx(2e-30)
    assert clip_gradients([large], 1.0) == pytest.approx(2e30)
    assert gradient_norm([large]) == pytest.approx(1.0, rel=1e-5)
    assert gradient_norm([Parameter(torch.ones(1))]) == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_left_alone(bad):
    a, b = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    a.grad, b.grad = torch.tensor([1.0, bad]), torch.tensor([3.0, 4.0])
    assert not math.isfinite(clip_gradients([a, b], 1.0))
    assert b.grad.tolist() == [3.0, 4.0]


def test_scaler_saves_small_fp16_gradients_and_gives_them_back():
    weight = Parameter(torch.ones(2))
    for scaler, expected in ((LossScaler(enabled=False), [0.0, 0.0]), (LossScaler(), [1e-9, 1e-9])):
        weight.grad = None
        loss = (weight.half() * torch.tensor(1e-9 * 2**10).half()).sum().float() * 2.0**-10
        scaler.scale(loss).backward()
        assert scaler.unscale([weight])
        assert weight.grad.tolist() == pytest.approx(expected, rel=0.05)


def test_scaler_halves_on_overflow_and_grows_again():
    scaler, weight = LossScaler(initial=4.0, interval=2), Parameter(torch.ones(1))
    weight.grad = torch.tensor([math.inf])
    assert not scaler.unscale([weight])
    scaler.update(False)
    assert (scaler.value, scaler.skipped) == (2.0, 1)
    scaler.update(True)
    twin = LossScaler()
    twin.interval = 2
    twin.load_state(scaler.state())
    for each in (scaler, twin):
        each.update(True)
        assert (each.value, each.good_steps) == (4.0, 0)
    weight.grad = torch.tensor([8.0])
    assert scaler.unscale([weight]) and weight.grad.item() == 2.0


def test_scaler_gives_up_by_name_when_no_scale_helps():
    scaler = LossScaler(initial=2.0)
    scaler.update(False)
    with pytest.raises(NumericalError, match="65504"):
        scaler.update(False)


def test_disabled_scaler_does_nothing():
    scaler, weight = LossScaler(enabled=False), Parameter(torch.ones(1))
    weight.grad = torch.tensor([math.inf])
    assert scaler.unscale([weight])  # the guards speak about it, not the scaler
    scaler.update(False)
    assert scaler.scale(torch.tensor(3.0)).item() == 3.0 and scaler.value == 1.0
