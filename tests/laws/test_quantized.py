"""The laws on a quantized base: every method trains on top of it as it does on a dense one, or says that it cannot."""

from __future__ import annotations

import pytest
import torch
from tests.laws import laws
from tests.laws.laws import Case
from tests.laws.small import TINY, build, disturb

from tunesmith.adapters import find_method, kinds
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.export.merge import merged_weights
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import block_linears, quantize
from tunesmith.quant.storage import Spec

SPECS = {"nf4": Spec("nf4", 16), "int8": Spec("int8")}  # blocks that divide the small model's weights
# All laws on NF4 but those of routing and splitting, whose code does not touch a product; the heart of them on int8.
LAWS = {
    "nf4": [
        laws.identity_at_init,
        laws.moved_is_trainable,
        laws.saved_is_whole,
        laws.packed_is_padded,
        laws.examples_stand_alone,
        laws.recompute_changes_nothing,
    ],
    "int8": [laws.identity_at_init, laws.moved_is_trainable, laws.packed_is_padded],
}
CASES = [(kind, law) for kind, several in LAWS.items() for law in several]


@pytest.fixture
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """Let the laws build a quantized model."""
    spec = SPECS[request.param]
    monkeypatch.setattr(laws, "build", lambda *args, **kwargs: quantize(build(*args, **kwargs), spec))
    return spec


def trains_linears(kind: str) -> bool:
    """Does the method train weights of linears of the blocks?"""
    model = build()
    linears = {f"{name}.weight" for name, _ in block_linears(model)}
    return bool(linears & set(Case(find_method(kind)).attach(model).base))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize(("base", "law"), CASES, indirect=["base"], ids=lambda x: getattr(x, "__name__", x))
def test_law(base: Spec, law, kind: str) -> None:
    if trains_linears(kind):
        with pytest.raises(AdapterError, match=r"and it is quantized \(\d+ weights are\); set quant\.kind=none"):
            Case(find_method(kind)).attach(laws.build())
    else:
        law(Case(find_method(kind)))


@pytest.mark.parametrize("base", SPECS, indirect=True)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_delta_gradients(base: Spec, kind: str) -> None:
    laws.delta_gradients(Case(find_method(kind)))


@pytest.mark.parametrize("base", SPECS, indirect=True)
def test_compiled_is_eager(base: Spec) -> None:
    laws.compiled_is_eager(Case(find_method("lora")))


@pytest.mark.parametrize("base", SPECS, indirect=True)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_nothing_folds_into_a_quantized_weight(base: Spec, kind: str) -> None:
    model = laws.build()
    adapter = Case(find_method(kind)).attach(model)
    disturb(adapter)
    with pytest.raises(CannotMerge, match=rf"layers\.0\..*: its weight is quantized \({base.kind}\).*keep the adapter"):
        merged_weights(model, adapter, torch.float32)


@pytest.mark.parametrize("kind", SPECS)
def test_a_quantized_model_is_near_the_dense_one_and_is_not_it(kind: str) -> None:
    """The laws above would hold on a base that was left dense."""
    model: Llama = quantize(build(), SPECS[kind])
    held = dict(block_linears(model))
    assert len(held) == 7 * TINY.num_hidden_layers and all(linear.quant is not None for linear in held.values())
    for name, linear in block_linears(build()):
        off = (held[name].dense_weight(torch.float64) - linear.weight).norm() / linear.weight.norm()
        assert 0 < off < {"nf4": 0.12, "int8": 0.01}[kind]
