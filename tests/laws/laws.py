"""What every adaptation method must obey. Each law takes a `Case` and raises AssertionError where it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws.small import (
    TINY,
    Shown,
    build,
    disturb,
    examples,
    logits_of,
    packs_of,
    padded,
    relative,
    run_packs,
    sample_row,
    snapshot,
)
from torch import Tensor, nn

import tunesmith.model.llama as llama_module
from tunesmith.adapters import Adapter, Delta, Method, attach
from tunesmith.adapters.base import install, weight_path
from tunesmith.config import validate_section
from tunesmith.errors import CannotMerge
from tunesmith.model.attention import attend
from tunesmith.model.fused import PLAIN, rms_norm, rotate, swiglu
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Decoder, Llama, RMSNorm
from tunesmith.model.seam import Context
from tunesmith.model.virtual import VIRTUAL
from tunesmith.train.loss import plain_loss

MANY = 200  # numbers in a parameter: finite differences over more take minutes


@dataclass(frozen=True)
class Case:
    """A method with settings, and whether these settings keep it deterministic (no dropout)."""

    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, model: Llama, seed: int = 0) -> Adapter:
        """Attach the method to `model`."""
        settings = validate_section(self.method.settings, self.settings, "adapter")
        return install(model, self.method, settings, "law", seed)

    @property
    def random(self) -> bool:
        """Does it draw random numbers in training?"""
        return bool(self.settings.get("dropout"))

    def __str__(self) -> str:
        said = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.method.kind}({said})"


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Run the model on the autograd twins: dense attention, and the formulas of norm, rotary embedding and SwiGLU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_module, "attend", partial(attend, backend="dense"))
        for name, fused in (("rms_norm", rms_norm), ("rotate", rotate), ("swiglu", swiglu)):
            patch.setattr(llama_module, name, PLAIN[fused])
        yield


def identity_at_init(case: Case) -> None:
    """Attaching changes no logit by a single bit, unless the method declares otherwise; moved, it does change them."""
    for dtype in (torch.float32, torch.float64):
        model = build(dtype=dtype)
        before = logits_of(model, *sample_row())
        adapter = case.attach(model)
        start = logits_of(model, *sample_row())
        if case.method.identity_at_init(adapter.settings):
            assert torch.equal(before, start), f"logits moved by {(before - start).abs().max():.1e}"
        disturb(adapter)
        assert not torch.equal(start, logits_of(model, *sample_row())), "what is trained has no effect on the logits"
        if adapter.deltas and not adapter.base:
            assert torch.equal(before, logits_of(model, *sample_row(), adapters=())), "switched off, it still acts"


def moved_is_trainable(case: Case) -> None:
    """After three steps, with an evaluation pass between, just what is trainable has moved; the rest not by a bit."""
    model = build(dtype=torch.float32).train()
    adapter = case.attach(model)
    before = snapshot(model)
    trained = {id(p) for p in adapter.trainable.values()}
    optimizer = torch.optim.AdamW(list(adapter.trainable.values()), lr=1e-2, weight_decay=0.0)
    packs = packs_of(model, examples(), 200)
    for _ in range(3):
        run_packs(model, packs, adapter)
        optimizer.step()
        adapter.after_step()
        model.eval()
        logits_of(model, *sample_row())
        model.train()
        wrong = [k for k, p in model.named_parameters() if p.requires_grad != (id(p) in trained)]
        assert not wrong, f"requires_grad does not say what is trained: {wrong}"
    after = snapshot(model)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    due = {k for k, p in model.named_parameters() if id(p) in trained}
    assert due - moved == set(), f"trainable but never moved: {sorted(due - moved)}"
    allowed = {k for k, _ in model.named_buffers() if ".law." in k}  # a delta's own state
    assert moved - due - allowed == set(), f"moved but not trainable: {sorted(moved - due - allowed)}"


def gradient_survives_evaluation(case: Case) -> None:
    """The gradient is the same before and after an evaluation pass: nothing computed there is kept."""
    model = build().train()
    adapter = case.attach(model)
    disturb(adapter)
    packs = packs_of(model, examples(), 200)
    torch.manual_seed(0)
    before = run_packs(model, packs, adapter)
    model.eval()
    logits_of(model, *sample_row())
    model.train()
    torch.manual_seed(0)
    after = run_packs(model, packs, adapter)
    assert before[0] == after[0] and torch.equal(before[1], after[1]), "an evaluation pass changed the gradient"


def saved_is_whole(case: Case) -> None:
    """state -> a fresh model -> load_state gives the same logits, bit by bit."""
    model = build(dtype=torch.float32)
    adapter = case.attach(model)
    disturb(adapter)
    saved = {k: v.clone() for k, v in adapter.state().items()}
    expected = logits_of(model, *sample_row())
    fresh = build(dtype=torch.float32)
    again = case.attach(fresh, seed=99)
    again.load_state(saved, "law")
    assert torch.equal(expected, logits_of(fresh, *sample_row())), (
        "the saved state is not all that the logits depend on"
    )


def folded_is_unfolded(case: Case) -> None:
    """A mergeable method folds into plain weights that compute the same; any other says that it cannot."""
    model = build()
    adapter = case.attach(model)
    disturb(adapter)
    if not case.method.mergeable(adapter.settings):
        assert not adapter.deltas or not all(_folds(model, *item) for item in adapter.deltas.items()), (
            "all of its deltas fold, though it says that it cannot: CannotMerge is due"
        )
        return
    expected = logits_of(model, *sample_row())
    plain = build()
    for name, parameter in adapter.base.items():
        plain.get_parameter(name).copy_(parameter.detach())
    for place, delta in adapter.deltas.items():
        host = plain.get_submodule(weight_path(place))
        weight, bias = delta.fold(host.weight, getattr(host, "bias", None))
        host.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            host.bias = nn.Parameter(bias, requires_grad=False)
    off = (logits_of(plain, *sample_row()) - expected).abs().max() / expected.abs().max()
    assert off < 1e-10, f"folded weights compute something else: {off:.1e}"


def _folds(model: Llama, place: str, delta: Delta) -> bool:
    host = model.get_submodule(weight_path(place))
    try:
        delta.fold(getattr(host, "weight", torch.zeros(2, 2)), None)
    except CannotMerge:
        return False
    return True


def routed_is_alone(case: Case) -> None:
    """Segments of one row that use different adapters compute what each of them computes with its own alone."""
    model = build()
    adapter = case.attach(model)
    if adapter.base:
        return  # it changes the base itself: every segment has it
    disturb(adapter)
    spec = {"kind": "lora", "rank": 2, "target_modules": "(lm_head|.*(q_proj|down_proj))"}
    disturb(attach(model, spec, name="other"))
    tokens, layout = sample_row()
    for mine, theirs in ((("law",), ("other",)), (("law",), ()), (("law", "other"), ("law",))):
        routes = [mine, mine, mine, theirs]
        with torch.no_grad():
            ctx = model.context(layout, routes=routes)
            mixed = model.logits(model.run(tokens, ctx), ctx)
        for segment, names in enumerate(routes):
            rows = slice(layout.starts[segment], layout.starts[segment] + layout.lengths[segment])
            off = (mixed[rows] - logits_of(model, tokens, layout, adapters=names)[rows]).abs().max()
            assert off < 1e-10, f"segment {segment}, routed to {names}, is {off:.1e} from these alone"


def packed_is_padded(case: Case) -> None:
    """Packed with shared prefixes, on the fast operators, equals the plain padded formulation on the plain formulas."""
    model = build().train()
    adapter = case.attach(model)
    disturb(adapter)
    some = examples()
    packs = packs_of(model, some)
    assert len(packs) == 1 and packs[0].layout.tokens < sum(len(e.ids) for e in some), "the test shares nothing"
    loss, gradient = run_packs(model, packs, adapter)
    with plain_formulas():
        twin_loss, twin = run_packs(model, padded(model, some), adapter, plain_loss)
    assert abs(loss - twin_loss) <= 1e-10 * abs(twin_loss), f"loss {loss} is not the padded {twin_loss}"
    assert relative(gradient, twin) < 1e-8, f"gradient off by {relative(gradient, twin):.1e}"


def examples_stand_alone(case: Case) -> None:
    """What an example computes does not depend on which others are in the row."""
    model = build()
    adapter = case.attach(model)
    disturb(adapter)
    tokens, layout = sample_row()
    together = logits_of(model, tokens, layout)
    for segment in range(len(layout.lengths)):
        rows = torch.from_numpy(layout.rows_of(segment))
        own = Layout.of([len(rows)], answer_ends=layout.answer_ends[rows], pictures=[layout.pictures[segment]])
        alone = logits_of(model, tokens[rows], own)
        off = (together[rows] - alone).abs().max()
        assert off < 1e-10, f"segment {segment} is {off:.1e} from what it is alone"


def split_does_not_matter(case: Case) -> None:
    """8x1, 4x2, 1x8 and packs cut by budget: one optimizer step has one gradient, however it is accumulated."""
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = build(dtype=dtype).train()
        adapter = case.attach(model)
        disturb(adapter)
        some = examples()
        loss, gradient = run_packs(model, packs_of(model, some), adapter)
        for options in ({"max_rows": 1}, {"max_rows": 2}, {"max_rows": 4, "share": False}, {"budget": 60}):
            packs = packs_of(model, some, **options)
            assert len(packs) > 1
            other, split = run_packs(model, packs, adapter)
            assert abs(other - loss) <= limit * abs(loss), f"{options}: loss {other}, not {loss}"
            assert relative(split, gradient) < limit, f"{options}: gradient off by {relative(split, gradient):.1e}"


def recompute_changes_nothing(case: Case) -> None:
    """Recomputation, of blocks or of all but their products, gives the same loss and gradient, dropout included."""
    model = build().train()
    adapter = case.attach(model)
    disturb(adapter)
    packs = packs_of(model, examples(), share=not case.random)
    torch.manual_seed(5)
    loss, gradient = run_packs(model, packs, adapter)
    for way in (True, "selective"):
        torch.manual_seed(5)
        again, recomputed = run_packs(model, packs, adapter, recompute=way)
        assert abs(loss - again) <= 1e-12 * abs(loss), f"{way}: loss {again}, not {loss}"
        off = relative(recomputed, gradient)
        assert off < 1e-12, f"{way}: gradient off by {off:.1e}"


def compiled_is_eager(case: Case, backend: str = "aot_eager", layers: int = 1) -> None:
    """The first block with the adapter survives torch.compile(fullgraph=True): the same values and gradients.

    `aot_eager` traces forward and backward and needs no compiler; `inductor` makes the code too, and takes its time.
    """
    torch._dynamo.reset()
    model = build(replace(TINY, num_hidden_layers=layers), torch.float32)
    adapter = case.attach(model)
    disturb(adapter)
    tokens, layout = sample_row()
    ctx = model.context(layout)
    h = model.embedded(tokens, ctx).detach()
    block = model.model.layers[0]
    inside = [p for k, p in model.named_parameters() if k.startswith("model.layers.0.") and p.requires_grad]

    def values(run: Callable[[Tensor, Context], Tensor]) -> list[Tensor]:
        x = h.clone().requires_grad_(True)
        out = run(x, ctx)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *inside])]

    eager = values(block)
    for a, b in zip(values(torch.compile(block, fullgraph=True, backend=backend)), eager, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), "compiled and eager disagree"


def delta_gradients(case: Case) -> None:
    """float64 gradcheck of every kind of delta in every kind of seam, for its input and its parameters.

    Of parameters with hundreds of numbers only the gradient that reaches the input is checked.
    """
    model = build(replace(TINY, hidden_size=8, intermediate_size=6, head_dim=4, num_attention_heads=2, vocab_size=9))
    adapter = case.attach(model)
    disturb(adapter)
    layout = Layout.of([2, 1], [-1, 0], answer_ends=np.array([2, 1, 0]), pictures=[Shown("one")] * 2)
    ctx = model.context(layout)
    size, ids = ctx.layout.tokens, torch.tensor([*[VIRTUAL] * ctx.extra, 1, 2, 3])
    model.embedded(ids[ctx.extra :], ctx)  # for what deltas there leave for those in the blocks
    seen = set()
    for place, delta in adapter.deltas.items():
        path, _, seam = place.rpartition(".")
        host = model.get_submodule(path)
        if (key := (type(delta), type(host), seam)) in seen:
            continue
        seen.add(key)
        width = host.in_features if isinstance(host, Linear) else len(host.weight) if isinstance(host, RMSNorm) else 8
        x = torch.randn(
            size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
        )
        named = [item for item in delta.named_parameters() if item[1].requires_grad and item[1].numel() < MANY]
        own = [p for name, p in named if name not in delta.detached]

        def edited(value: Tensor, *_: Tensor, host: Any = host) -> Tensor:
            return host.embed(value, host, ctx, ids) if isinstance(host, Decoder) else host(value, ctx)

        assert torch.autograd.gradcheck(edited, (x, *own)), place


DETERMINISTIC = [
    identity_at_init,
    saved_is_whole,
    folded_is_unfolded,
    packed_is_padded,
    examples_stand_alone,
    routed_is_alone,
    split_does_not_matter,
    delta_gradients,
]
ALWAYS = [moved_is_trainable, gradient_survives_evaluation, recompute_changes_nothing]
