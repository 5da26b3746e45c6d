"""AdamW in 8 bits: a step against bitsandbytes and against float64, what is held in 8 bits, the memory, a tiny run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.laws.small import TINY, build, examples, packs_of, run_packs
from tests.train.moves import Moves, same
from torch.nn import Parameter

from tunesmith.adapters import attach
from tunesmith.errors import CheckpointError
from tunesmith.quant.dynamic import BLOCK, decode, dynamic_map, encode
from tunesmith.train import adamw
from tunesmith.train.optim import build_optimizer, state_bytes, workspace_bytes
from tunesmith.train.simulate import LiveBytes

UP = "model.layers.0.mlp.up_proj.weight"
RATE, BETAS, EPS, DECAY, STEP = 1e-2, (0.9, 0.999), 1e-8, 0.1, 7
MAPS = {"exp_avg": True, "exp_avg_sq": False}


def half_way() -> tuple[Parameter, dict[str, torch.Tensor]]:
    """A parameter with a gradient, and its states after a few steps."""
    draw = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(100, 77, generator=draw))
    p.grad = torch.randn(p.shape, generator=draw) * 1e-2
    moments = {
        "exp_avg": torch.randn(p.numel(), generator=draw) * 1e-2,
        "exp_avg_sq": torch.rand(p.numel(), generator=draw) * 1e-4,
    }
    state = {"step": torch.tensor(float(STEP - 1))}
    for name, signed in MAPS.items():
        codes, absmax = encode(moments[name], signed)
        state |= {name: codes.view(p.shape), f"{name}_absmax": absmax}
    return p, state


def ours(p: Parameter, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The parameter and its states after one step."""
    optimizer = build_optimizer(
        {UP: p}, learning_rate=RATE, weight_decay=DECAY, betas=BETAS, eps=EPS, optimizer="adamw_8bit"
    )
    optimizer.put({p: state})
    optimizer.step()
    return p.detach(), optimizer.state[p]


def test_a_step_is_the_formula_in_float64_and_codes_are_the_nearest() -> None:
    p, state = half_way()
    before, grad = p.detach().double().flatten(), p.grad.double().flatten()
    m, v = (decode(state[n].flatten(), state[f"{n}_absmax"], s).double() for n, s in MAPS.items())
    m, v = BETAS[0] * m + (1 - BETAS[0]) * grad, BETAS[1] * v + (1 - BETAS[1]) * grad**2
    change = m / (1 - BETAS[0] ** STEP) / ((v / (1 - BETAS[1] ** STEP)).sqrt() + EPS)
    expected = before - RATE * (change + DECAY * before)
    after, state = ours(p, state)
    assert after.flatten().double().sub(expected).abs().max() < 1e-6 and state["step"] == STEP
    for (name, signed), moment in zip(MAPS.items(), (m, v), strict=True):
        table = torch.tensor(dynamic_map(signed), dtype=torch.float64)
        scaled = torch.cat([b / b.abs().max() for b in moment.split(BLOCK)])
        best = (scaled[:, None] - table).abs().argmin(1)
        assert (best != state[name].flatten().long()).float().mean() < 1e-3  # float32 rounds a few across a middle
        assert (best - state[name].flatten().long()).abs().max() <= 1


def test_a_step_is_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    p, state = half_way()
    theirs = {name: value.clone() for name, value in state.items()}
    q = p.detach().clone()
    tables = [torch.tensor(dynamic_map(signed)) for signed in MAPS.values()]
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", p.grad, q, theirs["exp_avg"], theirs["exp_avg_sq"], *BETAS, 0.0, 0.0, EPS, STEP, RATE, *tables,
        theirs["exp_avg_absmax"], theirs["exp_avg_sq_absmax"], DECAY, 1.0,
    )  # fmt: skip
    after, state = ours(p, state)
    torch.testing.assert_close(after, q, rtol=1e-6, atol=1e-6)
    for name, signed in MAPS.items():
        torch.testing.assert_close(state[f"{name}_absmax"], theirs[f"{name}_absmax"], rtol=1e-6, atol=0)
        table = torch.tensor(dynamic_map(signed))  # its CPU kernel looks codes up in bins, 0.01 wide
        assert ((table[state[name].int()] - table[theirs[name].int()]).abs() < 0.02).all()


def test_matrices_are_in_8_bits_and_embedding_vectors_and_small_tensors_are_not() -> None:
    moves = Moves(optimizer="adamw_8bit").go(1)
    states = moves.states()
    eight = {name.rpartition(".")[0] for name, value in states.items() if value.dtype == torch.uint8}
    assert eight == {UP, "model.layers.0.mlp.down_proj.weight"}
    held = sum(value.nbytes for name, value in states.items() if not name.endswith(".step"))
    used = {name: p for name, p in moves.parameters.items() if name != "unused"}
    assert held == state_bytes(used, "adamw_8bit") < 0.55 * state_bytes(used)
    layer = {"up_proj.weight": torch.empty(1024, 4096, device="meta")}
    assert state_bytes(layer) == 8 * 1024 * 4096 and state_bytes(layer, "adamw_8bit") == 2.03125 * 1024 * 4096


def test_vectors_move_as_in_32_bits_and_matrices_nearly() -> None:
    exact, eight = (Moves(spread=1.0, optimizer=name).go(6).values() for name in ("adamw", "adamw_8bit"))
    start = Moves().values()
    for name, value in exact.items():
        moved = (value - start[name]).abs().mean()
        off = (eight[name] - value).abs().mean()
        assert off <= (0.05 * moved if name.endswith(("up_proj.weight", "down_proj.weight")) else 0), name


def test_the_fused_step_needs_no_memory() -> None:
    p = {UP: Parameter(torch.zeros(400, 500))}
    made = build_optimizer(p, learning_rate=1e-3)
    for _ in range(2):
        p[UP].grad = torch.randn(400, 500)
        with LiveBytes() as live:  # of the second step: the first makes the states
            live.ignore([p[UP], p[UP].grad, *made.state[p[UP]].values()])
            made.step()
    assert live.peak == workspace_bytes(p) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_no_float32_copy_of_a_whole_state_ever_exists(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw.SLICES, "cpu", 4096)
    p = {UP: Parameter(torch.zeros(400, 500))}
    made = build_optimizer(p, learning_rate=1e-3, optimizer=optimizer, offload="cpu")
    for _ in range(2):
        p[UP].grad = torch.randn(400, 500)
        with LiveBytes() as live:
            live.ignore([p[UP], p[UP].grad, *made.state[p[UP]].values()])
            made.step()
    said = workspace_bytes(p, optimizer, "cpu")  # and the number of the step, twice 4 bytes
    assert 0.8 * said <= live.peak - 8 <= said < 0.6 * p[UP].nbytes


def test_a_tiny_full_run_learns_as_in_32_bits() -> None:
    def run(optimizer: str) -> list[float]:
        model = build(replace(TINY, hidden_size=48, intermediate_size=96, head_dim=12), torch.float32).train()
        adapter = attach(model, {"kind": "full"})
        packs = packs_of(model, examples())
        made = build_optimizer(adapter.trainable, learning_rate=2e-3, optimizer=optimizer)
        losses = []
        for _ in range(30):
            losses.append(run_packs(model, packs, adapter)[0])
            made.step()
        if optimizer == "adamw_8bit":
            assert any(value.dtype == torch.uint8 for state in made.state.values() for value in state.values())
        return losses

    exact, eight = run("adamw"), run("adamw_8bit")
    assert exact[-1] < 0.3 * exact[0]
    for a, b in zip(exact, eight, strict=True):
        assert math.isclose(a, b, rel_tol=0.05, abs_tol=0.02)


def test_states_of_another_width_are_refused(tmp_path) -> None:
    wide, eight = Moves().go(1).save(tmp_path / "wide"), Moves(optimizer="adamw_8bit").go(1).save(tmp_path / "eight")
    before = Moves(optimizer="adamw_8bit").go(1)
    states = before.states()
    with pytest.raises(CheckpointError, match=r"exp_avg.*float32 where this run's optimizer has .*uint8"):
        before.load(wide)
    assert same(before.states(), states)
    with pytest.raises(CheckpointError, match=r"_absmax.* train\.optimizer"):
        Moves(offload="cpu").load(eight)
