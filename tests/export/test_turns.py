"""A template of training, said in Jinja and in Go: transformers' and Go's renderings give the same prompts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.data.conftest import SMOLLM2, write_folder

from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.templates import get_template
from tunesmith.export.ollama import faults, modelfile, template_faults
from tunesmith.export.turns import chat_template, to_go, turns_of
from tunesmith.tokenizer import load_tokenizer

USER = {"role": "user", "content": "What is {{ 2 }} + 2?\n"}
ANSWER = {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = [[USER], [USER, ANSWER, USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER, ANSWER, USER]]
NAMES = ["alpaca", "alpaca-short", "dolly", "plain", "llama2-chat", "Q: {instruction}\nA: {output}"]


@pytest.fixture(scope="module", params=[False, True], ids=["", "add_bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("t") / "t", bos="<s>", eos="</s>", add_bos=request.param, chat_template=SMOLLM2
    )


def talks_of(name: str) -> list[list[dict[str, str]]]:
    return TALKS[:1] if "{" in name else TALKS


@pytest.mark.parametrize("name", NAMES)
def test_transformers_prompts_as_the_template_does(name: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    template = get_template(name, tokenizer)
    text, notes = chat_template(template, tokenizer)
    assert text is not None and "written in Jinja" in notes[0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for talk in talks_of(name):
        said = theirs.apply_chat_template(talk, chat_template=text, add_generation_prompt=True, tokenize=False)
        ids = theirs.encode(said, add_special_tokens=False)
        assert ids == encode_prompt(chat_row(talk, "x"), template, tokenizer)


def go(text: str, messages: list[dict[str, str]]) -> str:
    """Go's text/template, as far as ours uses it: if, else, range, eq, assignment, variables, strings."""
    tokens = re.split(r"(\{\{.*?\}\})", text, flags=re.S)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    scope = {".System": system, "$asked": False}

    def truth(words: list[str], here: dict[str, str]) -> bool:
        if words[0] == "eq":
            return here[{".Role": "role"}[words[1]]] == words[2].strip('"')
        return bool(scope[words[0]])

    def block(at: int, here: dict[str, str], live: bool) -> tuple[str, int, list[str]]:
        out = ""
        while at < len(tokens):
            token = tokens[at]
            if not token.startswith("{{"):
                out, at = out + (token if live else ""), at + 1
                continue
            words = token[2:-2].split()
            at += 1
            if words[0] in ("end", "else"):
                return out, at, words
            if words[0] == "if":
                done = False
                while True:
                    wanted = not done and (
                        words[:1] == ["else"]
                        and len(words) == 1
                        or truth(words[-3:] if "eq" in words else words[-1:], here)
                    )
                    inner, at, words = block(at, here, live and wanted)
                    out, done = out + inner, done or wanted
                    if words[0] == "end":
                        break
            elif words[0] == "range":
                start, inside = at, ""
                for message in messages:
                    piece, at, _ = block(start, message, live)
                    inside += piece
                out += inside
            elif len(words) == 3:
                scope[words[0]] = words[2] == "true" if live else scope[words[0]]
            elif live:
                out += {".System": system, ".Content": here.get("content", ""), '"{{"': "{{"}.get(words[0], "{{")
        return out, at, []

    return block(0, {}, True)[0]


@pytest.mark.parametrize("name", [*NAMES, "chat"])
def test_ollama_prompts_as_the_template_does(name: str, folder: Path, real_go: Any) -> None:
    """Ollama puts BOS before what the template gives, where the model wants one."""
    tokenizer = load_tokenizer(folder)
    template = get_template(name, tokenizer)
    turns = turns_of(template)
    assert turns is not None
    text = to_go(turns, tokenizer)
    assert template_faults(text) == []
    for talk in talks_of(name):
        said = "".join(segment.text for segment in template.prompt(chat_row(talk, "x")))
        wanted = said.removeprefix("<s>") if tokenizer.add_bos else said
        shown = [{**m, "content": m["content"].strip()} for m in talk] if turns.strips else talk  # Go has no trim
        assert go(text, shown) == wanted
        assert real_go is None or real_go(text, shown) == wanted


PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type M struct { Role, Content string }
type D struct { System string; Messages []M }
func main() {
  var d struct { Text string; Data D }
  json.NewDecoder(os.Stdin).Decode(&d)
  template.Must(template.New("x").Parse(d.Text)).Execute(os.Stdout, d.Data)
}
"""


@pytest.fixture(scope="module")
def real_go(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[dict[str, str]]], str] | None:
    """What Go itself renders, on a machine that has it."""
    if shutil.which("go") is None:
        return None
    program = tmp_path_factory.mktemp("go") / "render"
    program.with_suffix(".go").write_text(PROGRAM, encoding="utf-8")
    subprocess.run(["go", "build", "-o", program, program.with_suffix(".go")], check=True)

    def render(text: str, messages: list[dict[str, str]]) -> str:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        given = json.dumps({"Text": text, "Data": data})
        return subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout

    return render


def test_a_template_that_looks_at_its_texts_has_no_form(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    loud = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"
    template = get_template(loud + "{% if add_generation_prompt %}[assistant]{% endif %}", tokenizer)
    assert turns_of(template) is None
    assert chat_template(template, tokenizer)[0] == template.source()["text"]  # it is Jinja already
    text, notes = modelfile(template, tokenizer, {})
    assert "TEMPLATE" not in text and "no form in Go's syntax" in notes[0]


def test_a_modelfile_is_within_the_rules(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (tmp_path / "model.gguf").touch()
    text, notes = modelfile(get_template("alpaca", tokenizer), tokenizer, {"temperature": 0.6, "top_k": 40})
    assert faults(text, tmp_path) == notes == []
    assert 'PARAMETER stop """\n### Instruction:"""\n' in text
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 40\n" in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("PARAMETER top_k 4\n", "0 FROM lines"),
        ("FROM ./other.gguf\n", "FROM ./other.gguf: there is no such file"),
        ("FROM ./model.gguf\nPRAMETER top_k 4\n", "PRAMETER is no instruction"),
        ("FROM ./model.gguf\nPARAMETER top_q 4\n", "PARAMETER top_q is not known"),
        ("FROM ./model.gguf\nPARAMETER top_k four\n", "PARAMETER top_k: 'four' is no number"),
        ("FROM ./model.gguf\nPARAMETER stop a\n", "PARAMETER stop: a is not quoted"),
        ('FROM ./model.gguf\nTEMPLATE """{{ if .System }}x"""\n', "an action is not closed"),
        ('FROM ./model.gguf\nTEMPLATE """{{ .Sytem }}"""\n', "'.Sytem' is not known"),
        ('FROM ./model.gguf\nTEMPLATE """x{{ end }}"""\n', "an {{ end }} too many"),
        ('FROM ./model.gguf\nTEMPLATE """x\n', "an action is not closed"),
    ],
)
def test_what_is_against_ollamas_rules_is_named(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert any(line in fault for fault in faults(text, tmp_path))
