"""Every guard is shown a planted fault and must name it; and the healthy twin, at which it must be silent."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from tunesmith.errors import NumericalError, TokenizerError
from tunesmith.train.guards import (
    check_gradients,
    check_loss,
    check_tokenizer_ids,
    explain_nonfinite,
    first_bad_row,
    first_nonfinite_layer,
)


def test_a_healthy_loss_is_not_spoken_of():
    assert check_loss(2.3, 49152, 1) is None
    assert check_loss(1e-9, 49152, 1) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_stops(loss):
    with pytest.raises(NumericalError, match="step 7: the loss is .*optimizer step was not made"):
        check_loss(loss, 49152, 7)


def test_loss_of_zero_stops_with_the_reasons():
    with pytest.raises(NumericalError, match="supervised.*preview.*float32"):
        check_loss(0.0, 49152, 3)
    with pytest.raises(NumericalError):
        check_loss(0.0, 49152, 3, previous=1.2)
    assert "reached 0.0" in check_loss(0.0, 49152, 300, previous=1e-6)


def test_uniform_logits_look_like_missing_base_weights():
    torch.manual_seed(0)
    logits = torch.zeros(5, 32000)  # what a head of zeros, or a hidden state of zeros, gives
    loss = nn.functional.cross_entropy(logits, torch.randint(32000, (5,))).item()
    assert math.exp(loss) == pytest.approx(32000, rel=1e-3)  # the perplexity of 32000 in an adapter report
    assert "base weights look as if they had not been loaded" in check_loss(loss, 32000, 900)
    assert check_loss(loss + 0.01, 32000, 900) is None


def gradients(**changed):
    named = {"layers.0.A": torch.ones(2, 3), "layers.0.B": torch.ones(3, 2), "layers.1.A": torch.ones(2)}
    return list((named | changed).items())


def test_healthy_gradients_are_not_spoken_of():
    assert check_gradients(gradients(), 5, updates=4) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_names_the_first_in_forward_order(bad):
    broken = torch.tensor([1.0, bad])
    named = gradients(**{"layers.1.A": broken, "layers.0.B": broken})
    with pytest.raises(
        NumericalError, match=r"step 5: the gradient of layers\.0\.B \(and layers\.1\.A\) is not finite"
    ):
        check_gradients(named, 5, updates=4)
    with pytest.raises(NumericalError, match="loss scale of 65536"):
        check_gradients(named, 5, updates=0, loss_scale=65536.0)


def test_dead_gradient_is_named_from_the_second_update_on():
    for dead in (torch.zeros(2, 3), None):
        named = gradients(**{"layers.0.A": dead})
        assert check_gradients(named, 0, updates=0) is None  # LoRA: B starts at 0, so A's first gradient is 0
        said = check_gradients(named, 3, updates=1)
        assert "step 3" in said and "layers.0.A" in said and "exactly 0" in said and "layers.1" not in said


def test_all_gradients_dead_stops():
    named = [(name, torch.zeros_like(g)) for name, g in gradients()]
    assert check_gradients(named, 0, updates=0) is None
    with pytest.raises(NumericalError, match="training cannot move"):
        check_gradients(named, 1, updates=1)


def test_many_names_are_counted():
    named = [(f"layers.{i}.A", torch.zeros(1)) for i in range(30)] + [("layers.30.A", torch.ones(1))]
    said = check_gradients(named, 1, updates=1)
    assert "layers.0.A" in said and "30 in all" in said and "layers.29" not in said


def test_a_guard_that_stops_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model.weight.grad[0, 0] = math.nan
    with pytest.raises(NumericalError):
        check_gradients([(n, p.grad) for n, p in model.named_parameters()], 1, updates=1)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(torch.equal(before[1][i][k], after[1][i][k]) for i in before[1] for k in before[1][i])
    assert math.isnan(model.weight.grad[0, 0])


class Masked(nn.Module):
    """Attention-like: its -inf mask is legal, and no module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q = self.q(x)
        scores = (q @ q.T).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
        return self.out(scores.softmax(-1) @ q)


class Stack(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(Masked(), nn.Dropout(0.5)) for _ in range(4))
        self.to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_finite_model_with_masks_has_no_such_layer():
    model = Stack()
    assert first_nonfinite_layer(model, lambda: model(torch.randn(5, 8))) is None


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_fp16_overflow_is_named_by_layer_with_its_magnitude(layer):
    model = Stack(torch.float16).eval()
    with torch.no_grad():
        model.layers[layer][0].out.bias.fill_(60000)  # fp16 ends at 65504
        model.layers[layer][0].out.weight.fill_(0)
        model.layers[layer][0].out.weight[0] = 30000
        model.layers[layer][0].q.bias.fill_(1)
    found = first_nonfinite_layer(model, lambda: model(torch.ones(5, 8, dtype=torch.float16)))
    assert found.module == f"layers.{layer}.0.out" and found.role == "output" and found.dtype == "float16"
    assert found.count == 5 and found.absmax == pytest.approx(60000, rel=1e-3)
    assert "65,504" in str(found)


def test_damaged_weight_is_named_as_such():
    model = Stack()
    with torch.no_grad():
        model.layers[1][0].q.weight[0, 0] = math.nan
    found = first_nonfinite_layer(model, lambda: model(torch.randn(5, 8)))
    assert (found.module, found.role) == ("layers.1.0.q", "parameter weight")


def test_value_made_between_modules_is_named_at_the_next_input():
    class Between(Stack):
        def forward(self, x):
            return self.layers[1](self.layers[0](x) / 0)

    model = Between().eval()
    found = first_nonfinite_layer(model, lambda: model(torch.randn(5, 8)))
    assert (found.module, found.role) == ("layers.1", "input")


def test_diagnosis_leaves_no_hooks_no_gradients_and_the_same_random_numbers():
    model = Stack()
    state = torch.get_rng_state()
    first_nonfinite_layer(model, lambda: model(torch.randn(5, 8)))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError):
        first_nonfinite_layer(model, lambda: {}["x"])
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and module.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", range(7))
def test_bad_row_is_found_by_halving(bad):
    calls = []

    def is_bad(rows):
        calls.append(len(rows))
        return bad in rows

    assert first_bad_row(list(range(7)), is_bad) == bad
    assert len(calls) <= 7
    assert first_bad_row([], is_bad) is None and first_bad_row([90, 91], is_bad) is None
    assert first_bad_row([1, 2], lambda rows: len(rows) == 2) is None  # bad only together


@dataclass
class Row:
    source: str
    values: torch.Tensor


def test_explanation_names_step_layer_row_and_cure():
    model = Stack().eval()
    rows = [Row(f"train.jsonl:{i}", torch.full((1, 8), math.inf if i == 5 else 1.0)) for i in range(1, 9)]

    def forward(part):
        return model(torch.cat([row.values for row in part]))

    error = explain_nonfinite("the loss is nan", 12, model, rows, forward)
    assert isinstance(error, NumericalError) and error.exit_code == 4
    text = str(error)
    assert "step 12: the loss is nan" in text and "train.jsonl:5" in text and "not made" in text
    assert "bfloat16" in text and "\n" not in text
    healthy = explain_nonfinite("gradient", 1, model, rows[:2], forward)
    assert "backward" in str(healthy) and "train.jsonl" not in str(healthy)
    with torch.no_grad():
        model.layers[0][0].q.weight[0, 0] = math.nan
    assert "load another copy" in str(explain_nonfinite("loss", 1, model, rows[:2], forward))


@dataclass
class Ids:
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 0
    special_tokens: dict[str, int] = field(default_factory=lambda: {"<s>": 1, "</s>": 2})


def test_tokenizer_that_fits_is_not_spoken_of():
    assert check_tokenizer_ids(Ids(), 100, (2, 7)) == []


def test_tokenizer_of_another_model_is_named():
    with pytest.raises(TokenizerError, match=r"eos \(128001\).*100 embeddings"):
        check_tokenizer_ids(Ids(eos_id=128001), 100)
    with pytest.raises(TokenizerError, match=r"<extra> \(100\)"):
        check_tokenizer_ids(Ids(special_tokens={"<extra>": 100}), 100)
    with pytest.raises(TokenizerError, match="no EOS"):
        check_tokenizer_ids(Ids(eos_id=None), 100)


def test_confusions_of_special_tokens_are_said():
    assert "pad and EOS" in check_tokenizer_ids(Ids(pad_id=2), 100, (2,))[0]
    assert "pad and BOS" in check_tokenizer_ids(Ids(pad_id=1), 100, (2,))[0]
    assert "configuration says 7" in check_tokenizer_ids(Ids(), 100, (7,))[0]
