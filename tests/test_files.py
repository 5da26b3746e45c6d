"""Atomic writes: the same bytes as safetensors itself, in the right order, and whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tunesmith import files
from tunesmith.errors import DiskError

STEPS = ("open", "write", "fsync", "mkdir", "replace", "rename")  # every call of os that a save makes


@pytest.fixture
def quick_folder(tmp_path):
    """A folder in memory where there is one: hundreds of real syncs of a busy disk would take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class Fault:
    """Counts the calls of `STEPS` and lets `act` happen instead of call number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act, at: int | None = None, only=STEPS):
        self.calls: list[tuple[str, object]] = []
        for name in only:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name), act, at))

    def _wrap(self, name, real, act, at):
        def call(*args, **kwargs):
            self.calls.append((name, args[0]))
            if at is not None and len(self.calls) == at:
                act()
            return real(*args, **kwargs)

        return call


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_in_child(action, at: int) -> bool:
    """Run `action` in a forked child that dies like a SIGKILL at the `at`-th call of os; True if it came that far."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, lambda: os._exit(9), at)
            code = 0
            try:
                action()
            except BaseException:
                code = 1
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def every_kill(action, check, reset=lambda: None) -> int:
    """Kill `action` at its first, second, ... call of os and `check` after each; give the number of points."""
    at = 1
    while True:
        reset()
        died = killed_in_child(action, at)
        check()
        if not died:
            return at - 1
        at += 1


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


TENSORS = {
    "matrix": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "vector": torch.arange(5.0),
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.float16),
    "long": torch.tensor([2**60]),
    "é": torch.arange(6.0).view(2, 3).T,
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_file_has_the_bytes_of_the_safetensors_library(tmp_path, metadata):
    files.atomic_save_safetensors(tmp_path / "x.safetensors", TENSORS, metadata)
    assert (tmp_path / "x.safetensors").read_bytes() == save({k: v.contiguous() for k, v in TENSORS.items()}, metadata)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(loaded[k].dtype == v.dtype and torch.equal(loaded[k], v) for k, v in TENSORS.items())
    assert names(tmp_path) == {"x.safetensors"}


def test_text_and_json_round_trip(tmp_path):
    files.atomic_write_text(tmp_path / "new" / "folder" / "t.txt", "é\n")
    assert (tmp_path / "new" / "folder" / "t.txt").read_bytes() == "é\n".encode()
    value = {"x": 0.1 + 0.2, "n": None, "l": [1, "ü"]}
    files.atomic_write_json(tmp_path / "v.json", value)
    assert json.loads((tmp_path / "v.json").read_text("utf-8")) == value


def test_partial_writes_of_the_system_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    files.atomic_write_bytes(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_order_is_write_sync_rename_sync_of_the_folder(tmp_path, monkeypatch):
    fault = Fault(monkeypatch, None)
    files.atomic_write_bytes(tmp_path / "x", b"1")
    order = [name for name, _ in fault.calls if name != "mkdir"]
    assert order == ["open", "write", "fsync", "replace", "open", "fsync"]


def test_kill_at_every_call_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "x.json"

    def check():
        assert path.read_bytes() in (b"old", b"new")
        files.clean_leftovers(tmp_path)
        assert names(tmp_path) == {"x.json"}

    points = every_kill(lambda: files.atomic_write_bytes(path, b"new"), check, reset=lambda: path.write_bytes(b"old"))
    assert points >= 6
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_error_names_path_and_bytes_and_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(code, "planted")

    for step in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(DiskError) as caught:
                files.atomic_write_bytes(path, b"n" * 1234)
        assert str(path) in str(caught.value) and "1,234 bytes needed" in str(caught.value)
        assert caught.value.exit_code == 3
        assert path.read_bytes() == b"old" and names(tmp_path) == {"x.bin"}


def test_a_full_device_is_a_disk_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(DiskError, match="full"):
        files.append_line("/dev/full", "x")


def fill(folder: Path, text: str) -> None:
    with files.atomic_folder(folder) as staging:
        files.atomic_write_text(staging / "a.txt", text)
        (staging / "sub").mkdir()
        (staging / "sub" / "b.txt").write_text(text)


def test_folder_is_sealed_and_checked(tmp_path):
    folder = tmp_path / "out"
    fill(folder, "one")
    assert files.is_complete(folder) and files.damage(folder) is None
    listed = json.loads((folder / files.MARKER).read_text())["files"]
    assert listed.keys() == {"a.txt", "sub/b.txt"}
    assert listed["a.txt"] == {"bytes": 3, "sha256": files.sha256_file(folder / "a.txt")}
    (folder / "a.txt").write_text("onf")
    assert files.is_complete(folder) and "a.txt" in files.damage(folder)
    (folder / "a.txt").write_text("ones")
    assert not files.is_complete(folder) and "4 bytes where 3" in files.damage(folder)
    (folder / "a.txt").unlink()
    assert not files.is_complete(folder)
    (folder / files.MARKER).write_text("{")
    assert not files.is_complete(folder)
    (folder / files.MARKER).unlink()
    assert "never finished" in files.damage(folder)


def test_folder_syncs_every_file_before_the_rename(tmp_path, monkeypatch):
    synced: list[str] = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd))[1])
    before: list[set[str]] = []
    monkeypatch.setattr(
        os, "rename", lambda a, b: (before.append({Path(s).name for s in synced}), real_rename(a, b))[1]
    )
    fill(tmp_path / "out", "one")
    assert {"a.txt", "b.txt", "sub"} <= before[-1]
    assert synced[-1] == str(tmp_path)  # the rename itself is made durable


def test_folder_is_replaced_whole(tmp_path):
    fill(tmp_path / "out", "one")
    fill(tmp_path / "out", "two")
    assert (tmp_path / "out" / "a.txt").read_text() == "two" and names(tmp_path) == {"out"}


def test_exception_in_the_block_leaves_the_old_folder(tmp_path):
    fill(tmp_path / "out", "one")
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "out") as staging:
        files.atomic_write_text(staging / "a.txt", "two")
        raise KeyError
    assert (tmp_path / "out" / "a.txt").read_text() == "one" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("exists", [False, True])
def test_kill_at_every_call_leaves_the_old_or_the_new_folder(quick_folder, exists):
    folder = quick_folder / "out"

    def reset():
        shutil.rmtree(folder, ignore_errors=True)
        if exists:
            fill(folder, "one")

    def check():
        files.clean_leftovers(quick_folder)
        if exists or folder.exists():
            assert files.damage(folder) is None
            text = (folder / "a.txt").read_text()
            assert text in ("one", "two") and (folder / "sub" / "b.txt").read_text() == text
        assert names(quick_folder) <= {"out"}

    assert every_kill(lambda: fill(folder, "two"), check, reset) > 20
    assert (folder / "a.txt").read_text() == "two"


def test_disk_full_at_every_call_of_a_folder_leaves_the_old_one(quick_folder):
    folder = quick_folder / "out"
    fill(folder, "one")
    at = 0
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, disk_full, at, only=("write", "fsync", "rename", "replace"))
            try:
                with files.atomic_folder(folder) as staging:
                    files.atomic_write_text(staging / "a.txt", "two")
                break
            except DiskError as error:
                message = str(error)
        assert str(folder) in message and "tmp-" not in message
        assert files.damage(folder) is None
        if (folder / "a.txt").read_text() == "two":  # only the last sync failed: the new folder is in place
            fill(folder, "one")
        files.clean_leftovers(quick_folder)
        assert names(quick_folder) == {"out"}
    assert at > 8


def test_a_living_writer_is_left_alone(tmp_path):
    with files.atomic_folder(tmp_path / "out") as staging:
        (staging / "a.txt").write_text("x")
        assert files.clean_leftovers(tmp_path) == []
        child = os.fork()
        if child == 0:
            os._exit(len(files.clean_leftovers(tmp_path)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files.is_complete(tmp_path / "out")


def test_leftovers_go_and_strangers_stay(tmp_path):
    (tmp_path / ".out.tmp-123-0123abcd").mkdir()
    (tmp_path / ".x.json.tmp-123-0123abcd").write_text("half")
    (tmp_path / ".hidden.tmp").write_text("mine")
    (tmp_path / "kept.tmp-1").write_text("mine")
    assert len(files.clean_leftovers(tmp_path)) == 2
    assert names(tmp_path) == {".hidden.tmp", "kept.tmp-1"}
    assert files.clean_leftovers(tmp_path / "absent") == []


def test_append_line_is_one_write(tmp_path, monkeypatch):
    fault = Fault(monkeypatch, None, only=("write",))
    files.append_line(tmp_path / "m.jsonl", '{"step": 1}')
    files.append_line(tmp_path / "m.jsonl", '{"step": 2}')
    assert len(fault.calls) == 2
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
