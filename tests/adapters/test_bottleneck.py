"""Bottleneck adapters: where they stand, their formula, counts of the LoRA paper's table, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.laws.small import build, disturb, logits_of, sample_row
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.bottleneck import ACTIVATIONS, BottleneckSettings, bottleneck_width
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.errors import AdapterError, CannotMerge, ConfigError
from tunesmith.model.llama import Llama
from tunesmith.model.shapes import shape


def module_of(delta: nn.Module, activation: nn.Module) -> nn.Module:
    """The same network in torch's own modules."""
    width, hidden = delta.down.shape
    net = nn.Sequential(nn.Linear(hidden, width), activation, nn.Linear(width, hidden)).double()
    names = {"0.weight": "down", "0.bias": "down_bias", "2.weight": "up", "2.bias": "up_bias"}
    net.load_state_dict({key: getattr(delta, name).detach() for key, name in names.items()})
    return net


def by_hand(model: Llama, h: Tensor, ctx: object, nets: dict[str, nn.Module], scale: float, parallel: bool) -> Tensor:
    """The first block, sub-layer by sub-layer, with the networks where the papers have them."""
    block = model.model.layers[0]
    for name, norm, layer in (
        ("after_attn", block.input_layernorm, block.self_attn),
        ("after_mlp", block.post_attention_layernorm, block.mlp),
    ):
        x = norm(h, ctx)
        out = layer(x, ctx)
        if name in nets:
            out = out + scale * nets[name](x if parallel else out)
        h = h + out
    return h


@pytest.mark.parametrize(
    ("settings", "activation", "seams"),
    [
        ({"variant": "houlsby", "width": 5}, nn.GELU(), ("after_attn", "after_mlp")),
        ({"variant": "pfeiffer", "width": 3, "activation": "relu"}, nn.ReLU(), ("after_mlp",)),
        ({"variant": "parallel", "activation": "silu", "scale": 4.0}, nn.SiLU(), ("after_mlp",)),
        ({"variant": "houlsby", "activation": "tanh", "scale": 0.5}, nn.Tanh(), ("after_attn", "after_mlp")),
    ],
)
def test_a_block_by_hand(settings: dict, activation: nn.Module, seams: tuple[str, ...]) -> None:
    model = build()
    adapter = attach(model, {"kind": "bottleneck", **settings})
    disturb(adapter)
    nets = {seam: module_of(adapter.deltas[f"model.layers.0.{seam}"], activation) for seam in seams}
    assert len(adapter.deltas) == 2 * len(nets)
    tokens, layout = sample_row()
    with torch.no_grad():
        ctx = model.context(layout)
        h = model.model.embed_tokens(tokens)
        scale, parallel = settings.get("scale", 1.0), settings["variant"] == "parallel"
        expected = by_hand(model, h, ctx, nets, scale, parallel)
        plain = by_hand(model, h, ctx, {}, 1.0, False)
        out = model.model.layers[0](h, ctx)
    assert torch.allclose(out, expected, atol=1e-12) and not torch.allclose(out, plain, atol=1e-3)


def test_every_activation_is_the_one_that_its_name_says() -> None:
    x = torch.linspace(-3, 3, 31)
    modules = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
    assert modules.keys() == ACTIVATIONS.keys()
    assert all(torch.equal(ACTIVATIONS[name](x), module(x)) for name, module in modules.items())


def test_starts() -> None:
    """U = 0 is the identity to the bit; BERT's start is N(0, 0.02) with zero biases, and declared not to be."""
    method = find_method("bottleneck")
    model = build(dtype=torch.float32)
    before = logits_of(model, *sample_row())
    attach(model, {"kind": "bottleneck"}, name="zero")
    assert torch.equal(before, logits_of(model, *sample_row()))
    bert = attach(model, {"kind": "bottleneck", "init": "bert", "width": 2000}, name="bert")
    assert not torch.equal(before, logits_of(model, *sample_row()))
    assert method.identity_at_init(BottleneckSettings()) and not method.identity_at_init(
        BottleneckSettings(init="bert")
    )
    delta = bert.deltas["model.layers.0.after_mlp"]
    for matrix in (delta.down, delta.up):
        assert abs(matrix.std().item() - 0.02) < 2e-4 and abs(matrix.mean().item()) < 4e-4
    assert not delta.down_bias.any() and not delta.up_bias.any()


@pytest.mark.parametrize(("width", "millions"), [(1, 7.1), (4, 21.2), (8, 40.1), (16, 77.9), (64, 304.4)])
def test_count_of_the_lora_papers_adapter_h(width: int, millions: float) -> None:
    """Its table for GPT-3: 192 places of 2 d r + r + d, d = 12,288."""
    with torch.device("meta"):
        placed = list(find_method("bottleneck").place(Llama(shape("gpt3-shaped")), BottleneckSettings(width=width)))
    count = sum(p.numel() for place in placed for p in place.delta.parameters())
    assert len(placed) == 192 and count == 192 * (2 * 12288 * width + width + 12288)
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("hidden", "settings", "width"),
    [
        (576, {}, 36),
        (8, {}, 1),
        (576, {"reduction_factor": 5.0}, 115),
        (576, {"reduction_factor": 576.0}, 1),
        (576, {"width": 3}, 3),
    ],
)
def test_width(hidden: int, settings: dict, width: int) -> None:
    assert bottleneck_width(hidden, BottleneckSettings(**settings)) == width


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"width": 4, "reduction_factor": 2.0}, "both say how wide"),
        ({"reduction_factor": 25.0}, "25 leaves nothing of a hidden size of 24"),
        ({"variant": "compacter"}, "variant"),
        ({"activation": "gelu_new"}, "activation"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {"kind": "bottleneck", **spec})


def test_it_says_why_it_cannot_be_merged() -> None:
    adapter = attach(build(), {"kind": "bottleneck", "activation": "relu"})
    assert not adapter.method.mergeable(adapter.settings)
    for delta in adapter.deltas.values():
        with pytest.raises(CannotMerge, match=r"relu\(D h\), which is not linear in h"):
            delta.fold(torch.zeros(24, 24), None)


def test_saved_and_loaded(tmp_path) -> None:
    """In our own format: PEFT has no such type."""
    model = build(dtype=torch.float32)
    adapter = attach(model, {"kind": "bottleneck", "variant": "parallel", "width": 3})
    disturb(adapter)
    save_adapter(tmp_path, adapter, base="base", identity={})
    assert not (tmp_path / "adapter_config.json").exists()
    fresh = build(dtype=torch.float32)
    load_adapter(tmp_path, fresh)
    assert torch.equal(logits_of(fresh, *sample_row()), logits_of(model, *sample_row()))


def test_trained_in_float32_on_a_half_base() -> None:
    model = build(dtype=torch.bfloat16)
    adapter = attach(model, {"kind": "bottleneck"})
    disturb(adapter)
    assert {p.dtype for p in adapter.trainable.values()} == {torch.float32}
    tokens, layout = sample_row()
    assert model.run(tokens, model.context(layout)).dtype == torch.bfloat16
    assert (
        functional.cosine_similarity(
            logits_of(model, tokens, layout).flatten(), logits_of(model, tokens, layout, ()).flatten(), 0
        )
        < 0.999
    )
