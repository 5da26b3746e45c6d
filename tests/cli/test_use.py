"""`generate`, `chat`, `merge`: which model, which adapters, which prompts, which settings reach the room below."""

from __future__ import annotations

import io
import json

import pytest

from tunesmith.cli.use import what_to_load
from tunesmith.errors import ConfigError


@pytest.fixture
def answering(api):
    """An api whose generate answers in capitals, piece by piece where it is asked to."""

    def generate(loaded, text, *, use=None, on_text=None, **settings):
        if on_text is not None:
            for letter in text.upper():
                on_text(letter)
        return {"text": text.upper(), "tokens": len(text)}

    def generate_all(loaded, texts, **options):
        return [generate(loaded, text, **options) for text in texts]

    api.answers |= {"load": "LOADED", "generate": generate, "generate_all": generate_all}
    return api


def test_only_settings_that_were_given_are_passed_on(answering, tunesmith_command):
    code, out, _ = tunesmith_command(
        "generate", "runs/a", "-p", "hi", "--temperature", "0.5", "--top-k", "3", "--stop", "x"
    )
    assert (code, out) == (0, "HI\n")
    how = {"dtype": "auto", "device": "auto", "adapter": None, "as_stored": True}
    assert answering.calls[0] == ("load", ("runs/a",), how)
    name, args, settings = answering.calls[1]
    assert (name, args) == ("generate_all", ("LOADED", ["hi"]))
    assert settings == {"use": None, "temperature": 0.5, "top_k": 3, "stop": ["x"]}


def test_streaming_prints_the_same_text(answering, tunesmith_command):
    assert tunesmith_command("generate", "m", "-p", "hi", "--stream")[1] == "HI\n"
    assert answering.calls[1][2]["on_text"] is not None


@pytest.mark.parametrize("other", [("--json",), ("--beams", "4")])
def test_streaming_what_cannot_stream_is_refused(answering, tunesmith_command, other):
    code, _, err = tunesmith_command("generate", "m", "-p", "hi", "--stream", *other)
    assert code == 2
    assert err.startswith(f"error: --stream cannot act with {other[0]}")
    assert answering.calls == []


def test_json_is_a_line_a_prompt(answering, tunesmith_command):
    _, out, _ = tunesmith_command("generate", "m", "-p", "a\nb", "-p", "é", "--json")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "a\nb", "text": "A\nB", "tokens": 3},
        {"prompt": "é", "text": "É", "tokens": 1},
    ]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "one\n\ntwo\n", ["one", "two"]),
        ("p.jsonl", '"one"\n\n{"prompt": "two", "id": 3}\n', ["one", "two"]),
    ],
)
def test_prompts_from_a_file(answering, tunesmith_command, tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert tunesmith_command("generate", "m", "--file", str(tmp_path / name))[0] == 0
    assert [args[1] for call, args, _ in answering.calls if call == "generate_all"] == [prompts]  # in one batch


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.jsonl", b'"a"\n{', "p.jsonl:2: not JSON"),
        ("p.jsonl", b'{"text": "a"}', "p.jsonl:1: should be a string, or an object with a string 'prompt'"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not JSON"),
        ("p.txt", b"\n \n", "no prompt in it"),
        ("p.txt", b"\xff\xfe", "cannot be read as text"),
        ("p.txt", None, "cannot be read as text (No such file or directory)"),
    ],
)
def test_a_bad_prompt_file_is_named(answering, tunesmith_command, tmp_path, name, content, line):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = tunesmith_command("generate", "m", "--file", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert line in err
    assert answering.calls == []


def test_prompt_from_stdin(answering, tunesmith_command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert tunesmith_command("generate", "m")[1] == "TWO\nLINES\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert tunesmith_command("generate", "m")[0] == 2


@pytest.mark.parametrize(
    ("target", "model", "adapters", "loaded"),
    [
        ("runs/a", None, None, ("runs/a", None)),
        (None, "m", None, ("m", None)),
        ("runs/a", "m", None, ("m", {"default": "runs/a"})),
        (None, "m", ["a=x", "b=y"], ("m", {"a": "x", "b": "y"})),
        (None, "m", ["x/one", "x/two"], ("m", {"default": "x/one", "two": "x/two"})),
        (None, None, ["a=x"], (None, {"a": "x"})),
        ("m", None, ["a=x"], ("m", {"a": "x"})),
    ],
)
def test_what_is_loaded(target, model, adapters, loaded):
    assert what_to_load(target, model, adapters) == loaded


@pytest.mark.parametrize(
    ("adapters", "line"),
    [
        (["a=x", "a=y"], "the name 'a' is taken"),
        (["base=x"], "the name 'base' is taken"),
        (["=x"], "should be NAME=PATH or PATH"),
        (["a="], "should be NAME=PATH or PATH"),
        (None, "nothing to load"),
    ],
)
def test_adapters_that_cannot_be_told_apart_are_refused(adapters, line):
    with pytest.raises(ConfigError, match=line):
        what_to_load(None, "m" if adapters else None, adapters)


def test_chat(api, tunesmith_command):
    api.answers["load"] = "LOADED"
    assert tunesmith_command("chat", "--model", "m", "-a", "a=x", "--use", "a", "--seed", "0")[0] == 0
    assert api.calls[0][2]["adapter"] == {"a": "x"}
    name, args, settings = api.calls[1]
    assert (name, args, settings.pop("console").stderr) == ("chat", ("LOADED",), True)
    assert settings == {"use": "a", "seed": 0}


def test_merge_prints_the_folder_and_reports_beside_it(api, tunesmith_command):
    api.answers["merge"] = {"top1_agreement": 1.0}
    code, out, err = tunesmith_command("merge", "runs/a", "--out", "merged", "--dtype", "bfloat16", "--force")
    assert (code, out) == (0, "merged\n")
    assert "top1 agreement" in err
    settings = api.calls[0][2]
    assert (settings["dtype"], settings["force"], settings["base"]) == ("bfloat16", True, None)
    assert json.loads(tunesmith_command("merge", "runs/a", "--out", "merged", "--json")[1]) == {"top1_agreement": 1.0}
