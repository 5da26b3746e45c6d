"""Checkpoints: bit for bit back, and always some complete one to go on from, whatever happens while one is written."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy
import pytest
import torch

from tunesmith.errors import CheckpointError, DiskError
from tunesmith.files import MARKER, clean_leftovers, is_complete
from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    unpack_optimizer,
)
from tunesmith.train.optim import build_optimizer

CALLS = ("open", "write", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir")


@pytest.fixture
def quick_folder(tmp_path):
    """A folder in memory where there is one: hundreds of real syncs of a busy disk would take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def digest(tensors) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def content(step: int) -> dict:
    """Tensors that say which step they belong to, so that a mixture of two checkpoints would be seen."""
    return {
        "adapter": {"a.weight": torch.full((3, 5), float(step)), "b": torch.full((2,), step, dtype=torch.bfloat16)},
        "optimizer": {"a.weight.exp_avg": torch.full((3, 5), step / 7, dtype=torch.float64)},
    }


def save(run: Path, step: int) -> Path:
    return save_checkpoint(run, step, tensors=content(step), state={"step": step, "loss": step / 3})


def assert_is(path: Path, step: int) -> None:
    tensors, state = load_checkpoint(path)
    assert path.name == f"checkpoint-{step:06d}"
    assert state == {"step": step, "loss": step / 3}
    assert {g: digest(t) for g, t in tensors.items()} == {g: digest(t) for g, t in content(step).items()}


def step_of(path: Path | None) -> int:
    return 0 if path is None else int(path.name.split("-")[1])


def test_round_trip_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "x": {"bf": torch.randn(4, 3).bfloat16(), "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])},
        "empty": {},
    }
    state = {"pi": 0.1 + 0.2, "list": [1, None, "ü"], "big": 2**70, "best": float("-inf")}
    loaded, back = load_checkpoint(save_checkpoint(tmp_path, 200, tensors=tensors, state=state))
    assert (tmp_path / "checkpoint-000200" / MARKER).exists()
    assert back == state and loaded.keys() == tensors.keys()
    assert {g: digest(t) for g, t in loaded.items()} == {g: digest(t) for g, t in tensors.items()}


def test_no_pickle_is_written_or_read(tmp_path):
    path = save(tmp_path, 1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json", ""}
    source = Path(load_checkpoint.__code__.co_filename).read_text()
    assert "torch.load" not in source and "import pickle" not in source and "torch.save" not in source


def test_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path, 1, tensors={}, state={"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="group"):
        save_checkpoint(tmp_path, 1, tensors={"../x": {}}, state={})
    assert list(tmp_path.iterdir()) == []


def test_latest_skips_the_incomplete_and_names_it(tmp_path, caplog):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "absent") is None
    for step in (5, 100, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "checkpoint-000300").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert_is(latest_checkpoint(tmp_path), 1_000_000)
    (tmp_path / "checkpoint-1000000" / "adapter.safetensors").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert_is(latest_checkpoint(tmp_path), 100)
    assert "checkpoint-1000000" in caplog.text and "adapter.safetensors" in caplog.text
    assert "checkpoint-000300" in caplog.text and "never finished" in caplog.text
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [5, 100]


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_names_the_file_and_the_older_checkpoint(tmp_path, file):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((new / file).read_bytes())
    data[-3] ^= 1  # the size stays: only the hash can tell
    (new / file).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(new)
    assert str(new / file) in str(caught.value) and str(old) in str(caught.value)
    (old / MARKER).unlink()
    with pytest.raises(CheckpointError, match="no older complete checkpoint"):
        load_checkpoint(new)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "checkpoint-000009")


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    (tmp_path / "checkpoint-000006" / MARKER).unlink()  # not complete: it must not count as the newest
    removed = prune_checkpoints(tmp_path, 2, protect=(tmp_path / "checkpoint-000001", None))
    assert [step_of(p) for p in removed] == [2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-00000{n}" for n in (1, 4, 5, 6)}
    prune_checkpoints(tmp_path, 0)
    assert_is(latest_checkpoint(tmp_path), 5)


def save_and_prune(run: Path, step: int) -> None:
    save(run, step)
    prune_checkpoints(run, 1)


def fault_in_child(run: Path, step: int, at: int, act) -> int:
    """Save and prune in a forked child where `act` happens at the `at`-th call of os; give its exit code."""
    child = os.fork()
    if child == 0:
        calls = 0

        def wrap(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == at:
                    act()
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        try:
            save_and_prune(run, step)
            os._exit(0)
        except DiskError:
            os._exit(DiskError.exit_code)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_kill_at_every_call_of_a_save_leaves_a_complete_checkpoint(quick_folder):
    save(quick_folder, 1)
    step = at = 1
    points = 0
    while True:
        code = fault_in_child(quick_folder, step + 1, at, lambda: os._exit(9))
        assert code in (0, 9)
        latest = latest_checkpoint(quick_folder)
        assert step_of(latest) in (step, step + 1)
        assert_is(latest, step_of(latest))
        assert all(is_complete(p) for p in quick_folder.iterdir())  # no temporary one, nor half of a pruned one
        step = step_of(latest)
        if code == 0:
            break
        points, at = points + 1, at + 1
    assert points > 30 and step > 1


def test_kill_while_a_checkpoint_of_the_same_step_is_replaced(quick_folder):
    save(quick_folder, 1)
    at = 1
    while (code := fault_in_child(quick_folder, 1, at, lambda: os._exit(9))) == 9:
        assert_is(latest_checkpoint(quick_folder), 1)
        at += 1
    assert code == 0 and at > 30


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_error_at_every_call_leaves_the_previous_and_exits_3(quick_folder, code):
    def fail():
        raise OSError(code, "planted")

    save(quick_folder, 1)
    results = []
    for at in range(1, 200):
        results.append(fault_in_child(quick_folder, 2, at, fail))
        latest = latest_checkpoint(quick_folder)
        assert_is(latest, step_of(latest))
        if step_of(latest) == 2:  # the fault came after the rename: start again
            save(quick_folder, 1)
            (quick_folder / "checkpoint-000002").rename(quick_folder / "checkpoint-000000")
            prune_checkpoints(quick_folder, 1)
        if results[-1] == 0 and results[-8:].count(0) == 8:  # faults in the removal of old folders are harmless
            break
    assert set(results) == {0, 3} and results.count(3) > 25


def keep_saving(run: Path, newest: int, report: int) -> None:
    """What the child does until it is killed: save, prune, report a byte."""
    try:
        clean_leftovers(run)
        for step in range(newest + 1, 10**6):
            os.write(report, b".")
            save_and_prune(run, step)
    finally:
        os._exit(1)


def test_sigkill_at_random_moments_always_leaves_a_complete_checkpoint(quick_folder):
    generator = random.Random(0)
    started = time.monotonic()
    save(quick_folder, 1)
    duration, newest = time.monotonic() - started, 1
    for _ in range(200):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            keep_saving(quick_folder, newest, writing)
        for _ in range(generator.randint(1, 3)):  # moments are counted in saves, so that a busy machine changes nothing
            os.read(reading, 1)
        time.sleep(generator.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading), os.close(writing)
        latest = latest_checkpoint(quick_folder)
        assert step_of(latest) >= newest
        newest = step_of(latest)
        assert_is(latest, newest)
    assert newest > 150  # the children really saved


def draws() -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
    ]


def test_random_states_go_on_exactly(tmp_path):
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    draws()  # leaves a cached Gaussian in Python and numpy
    tensors, state = rng_state()
    expected = [draws() for _ in range(3)]
    loaded, back = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"rng": tensors}, state={"rng": state}))
    restore_rng_state(loaded["rng"], back["rng"])
    assert [draws() for _ in range(3)] == expected
    again, _ = rng_state()
    restore_rng_state(loaded["rng"], back["rng"])
    assert digest(rng_state()[0]) == digest(tensors) != digest(again)


def test_random_states_of_another_number_of_devices_are_refused():
    tensors, state = rng_state()
    with pytest.raises(CheckpointError, match="CUDA"):
        restore_rng_state({**tensors, "cuda.99": tensors["torch"]}, state)


def model_and_optimizer(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {"0.weight": 10.0, "0.bias": 10.0}
    parameters = dict(model.named_parameters())
    return model, build_optimizer(parameters, learning_rate=0.01, lr_scale=scales, **options), names


def advance(model, optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw_8bit"}, {"offload": "disk"}])
def test_optimizer_goes_on_exactly(tmp_path, options):
    if "offload" in options:
        options = {**options, "folder": tmp_path}
    model, optimizer, names = model_and_optimizer(**options)
    model[1].bias.requires_grad_(False)  # a parameter without a state
    advance(model, optimizer, 3, seed=1)
    packed = pack_optimizer(optimizer, names)
    assert {"0.weight.exp_avg", "0.weight.step", "1.weight.exp_avg_sq"} <= packed.keys() and "1.bias.step" not in packed
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded, _ = load_checkpoint(
        save_checkpoint(tmp_path, 3, tensors={"adapter": weights, "optimizer": packed}, state={})
    )
    advance(model, optimizer, 3, seed=2)

    twin, twin_optimizer, twin_names = model_and_optimizer(**options)
    twin[1].bias.requires_grad_(False)
    advance(twin, twin_optimizer, 2, seed=9)  # an old state that must not survive
    twin.load_state_dict(loaded["adapter"])
    unpack_optimizer(twin_optimizer, twin_names, loaded["optimizer"])
    advance(twin, twin_optimizer, 3, seed=2)
    assert digest(twin.state_dict()) == digest(model.state_dict())
    assert digest(pack_optimizer(twin_optimizer, twin_names)) == digest(pack_optimizer(optimizer, names))


def test_optimizer_of_another_adapter_is_refused_untouched():
    model, optimizer, names = model_and_optimizer()
    advance(model, optimizer, 1, seed=1)
    packed = pack_optimizer(optimizer, names)
    before = digest(packed)
    with pytest.raises(CheckpointError, match="stranger"):
        unpack_optimizer(optimizer, names, {**packed, "stranger.step": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"is \(7,\), torch.float32 where .* has \(3, 4\)"):
        unpack_optimizer(optimizer, names, {**packed, "0.weight.exp_avg": torch.ones(7)})
    with pytest.raises(CheckpointError, match="no name"):
        pack_optimizer(optimizer, {})
    assert digest(pack_optimizer(optimizer, names)) == before
