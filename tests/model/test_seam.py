"""Seams: order, switching, routing by rows; and what the model leaves alone when nothing is attached."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.seam import Context, Seam


class Affine(nn.Module):
    """value * a + b, and a record of what it was given."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.given: list[Any] = []

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Any) -> Tensor:
        self.given.append((host, given))
        return value * self.a + self.b


def context(**options: Any) -> Context:
    return Context(Layout.single(4), torch.ones(4, 1), torch.zeros(4, 1), **options)


def seam(**deltas: nn.Module) -> Seam:
    made = Seam()
    for name, delta in deltas.items():
        made[name] = delta
    return made


HOST = nn.Identity()


def test_empty_is_the_very_same_value() -> None:
    value = torch.randn(4, 2)
    assert Seam()(value, HOST, context()) is value
    pair = (value, value)
    assert Seam()(pair, HOST, context()) is pair


def test_edits_apply_in_the_order_of_attachment() -> None:
    one = torch.ones(4, 2)
    assert seam(b=Affine(2, 0), a=Affine(1, 3))(one, HOST, context()).unique().tolist() == [5]
    assert seam(a=Affine(1, 3), b=Affine(2, 0))(one, HOST, context()).unique().tolist() == [8]


def test_only_named_adapters_act() -> None:
    both = seam(a=Affine(1, 3), b=Affine(2, 0))
    one = torch.ones(4, 2)
    assert both(one, HOST, context(adapters=("b",))).unique().tolist() == [2]
    assert both(one, HOST, context(adapters=())) is one
    assert both(one, HOST, context(adapters=("c",))) is one


def test_routed_rows_are_edited_and_others_pass() -> None:
    delta = Affine(2, 1)
    value, given = torch.arange(8.0).view(4, 2), torch.arange(4.0)[:, None]
    rows = torch.tensor([3, 1])
    out = seam(a=delta)(value, HOST, context(routes={"a": rows}), given)
    assert torch.equal(out[[0, 2]], value[[0, 2]])
    assert torch.equal(out[[1, 3]], value[[1, 3]] * 2 + 1)
    assert torch.equal(delta.given[0][1], given[rows]), "the delta is given the same rows of what the seam knows"


def test_routing_is_differentiable() -> None:
    value = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    ctx = context(routes={"a": torch.tensor([0, 2])})
    assert torch.autograd.gradcheck(lambda v: seam(a=Affine(3, 1))(v, HOST, ctx), value)


def test_linear_seams_stand_before_and_after_the_product() -> None:
    layer = Linear(2, 3, bias=True)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.fill_(10.0)
    x = torch.randn(4, 2)
    layer.input["a"], layer.edit["a"] = Affine(2, 0), Affine(5, 0)
    expected = (2 * x) @ layer.weight.T * 5 + 10
    assert torch.allclose(layer(x, context()), expected), "the edit stands before the bias"
    host, given = layer.edit["a"].given[0]
    assert host is layer and torch.equal(given, 2 * x), "the edit sees the edited input"


def test_attached_names_do_not_change_those_of_the_base() -> None:
    layer = Linear(2, 3)
    before = set(dict(layer.named_parameters()))
    layer.edit["a"] = Affine(1, 0)
    assert set(dict(layer.named_parameters())) == before
