"""`tunesmith serve` as a command: what it loads, by which names, and what it refuses before anything is loaded."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serve.conftest import KEY, LETTERS, make_registry

from tunesmith.cli import serve as command_of_serve
from tunesmith.cli.serve import load_all, read_key, what_to_serve
from tunesmith.errors import ConfigError

httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")
SOURCE = str(Path(__file__).parents[2] / "src")


def test_a_server_answers_until_it_is_interrupted(base, adapters, tmp_path) -> None:
    """The whole command: key from the environment, all adapters of a folder, a clean end at Ctrl-C."""
    words = ["serve", "--model", base, "--adapters", adapters, "--adapter", f"mine={adapters / 'beta'}", "--port", 0,
             "--temperature", 0, "--max-new-tokens", 5, "--name", "my-base", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, "TUNESMITH_API_KEY": KEY},
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"listening on (\S+)/v1", line):
                break
        else:
            pytest.fail("".join(said))
        assert "models: my-base, alpha, beta, delta, gamma, mine\n" in said
        with httpx.Client(base_url=found[1], headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            for model, letters in [("mine", "beta"), ("alpha", "alpha"), ("my-base", "base")]:
                asked = {"model": model, "messages": [{"role": "user", "content": "Hi."}]}
                text = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
                assert len(text) == 5 and set(text) <= set(LETTERS[letters])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and out == "" and "Traceback" not in err
    finally:
        process.kill()


def test_what_is_refused_before_anything_is_loaded(command, base, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TUNESMITH_API_KEY", raising=False)
    words = ("serve", "--model", base)
    code, _, err = command(*words, "--host", "0.0.0.0")
    assert code == 2 and "a key is needed" in err and err.count("\n") == 1
    (tmp_path / "key").write_text("too-short\n")
    code, _, err = command(*words, "--api-key-file", tmp_path / "key")
    assert code == 2 and "at least 16 printable" in err and "too-short" not in err
    code, _, err = command(*words, "--api-key-file", tmp_path / "none")
    assert code == 2 and "cannot be read" in err
    (tmp_path / "empty").write_text("\n")
    assert command(*words, "--api-key-file", tmp_path / "empty")[0] == 2
    assert command("serve")[0] == 2
    monkeypatch.setattr(command_of_serve, "NEEDED", ("fastapi", "no_such_library"))
    code, _, err = command(*words)
    assert code == 2 and "this needs no_such_library; install it with: pip install 'tunesmith[serve]'" in err


def test_a_port_that_is_taken(command, base, live) -> None:
    port = live.url.rpartition(":")[2]
    code, _, err = command("serve", "--model", base, "--port", port, "--device", "cpu")
    assert code == 2 and f"--port {port}: cannot listen there" in err


def test_names_are_those_of_the_runs(adapters, tmp_path, monkeypatch) -> None:
    shutil.copytree(adapters / "alpha", tmp_path / "runs" / "first" / "adapter")
    run = tmp_path / "runs" / "first"
    assert what_to_serve(str(run), None, None) == ({"first": run}, None)
    assert what_to_serve(str(run / "adapter"), None, None) == ({"first": run / "adapter"}, None)
    assert what_to_serve("some/model", None, None) == ({}, "some/model")
    assert what_to_serve(None, "m", ["x=a/b", "c/d"]) == ({"x": Path("a/b"), "d": Path("c/d")}, "m")
    assert what_to_serve(str(run), "m", ["x=a"])[0].keys() == {"first", "x"}
    with pytest.raises(ConfigError, match="the name 'd' is taken"):
        what_to_serve(None, "m", ["c/d", "d=e"])
    monkeypatch.setenv("TUNESMITH_API_KEY", "from-the-environment")
    assert read_key(None) == "from-the-environment"


def test_what_cannot_be_served_is_named_and_left_out(base, adapters, tmp_path) -> None:
    shutil.copytree(adapters / "alpha", tmp_path / "good")
    shutil.copytree(adapters / "alpha", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "notes").mkdir()
    registry = make_registry(base, tmp_path, ())
    lines = load_all(registry, set())
    assert len(lines) == 1 and lines[0].startswith("not served: cut: ") and "safetensors" in lines[0]
    assert [entry.name for entry in registry.entries] == ["tiny-base", "good"]
