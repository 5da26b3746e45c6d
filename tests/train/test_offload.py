"""Where states lie changes no bit; a checkpoint goes on anywhere; the mapped file leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.moves import Moves, same
from torch.nn import Parameter

from tunesmith.errors import ConfigError, DiskError
from tunesmith.train import adamw
from tunesmith.train.optim import build_optimizer

PLACES = [("adamw", "cpu"), ("adamw", "disk"), ("adamw_8bit", "cpu"), ("adamw_8bit", "disk")]


@pytest.fixture(params=[1 << 18, 4096, 1280], ids=lambda size: f"slices-{size}")
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(adamw.SLICES, "cpu", request.param)
    return request.param


@pytest.mark.parametrize(("optimizer", "offload"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
def test_the_place_changes_no_bit(
    optimizer: str, offload: str, dtype: torch.dtype, slices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Moves(dtype, optimizer=optimizer, offload=offload, folder=tmp_path).go(4)
    monkeypatch.setitem(adamw.SLICES, "cpu", 1 << 18)
    resident = Moves(dtype, optimizer=optimizer).go(4)  # in 32 bits, torch's own AdamW
    assert same(moved.values(), resident.values()) and same(moved.states(), resident.states())


@pytest.mark.parametrize("start", [("adamw", "none"), *PLACES[:3]])
def test_a_checkpoint_goes_on_wherever_the_states_lie(start: tuple[str, str], tmp_path: Path) -> None:
    optimizer, offload = start
    whole = Moves(optimizer=optimizer).go(5)
    checkpoint = Moves(optimizer=optimizer, offload=offload, folder=tmp_path).go(2).save(tmp_path)
    for place in ("none", "cpu", "disk"):
        fresh = Moves(optimizer=optimizer, offload=place, folder=tmp_path).load(checkpoint).go(3)
        assert same(fresh.values(), whole.values()) and same(fresh.states(), whole.states())
    used = Moves(optimizer=optimizer, offload="disk", folder=tmp_path)
    used.parameters["unused"].grad = torch.ones(70, 70)
    used.optimizer.step()
    used.load(checkpoint).go(3)
    assert same(used.values(), whole.values())
    left = used.states()
    assert not any(left.pop(name).any() for name in list(left) if name.startswith("unused."))
    assert same(left, whole.states())


def test_the_file_has_no_name_and_its_pages_do_not_stay(tmp_path: Path) -> None:
    p = {"up_proj.weight": Parameter(torch.zeros(1000, 1000))}
    made = build_optimizer(p, learning_rate=1e-3, offload="disk", folder=tmp_path)
    p["up_proj.weight"].grad = torch.ones(1000, 1000)
    made.step()
    assert list(tmp_path.iterdir()) == [] and made.state[p["up_proj.weight"]]["exp_avg"].min() > 0
    made.step()
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("NOT TESTED: what stays in memory (no /proc here)")
    (own,) = re.findall(rf"^[^\n]*{re.escape(str(tmp_path))}/.*?^VmFlags", maps.read_text(), re.M | re.S)
    kib = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", own, re.M)}
    assert kib["Size"] * 1024 >= 8_000_000 and kib["Rss"] < 500


def test_a_full_disk_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskError, match=r"bytes needed\): No space left.*train\.offload=cpu"):
        Moves(offload="disk", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DiskError, match="nowhere"):
        Moves(offload="disk", folder=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="run folder"):
        Moves(offload="disk")


def test_room_is_made_without_fallocate_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert same(Moves(offload="disk", folder=tmp_path).go(2).values(), Moves().go(2).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: states in pinned memory (no CUDA here)")
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_on_cuda_the_place_changes_no_bit(optimizer: str, offload: str, tmp_path: Path) -> None:
    def run(place: str) -> torch.Tensor:
        p = {"up_proj.weight": Parameter(torch.linspace(-1, 1, 999_000, device="cuda").view(999, 1000))}
        made = build_optimizer(p, learning_rate=1e-2, optimizer=optimizer, offload=place, folder=tmp_path)
        for step in range(3):
            p["up_proj.weight"].grad = torch.sin(p["up_proj.weight"].detach() * 50 + step)
            made.step()
        return p["up_proj.weight"].detach().cpu()

    assert torch.equal(run(offload), run("none"))
