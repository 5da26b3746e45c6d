"""How commands end: exit code, one line on stderr, nothing on stdout."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith import errors
from tunesmith.cli import app

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
TRAIN = ("train", "--model", "m", "--data", "d")

ENDS = [
    (errors.ConfigError("a: wrong"), 2, "error: a: wrong"),
    (errors.DataError("rows.jsonl:7: no text"), 2, "error: rows.jsonl:7: no text"),
    (errors.OutOfMemory("needs 8 GiB"), 3, "error: needs 8 GiB"),
    (errors.DiskError("runs/a: needs 10 bytes"), 3, "error: runs/a: needs 10 bytes"),
    (errors.VerificationError("logits differ"), 4, "error: logits differ"),
    (errors.ModelError("two\nlines"), 2, "error: two lines"),
    (MemoryError(), 3, "error: out of memory: "),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        3,
        "error: out of memory: CUDA out of memory.",
    ),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 3, "error: out of memory: "),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 3, "error: out of memory: "),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 3, "error: the disk is full: "),
    (KeyboardInterrupt(), 130, "interrupted"),
    (errors.Interrupted("at step 7; go on with --resume"), 130, "interrupted: at step 7; go on with --resume"),
    (RuntimeError("odd"), 1, "error: RuntimeError: odd (run with TUNESMITH_DEBUG=1 for the traceback)"),
    (KeyError("x"), 1, "error: KeyError: 'x' (run"),
    (ValueError(), 1, "error: ValueError: no message (run"),
    (BrokenPipeError(), 0, ""),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=lambda value: type(value).__name__)
def test_an_error_ends_with_its_code_and_one_line(api, tunesmith_command, monkeypatch, error, code, line):
    monkeypatch.setattr("tunesmith.cli.shell._drop_stdout", lambda: None)
    api.answers["train_run"] = error
    got, out, err = tunesmith_command(*TRAIN)
    assert got == code
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == (1 if line else 0)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(api, tunesmith_command, monkeypatch):
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    api.answers["train_run"] = RuntimeError("odd")
    code, _, err = tunesmith_command(*TRAIN)
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "error: RuntimeError: odd"


def test_all_of_our_errors_have_an_exit_code_of_the_convention():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) > 10
    assert {cls.exit_code for cls in classes} == {2, 3, 4, 130}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("tran",), "No such command 'tran'. Did you mean 'train'?"),
        (("data", "prevew"), "No such command 'prevew'. Did you mean 'preview'?"),
        (("train", "--modle", "x"), "No such option: --modle"),
        (("train", "--epochs", "three"), "Invalid value for '--epochs'"),
        (("merge", "a"), "Missing option '--out'"),
        (("data", "preview", "--rows", "0"), "Invalid value for '--rows'"),
        (("verify",), "Missing argument"),
    ],
)
def test_a_mistyped_command_is_a_usage_error(tunesmith_command, args, line):
    code, out, err = tunesmith_command(*args)
    assert (code, out) == (2, "")
    assert line in err
    if "--modle" in args:
        assert "--model" in err.replace("--modle", "")


def test_version(tunesmith_command):
    from tunesmith import __version__

    assert tunesmith_command("--version") == (0, f"tunesmith {__version__}\n", "")


def child(code: str, **more: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=ENV, **{**pipes, **more})


COMMAND_THAT = """
import sys, time
from tunesmith.cli.shell import app, command, main, out
@command(app, "try")
def attempt() -> None:
    {body}
sys.exit(main(["try"]))
"""


def test_ctrl_c_ends_with_130_and_one_line():
    process = child(COMMAND_THAT.format(body="out('ready'); sys.stdout.flush(); time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        process = child(COMMAND_THAT.format(body="[out('x' * 1000) for _ in range(1000)]"), stdout=write)
        _, err = process.communicate(timeout=30)
    finally:
        os.close(write)
    assert (process.returncode, err) == (0, "")


def test_python_dash_m_returns_the_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "train", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENV,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none.yaml'}: no such configuration file\n"


def test_the_application_is_what_main_runs():
    assert app.info.name == "tunesmith"
