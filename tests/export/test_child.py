"""The fresh process that answers in a folder: started early, asked late or never."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.export.small_run import make_base, make_run

from tunesmith.errors import VerificationError
from tunesmith.export.child import Child
from tunesmith.export.probe import read_probe
from tunesmith.export.replay import Request, fresh_process, replay, replay_in_child
from tunesmith.export.verify import verify_run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_it_answers_as_this_process_does(base, tmp_path):
    run = make_run(tmp_path / "r", base)
    probe = read_probe(run / "verify_probe.safetensors")
    request = Request(str(base), str(run / "adapter"), "float32", "cpu", 1)
    with fresh_process() as child:  # before it is known what will be asked
        answer = replay_in_child(request, probe, child)
    expected = replay(request, probe)
    assert answer.adapted.equal(expected.adapted)
    assert answer.base.equal(expected.base)


def test_a_folder_of_any_name_is_understood(tmp_path):
    folder = tmp_path / "a 'b'\né"
    folder.mkdir()
    request = Request(str(tmp_path / "none"), str(tmp_path), "float32", "cpu", 1)
    (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
    with Child("tunesmith.export.replay") as child:
        code, _ = child.ask(str(folder))
    assert code == 0
    assert "probe.safetensors" in json.loads((folder / "error.json").read_text(encoding="utf-8"))["message"]


def test_one_that_is_never_asked_ends_with_the_block():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), fresh_process() as child:
        raise KeyboardInterrupt
    assert child._process.returncode is not None
    assert time.monotonic() - began < 60


def test_it_ends_where_its_parent_does():
    with fresh_process() as child:
        child._process.stdin.close()  # what happens when the parent is killed
        assert child._process.wait(60) == 1


def test_a_run_is_verified_with_one_that_waits(base, tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", base)
    with fresh_process() as child:
        monkeypatch.setattr(subprocess, "Popen", None)  # another one would need it
        assert verify_run(run, child=child).passed
    assert child._process.returncode == 0


def test_one_that_fell_is_said(base, tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", base)
    request = Request(str(base), str(run / "adapter"), "float32", "cpu", 1)
    with fresh_process() as child:
        child._process.kill()
        with pytest.raises(VerificationError, match="ended with status -9"):
            replay_in_child(request, read_probe(run / "verify_probe.safetensors"), child)
