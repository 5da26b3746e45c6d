"""LoRA against its formula and PEFT's: starts, scales, counts, dropout, folding, and settings that are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, build, disturb, logits_of, sample_row

from tunesmith.adapters import attach, find_method
from tunesmith.adapters.lora import LoRADelta, LoRASettings, scale_of
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import quantize
from tunesmith.model.shapes import shape
from tunesmith.quant.storage import Spec

PATH = "model.layers.0.mlp.down_proj"
PLACE = f"{PATH}.edit"


def test_formula() -> None:
    model = build()
    adapter = attach(model, {"kind": "lora", "rank": 3, "alpha": 5, "target_modules": ["down_proj"]})
    disturb(adapter)
    delta = adapter.deltas[PLACE]
    x, y = torch.randn(4, 40, dtype=torch.float64), torch.randn(4, 24, dtype=torch.float64)
    expected = y + 5 / 3 * (x @ delta.A.T @ delta.B.T)
    assert torch.allclose(delta(y, None, None, x), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 8}, 2.0),
        ({"rank": 8, "alpha": 4}, 0.5),
        ({"rank": 16, "alpha": 4, "rslora": True}, 1.0),
        ({"rank": 8, "alpha": 4, "rank_pattern": {"down_proj": 2}}, 2.0),
        ({"rank": 8, "alpha": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3}}, 1.5),
        ({"rank": 8, "alpha": 4, "alpha_pattern": {"q_proj": 3}}, 0.5),
        ({"rank": 8, "rank_pattern": {"down_proj": 2}}, 8.0),  # as in PEFT: alpha does not follow the pattern's rank
    ],
)
def test_scale(settings: dict, expected: float) -> None:
    assert scale_of(LoRASettings(**settings), PATH) == pytest.approx(expected)


def test_start_is_kaiming_and_zero() -> None:
    model = build(replace(TINY, hidden_size=256, intermediate_size=300))
    delta = attach(model, {"kind": "lora", "rank": 64}).deltas["model.layers.0.self_attn.q_proj.edit"]
    bound = 1 / math.sqrt(256)  # kaiming_uniform(sqrt 5): sqrt(6 / (1 + 5) / fan_in)
    assert not delta.B.any() and delta.A.abs().max() <= bound
    assert delta.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    gaussian = attach(model, {"kind": "lora", "rank": 64, "init": "gaussian"}, name="g")
    assert gaussian.deltas["model.layers.0.self_attn.q_proj.edit"].A.std().item() == pytest.approx(1 / 64, rel=0.03)


def test_seed_fixes_the_start_and_nothing_else() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (attach(build(), {"kind": "lora"}, seed=s).state() for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected), "attaching draws from the caller's generator"
    key = f"{PLACE}.A"
    assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])


def test_trained_in_float32_on_a_half_base() -> None:
    model = build(dtype=torch.bfloat16)
    adapter = attach(model, {"kind": "lora"})
    assert {p.dtype for p in adapter.trainable.values()} == {torch.float32}
    disturb(adapter)
    assert model.run(sample_row()[0], model.context(sample_row()[1])).dtype == torch.bfloat16


def test_first_gradient_is_of_b_alone() -> None:
    model = build()
    adapter = attach(model, {"kind": "lora", "target_modules": ["down_proj"]})
    tokens, layout = sample_row()
    model(tokens, layout).square().sum().backward()
    delta = adapter.deltas[PLACE]
    assert not delta.A.grad.any() and delta.B.grad.any()


def test_pissa_starts_at_the_principal_part() -> None:
    """B0 A0 s is the best rank-r approximation of W; what trains starts there, and the model where it was."""
    model = build(dtype=torch.float32)
    adapter = attach(model, {"kind": "lora", "rank": 4, "alpha": 6, "init": "pissa", "target_modules": ["down_proj"]})
    delta = adapter.deltas[PLACE]
    weight = model.get_submodule(PATH).weight
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    assert torch.allclose(1.5 * (delta.B @ delta.A).double(), best, atol=1e-5)
    assert torch.equal(delta.A, delta.A0) and torch.equal(delta.B, delta.B0)
    assert set(adapter.trainable) == {f"model.layers.{i}.mlp.down_proj.edit.{n}" for i in (0, 1) for n in "AB"}
    assert {k.rsplit(".", 1)[1] for k in adapter.state()} == {"A", "B", "A0", "B0"}
    with torch.no_grad():
        delta.A.mul_(1.3)
    A, B = delta.factors()
    assert A.shape == (8, 40) and B.shape == (24, 8)
    change = 1.5 * (delta.B @ delta.A - delta.B0 @ delta.A0)
    assert torch.allclose(1.5 * (B @ A), change, atol=1e-6)


def test_pissa_learns_as_peft_does_after_the_same_step() -> None:
    """Subtracting the start is the same as PEFT's residual weight: one trained value, two ways to write it."""
    model = build()
    before = model.get_submodule(PATH).weight.clone()
    adapter = attach(model, {"kind": "lora", "rank": 4, "init": "pissa", "target_modules": ["down_proj"]})
    delta = adapter.deltas[PLACE]
    disturb(adapter)
    residual = before - 2 * (delta.B0 @ delta.A0)
    assert torch.allclose(delta.fold(before, None)[0], residual + 2 * (delta.B @ delta.A), atol=1e-12)


def test_pissa_starts_at_the_principal_part_of_a_quantized_weight() -> None:
    """Of what the base computes with, not of its packed numbers."""
    model = quantize(build(), Spec("nf4", 16))
    delta = attach(model, {"kind": "lora", "rank": 4, "init": "pissa"}).deltas[PLACE]
    weight = model.get_submodule(PATH).dense_weight(torch.float64)
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(2 * delta.B @ delta.A, u[:, :4] @ torch.diag(s[:4]) @ v[:4], atol=1e-5)


def test_dropout_acts_in_training_on_the_adapters_input_only() -> None:
    delta = LoRADelta(torch.eye(6), torch.eye(6), 1.0, 0.5, None)
    x, y = torch.ones(2000, 6), torch.full((2000, 6), 10.0)
    out = delta(y, None, None, x) - y
    assert set(out.unique().tolist()) == {0.0, 2.0} and abs(out.mean().item() - 1) < 0.05
    assert torch.equal(delta.eval()(y, None, None, x), y + 1)


def test_lora_plus_is_the_rate_of_b() -> None:
    method = find_method("lora")
    settings = LoRASettings(lora_plus_ratio=16)
    assert method.lr_scale(f"{PLACE}.B", settings) == 16 and method.lr_scale(f"{PLACE}.A", settings) == 1


QV, QKVO = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
COUNTS = [  # published counts, or of the LoRA formula sum r (in + out)
    ("smollm2-135m", 8, QV, 460_800),
    ("smollm2-135m", 16, "all-linear", 4_884_480),
    ("llama-7b", 8, QV, 4_194_304),
    ("llama-7b", 16, QKVO, 16_777_216),
    ("llama-7b", 64, "all-linear", 159_907_840),
    ("llama-7b", 256, "all-linear", 639_631_360),
    ("llama-13b", 8, QV, 6_553_600),
    ("llama-65b", 64, "all-linear", 799_539_200),
    ("llama-2-70b", 8, QV, 16_384_000),
    ("gpt3-shaped", 1, QV, 4_718_592),  # table 6 of the LoRA paper: 4.7M
    ("gpt3-shaped", 8, QV, 37_748_736),  # 37.7M
]


@pytest.mark.parametrize(("name", "rank", "targets", "count"), COUNTS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_counts(name: str, rank: int, targets, count: int, init: str) -> None:
    """On the meta device: nothing is allocated, and PiSSA's decomposition, which would take hours, is not made."""
    with torch.device("meta"):
        model = Llama(shape(name))
    placements = list(find_method("lora").place(model, LoRASettings(rank=rank, target_modules=targets, init=init)))
    held = [p for placed in placements for p in (*placed.delta.parameters(), *placed.delta.buffers())]
    assert sum(p.numel() for p in held if isinstance(p, torch.nn.Parameter)) == count
    assert all(p.is_meta for p in held)
    assert sum(p.numel() for p in held) == count * (2 if init == "pissa" else 1)


def test_file_size_of_the_7b() -> None:
    """16.8 MB of float32 for rank 8 on q and v."""
    assert 4 * COUNTS[2][3] / 1e6 == pytest.approx(16.8, abs=0.03)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rnk": 4}, "did you mean 'rank'"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": 0}, "alpha"),
        ({"init": "zeros"}, "init"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"rank_pattern": {"q_prj": 2}}, "matches none"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "matches none"),
        ({"layers_to_transform": [2]}, "no layer 2"),
        ({"layers_to_transform": []}, "select no module"),
        ({"target_modules": ["embed_tokens"], "layers_to_transform": [0]}, "select no module"),
        ({"target_modules": ["embed_tokens"], "init": "pissa"}, "pissa has no start of rank 16 for model.embed_tokens"),
        ({"target_modules": ["k_proj"], "init": "pissa"}, "pissa has no start of rank 16 .* at most 12"),
        ({"target_modules": ["embed_tokens"], "train_embeddings": True}, "embed_tokens is trained whole"),
        ({"target_modules": ["lm_head"], "train_embeddings": True}, "lm_head is trained whole"),
        ({"target_modules": ["embed_tokens"], "train_head": True}, "embed_tokens is trained whole"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {"kind": "lora", **spec})


def test_two_on_one_model_add_up_and_switch() -> None:
    model = build()
    tokens, layout = sample_row()
    bare = logits_of(model, tokens, layout)
    first, second = (attach(model, {"kind": "lora", "target_modules": ["lm_head"]}, name=n, seed=3) for n in "ab")
    disturb(first, seed=1), disturb(second, seed=2)
    one, two = (logits_of(model, tokens, layout, (n,)) - bare for n in "ab")
    assert one.abs().max() > 0.1 and torch.allclose(logits_of(model, tokens, layout) - bare, one + two, atol=1e-12)
    assert torch.equal(logits_of(model, tokens, layout, ()), bare)
