"""The paged optimizer: bitsandbytes' own, on CUDA; elsewhere what is used instead is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.train.moves import Moves, same

from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.train.optim import OPTIMIZERS, Choice, build_optimizer, choose_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}
# Without a GPU bitsandbytes steps all the same, with nothing paged, and warns of it.
with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="NOT TESTED: bitsandbytes is not installed here"
)
unpaged = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize(("asked", "used"), PAGED.items())
def test_without_a_gpu_there_is_no_paging_and_one_line_says_so(asked: str, used: str) -> None:
    choice = choose_optimizer(asked, "none", CPU)
    assert (choice.optimizer, choice.offload) == (used, "none")
    (line,) = choice.notes
    assert asked in line and "a CPU has no GPU memory to page" in line and f"{used} is used" in line


def test_without_bitsandbytes_there_is_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose_optimizer("paged_adamw", "none", CUDA)
    assert choice.optimizer == "adamw" and "pip install bitsandbytes" in choice.notes[0]
    assert choose_optimizer("adamw_8bit", "cpu", CUDA) == Choice("adamw_8bit", "cpu")


@with_bitsandbytes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_what_was_asked_for_is_used(name: str) -> None:
    assert choose_optimizer(name, "none", CUDA) == Choice(name, "none")


def test_main_memory_is_no_other_place_for_a_model_that_is_there() -> None:
    choice = choose_optimizer("adamw", "cpu", CPU)
    assert choice.offload == "none" and "are there already" in choice.notes[0]
    assert choose_optimizer("adamw", "disk", CPU) == Choice("adamw", "disk")


@with_bitsandbytes
def test_unknown_and_contradictory_words_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paged_adamw'"):
        choose_optimizer("paged_adam", "none", CPU)
    with pytest.raises(ConfigError, match="did you mean 'adamw_8bit'"):
        Moves(optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="keep one"):
        Moves(optimizer="paged_adamw", offload="cpu")


@with_bitsandbytes
@unpaged
@pytest.mark.parametrize(("paged", "plain"), PAGED.items())
def test_it_moves_as_ours_and_holds_the_same_states(paged: str, plain: str) -> None:
    theirs, ours = Moves(spread=1.0, optimizer=paged).go(4), Moves(spread=1.0, optimizer=plain).go(4)
    start, eight = Moves().values(), OPTIMIZERS[paged].eight
    for name, value in ours.values().items():
        moved = (value - start[name]).abs().mean()
        assert (theirs.values()[name] - value).abs().mean() <= (0.05 if eight else 1e-5) * moved, name
    a, b = theirs.states(), ours.states()
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


@with_bitsandbytes
@unpaged
@pytest.mark.parametrize("paged", PAGED)
def test_a_checkpoint_of_it_goes_on_to_the_same_bits(paged: str, tmp_path: Path) -> None:
    whole = Moves(optimizer=paged).go(5)
    fresh = Moves(optimizer=paged).load(Moves(optimizer=paged).go(2).save(tmp_path)).go(3)
    assert same(fresh.values(), whole.values()) and same(fresh.states(), whole.states())
    other = Moves(optimizer="paged_adamw_8bit" if paged == "paged_adamw" else "paged_adamw")
    with pytest.raises(CheckpointError, match=r"train\.optimizer"):
        other.load(fresh.save(tmp_path / "other"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: paging itself (no CUDA here)")
@with_bitsandbytes
@pytest.mark.parametrize("paged", PAGED)
def test_on_a_gpu_large_states_are_paged_and_a_checkpoint_goes_on(paged: str, tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 400_000, device="cuda").view(500, 800))
        return p, build_optimizer({"up_proj.weight": p}, learning_rate=1e-2, optimizer=paged)

    def go(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
        for step in steps:
            p.grad = torch.sin(p.detach() * 50 + step)
            optimizer.step()
        return p.detach().clone()

    p, optimizer = made()
    go(p, optimizer, range(2))
    assert optimizer.state[p]["state1"].is_paged
    states = {k: v.clone() for k, v in optimizer.states()[p].items()}
    q, fresh = made()
    q.data.copy_(p.data)
    fresh.put({q: states})
    assert torch.equal(go(q, fresh, range(2, 4)), go(p, optimizer, range(2, 4)))
