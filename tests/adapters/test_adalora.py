"""AdaLoRA against its formula and PEFT's, which is the authors' code: penalty, importance, ranks, files, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.exchange import SIZES, agree, check_ours, check_theirs, move, our_logits, save
from tests.laws.peers import padded_step, twin_models, wide_norms
from tests.laws.small import build, disturb, examples, logits_of, relative, run_packs
from tests.model.checkpoints import reference

from tunesmith.adapters import Adapter, attach, find_method
from tunesmith.adapters.adalora import AdaLoRASettings, Schedule, schedule_of
from tunesmith.adapters.peft_format import load_adapter, read_info
from tunesmith.data.pack import plan_packs
from tunesmith.errors import AdapterError, ConfigError
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model
from tunesmith.model.shapes import shape

tf = pytest.importorskip("transformers")
ONE = {"kind": "adalora", "init_rank": 4, "target_rank": 2, "target_modules": ["q_proj", "down_proj"]}
THEIRS = {"P": "lora_B", "Q": "lora_A", "singular": "lora_E"}


def their_key(name: str) -> str:
    path, _, last = name.rsplit(".", 2)
    return f"{path}.{THEIRS[last]}.default"


def config(**options: Any) -> Any:
    """PEFT's settings for ONE."""
    own = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 100, "target_modules": ["q_proj", "down_proj"]}
    return peft.AdaLoraConfig(task_type="CAUSAL_LM", **own | options)


def test_formula() -> None:
    model = build()
    adapter = attach(model, {**ONE, "alpha": 6})
    disturb(adapter)
    delta = adapter.deltas["model.layers.0.mlp.down_proj.edit"]
    x, y = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    change = delta.P @ torch.diag(delta.singular) @ delta.Q
    assert torch.allclose(delta(y, None, None, x), y + 6 / (4 + 1e-5) * x @ change.T, atol=1e-13)


def test_start() -> None:
    delta = attach(build(), {**ONE, "init_rank": 200}).deltas["model.layers.0.mlp.down_proj.edit"]
    assert not delta.singular.any() and delta.P.shape == (24, 200) and delta.Q.shape == (200, 40)
    assert delta.P.std().item() == pytest.approx(0.02, rel=0.05) == delta.Q.std().item()


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_parity_with_peft(family: str) -> None:
    """In float64, one pack of ours equals a padded batch of theirs: logits, loss and gradient."""
    with wide_norms():
        ours, theirs = twin_models(getattr(tf, f"{family}Config")(**SIZES), torch.float64)
        adapter = attach(ours, ONE)
        disturb(adapter)
        peer = with_our_values(peft.get_peft_model(theirs, config()).double(), adapter)
        known = dict(peer.named_parameters())
        theirs = {name: known[f"base_model.model.{their_key(name)}"] for name in adapter.trainable}
        (pack,) = plan_packs(examples(), budget=10_000)
        loss, gradient = run_packs(ours, [pack], adapter)
        logits = logits_of(ours, pack.tokens, pack.layout)
        their_logits, their_loss, their_gradient = padded_step(peer, examples(), theirs)
    for example, rows in zip(pack.examples, pack.rows, strict=True):
        assert relative(logits[torch.from_numpy(rows)], their_logits[example]) < 1e-8
    assert abs(loss - their_loss) <= 1e-10 * their_loss
    assert relative(gradient, their_gradient) < 1e-8


def test_penalty_is_pefts() -> None:
    """What PEFT adds to the loss, by asking it for the loss with and without."""
    ours, theirs = twin_models(tf.LlamaConfig(**SIZES), torch.float64)
    adapter = attach(ours, {**ONE, "orthogonality": 0.3})
    disturb(adapter)
    peer = with_our_values(peft.get_peft_model(theirs, config(orth_reg_weight=0.3)).double(), adapter)
    ids = torch.arange(9)[None]
    with_it = peer(input_ids=ids, labels=ids).loss.item()
    without = peer.base_model.model(input_ids=ids, labels=ids).loss.item()
    assert adapter.penalty().item() == pytest.approx(with_it - without, rel=1e-6) and with_it > without
    assert attach(ours, {**ONE, "orthogonality": 0}, name="none").penalty() is None


def with_our_values(peer: Any, adapter: Adapter) -> Any:
    """PEFT's model with the values of our adapter."""
    known = dict(peer.named_parameters())
    with torch.no_grad():
        for name, value in adapter.trainable.items():
            their = known[f"base_model.model.{their_key(name)}"]
            their.copy_(value.view_as(their))
    return peer


SCHEDULES = {
    "all at once": {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_steps": 6},
    "with rests": {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_steps": 12},
    "the final choice between two": {"tinit": 1, "tfinal": 2, "deltaT": 4, "total_steps": 9},
    "other smoothing": {"tinit": 1, "tfinal": 4, "deltaT": 1, "total_steps": 10, "beta1": 0.5, "beta2": 0.6},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_are_shared_out_as_peft_does(name: str) -> None:
    """Both take the same gradients, step for step: the same values and the same zeros among the lambdas."""
    settings = SCHEDULES[name]
    steps = settings["total_steps"]
    ours, theirs = twin_models(tf.LlamaConfig(**SIZES), torch.float64)
    adapter = attach(ours, {**ONE, **settings})
    options = {("total_step" if key == "total_steps" else key): value for key, value in settings.items()}
    peer = with_our_values(peft.get_peft_model(theirs, config(**options)).double(), adapter)
    known = dict(peer.named_parameters())
    pairs = {key: (p, known[f"base_model.model.{their_key(key)}"]) for key, p in adapter.trainable.items()}
    makers = [torch.optim.AdamW([pair[i] for pair in pairs.values()], lr=1e-2) for i in (0, 1)]
    packs = plan_packs(examples(), budget=10_000)
    left = []
    for step in range(1, steps + 1):
        run_packs(ours, packs, adapter)
        for own, their in pairs.values():
            their.grad = own.grad.view_as(their).clone()
        for optimizer in makers:
            optimizer.step()
        adapter.after_step()
        peer.base_model.update_and_allocate(step)
        for key, (own, their) in pairs.items():
            assert torch.allclose(own.view_as(their), their, rtol=0, atol=1e-14), (step, key)
        left.append(sum(int((p != 0).sum()) for key, (p, _) in pairs.items() if key.endswith("singular")))
    assert left[0] == (6 * 4 if settings["tinit"] else left[0]) and left[-1] == 6 * 2, left
    pattern = peer.peft_config["default"].rank_pattern
    for place, delta in adapter.deltas.items():
        assert delta.keep.bool().tolist() == pattern[f"{place.removesuffix('.edit')}.lora_E.default"]


def trained(adapter: Adapter, model: Llama, steps: range) -> None:
    """Some steps of plain gradient descent, which keeps no state of its own."""
    packs = plan_packs(examples(), budget=10_000)
    for _ in steps:
        run_packs(model, packs, adapter)
        with torch.no_grad():
            for p in adapter.trainable.values():
                p.sub_(p.grad, alpha=0.5)
        adapter.after_step()


@pytest.mark.parametrize("at", [1, 4, 6, 7, 9])
def test_resumed_to_the_bit(at: int) -> None:
    """The state that a checkpoint holds is all that the choice of ranks depends on."""
    spec = {**ONE, "tinit": 1, "tfinal": 3, "deltaT": 2}
    model = build()
    adapter = attach(model, spec)
    adapter.begin(10)
    trained(adapter, model, range(at))
    halfway = {key: value.clone() for key, value in adapter.state().items()}
    trained(adapter, model, range(at, 10))
    fresh = build()
    again = attach(fresh, spec, seed=5)
    again.begin(10)
    again.load_state(halfway, "checkpoint")
    trained(again, fresh, range(at, 10))
    assert all(torch.equal(value, again.state()[key]) for key, value in adapter.state().items())
    assert sum(int(delta.keep.sum()) for delta in adapter.deltas.values()) == 4 * 2


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 100, Schedule(100, 10, 50, 1)),
        ({}, 1000, Schedule(1000, 100, 500, 10)),
        ({}, 1, Schedule(1, 0, 0, 1)),
        ({"tinit": 5, "tfinal": 20, "deltaT": 3}, 100, Schedule(100, 5, 20, 3)),
        ({"total_steps": 40}, 100, Schedule(40, 4, 20, 1)),
        ({}, None, None),
    ],
)
def test_schedule_follows_the_run(settings: dict, steps: int | None, expected: Schedule | None) -> None:
    assert schedule_of(AdaLoRASettings(**settings), steps) == expected


def test_budget_is_cubic() -> None:
    """From equation 12 of the paper."""
    schedule = Schedule(100, 10, 30, 1)
    assert [schedule.budget(step, 120, 40) for step in (10, 25, 40, 70)] == [120, int(40 + 80 * 0.75**3), 50, 40]
    assert [step for step in range(1, 101) if schedule.chooses(step)] == list(range(11, 71))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"init_rank": 4, "target_rank": 5}, "target_rank: 5 is above init_rank, 4"),
        ({"target_modules": ["embed_tokens"]}, "names no module"),
        ({"beta1": 1.0}, "beta1"),
        ({"deltaT": 0}, "deltaT"),
    ],
)
def test_settings_that_cannot_be_meant(spec: dict, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        attach(build(), {**ONE, **spec})


def test_a_schedule_without_room_is_refused_before_the_first_step() -> None:
    adapter = attach(build(), {**ONE, "tinit": 30, "tfinal": 30})
    with pytest.raises(ConfigError, match="30 steps before ranks fall and 30 after leave none of 60"):
        adapter.begin(60)
    adapter.begin(61)


OURS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "alpha": 3.5},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|down)_proj", "dropout": 0.1},
    "layers": {"target_modules": "all-linear", "layers_to_transform": [1], "total_steps": 50, "tinit": 3},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft_and_back(name: str, tmp_path: Path) -> None:
    check_ours({**ONE, **OURS[name]}, tmp_path)


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"tinit": 5, "tfinal": 7, "deltaT": 3}])
def test_theirs_here_and_back(options: dict, tmp_path: Path) -> None:
    check_theirs(config(**options), tmp_path)
    assert read_info(tmp_path / "theirs").kind == "adalora"
    said = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours")]
    for key in ("init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"):
        assert said[0][key] == said[1][key], key


@pytest.fixture
def pruned(tmp_path: Path) -> Iterator[tuple[Path, torch.Tensor, Llama]]:
    """An adapter of ours whose ranks were shared out, saved; its live logits, and a base."""
    reference("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, {**ONE, "total_steps": 4, "tinit": 0, "tfinal": 1, "deltaT": 1})
    disturb(adapter)
    trained(adapter, model, range(4))
    assert {int(delta.keep.sum()) for delta in adapter.deltas.values()} > {2}, "every module has the same rank"
    yield save(adapter, tmp_path / "ours"), our_logits(model), load_model(tmp_path / "base")


def test_dropped_triplets_are_not_in_the_file(pruned: tuple[Path, torch.Tensor, Llama]) -> None:
    """PEFT reads it, and writes it back as it was; so do we."""
    folder, live, model = pruned
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(len(t) for key, t in tensors.items() if key.endswith("lora_E")) == 6 * 2
    adapter = load_adapter(folder, model)
    assert agree(our_logits(model), live)
    peer = peft.PeftModel.from_pretrained(reference("llama"), folder)
    with torch.no_grad():
        assert agree(peer.eval()(torch.arange(3, 60)[None]).logits[0], live)
    peer.save_pretrained(folder.parent / "theirs")
    save(adapter, folder.parent / "again")
    for other in ("theirs", "again"):
        found = load_file(folder.parent / other / "adapter_model.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_module_may_lose_all_its_ranks(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapter = attach(model, ONE)
    disturb(adapter)
    delta = adapter.deltas["model.layers.1.mlp.down_proj.edit"]
    delta.keep.fill_(0)
    delta.prune()
    folder = save(adapter, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(reference("llama"), folder).eval()
    again = load_model(tmp_path / "base")
    load_adapter(folder, again)
    with torch.no_grad():
        assert agree(peer(torch.arange(3, 60)[None]).logits[0], our_logits(model))
    assert agree(our_logits(again), our_logits(model))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ([1], "should map modules to lists"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True]}, "should list 4 times true or false"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [1, 1, 0, 0]}, "should list 4 times true or false"),
        ({"model.layers.9.self_attn.q_proj.lora_E": [True] * 4}, "is no adapted module here"),
        ({}, "has shape"),
    ],
)
def test_a_damaged_pattern_is_named(pattern: Any, said: str, pruned: tuple[Path, torch.Tensor, Llama]) -> None:
    folder, _, model = pruned
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": pattern}))
    with pytest.raises(AdapterError, match=said):
        load_adapter(folder, model)


def test_a_huge_rank_in_a_file_allocates_nothing(tmp_path: Path) -> None:
    peer = peft.get_peft_model(reference("llama"), config())
    move(peer)
    peer.save_pretrained(tmp_path / "a")
    reference("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_r": 1 << 20}))
    with pytest.raises(AdapterError, match=r"expected \[1048576, 64\]"):
        load_adapter(tmp_path / "a", load_model(tmp_path / "base"))


def test_count() -> None:
    """P, Q and lambda of rank 12 on LLaMA-7B's linears: 12 of LoRA's 64 ranks, and 12 values a module."""
    method = find_method("adalora")
    with torch.device("meta"):
        placements = list(method.place(Llama(shape("llama-7b")), AdaLoRASettings()))
    count = sum(p.numel() for placed in placements for p in placed.delta.parameters())
    assert count == 159_907_840 * 12 // 64 + 12 * 224
