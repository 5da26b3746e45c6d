"""`--help` answers at once: no heavy library is imported for it, by any command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cli import main

COMMANDS = [
    (), ("train",), ("finetune",), ("chat",), ("generate",), ("evaluate",), ("verify",), ("inspect",), ("merge",),
    ("export",), ("combine",), ("compare",), ("plan",), ("quantize",), ("data",), ("data", "preview"), ("env",),
    ("demo",), ("tournament",), ("predict",), ("serve",), ("spectrum",), ("forgetting",),
]  # fmt: skip
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "tunesmith.config",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "gguf",
    "yaml",
    "fastapi",
    "uvicorn",
)

CHILD = """
import contextlib, io, json, sys, time
start = time.perf_counter()
from tunesmith.cli import main
text = io.StringIO()
with contextlib.redirect_stdout(text):
    code = main(sys.argv[1:])
seconds = time.perf_counter() - start
loaded = [name for name in %r if name in sys.modules]
print(json.dumps({"code": code, "loaded": loaded, "help": text.getvalue(), "seconds": seconds}))
"""


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


def in_child(*args: str, before: str = "") -> dict:
    code = before + CHILD % (HEAVY,)
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, env=ENV)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    answer = in_child(*command, "--help")
    sys.stderr.write(f"tunesmith {' '.join(command)} --help: {answer['seconds']:.3f} s\n")  # shown, not asserted
    assert answer["code"] == 0
    assert answer["loaded"] == []
    assert "Usage: tunesmith" in answer["help"]


def test_the_check_bites():
    assert in_child("--help", before="import yaml\n")["loaded"] == ["yaml"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command[0]} " in shown for command in COMMANDS if command)


@pytest.mark.parametrize("command", ["web"])
def test_what_is_not_there_yet_is_no_command(command, capsys):
    assert main([command]) == 2
    assert "No such command" in capsys.readouterr().err
