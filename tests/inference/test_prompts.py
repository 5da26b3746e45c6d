"""Prompt files: lines, or rows of the data schemas with or without answers; what is wrong is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.data.templates import get_template
from tunesmith.errors import DataError
from tunesmith.inference import prompt_row, read_prompts


def rendered(row, tokenizer, name: str = "plain") -> str:
    return "".join(segment.text for segment in get_template(name, tokenizer).prompt(row))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_line_is_a_prompt(tmp_path: Path, chat_tokenizer) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\r\n\n  two é\n", encoding="utf-8")
    rows = read_prompts(path)
    assert [rendered(row, chat_tokenizer) for row in rows] == ["one\n\n", "two é\n\n"]
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("say it", "say it\n\n"),
        ({"prompt": "say"}, "say"),
        ({"prompt": "say", "completion": "SECRET"}, "say"),
        ({"instruction": "do", "input": "this"}, "do\n\nthis\n\n"),
        ({"instruction": "do", "input": "this", "output": "SECRET"}, "do\n\nthis\n\n"),
        ({"instruction": "do", "context": "this", "response": "SECRET"}, "do\n\nthis\n\n"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "hi\n\n"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "SECRET"}]}, "hi\n\n"),
        ({"text": "a text"}, "a text\n\n"),
        ({"text": "a film", "label": "good"}, "Classify the text as good.\n\na film\n\n"),
        ({"question": "which?", "choices": ["x", "y"]}, "which?\n(A) x\n(B) y\n\n"),
    ],
)
def test_rows_of_every_schema_ask_without_showing_their_answer(
    tmp_path: Path, chat_tokenizer, row, prompt: str
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    text = rendered(read_prompts(path)[0], chat_tokenizer)
    assert text == prompt
    assert "SECRET" not in text


def test_a_system_text_is_added_where_there_is_none(tmp_path: Path, chat_tokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", "hi", {"instruction": "do", "system": "own"})
    texts = [rendered(row, chat_tokenizer, "chat") for row in read_prompts(path, system="given")]
    assert texts[0].startswith("<|im_start|>system\ngiven<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nown<|im_end|>")
    assert rendered(prompt_row("hi", system="given"), chat_tokenizer, "chat") == texts[0]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"promt": "b"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*did you mean 'prompt'"):
        read_prompts(good)
    with pytest.raises(DataError, match=r"row\.jsonl: no such file; did you mean 'rows\.jsonl'"):
        read_prompts(tmp_path / "row.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        read_prompts(tmp_path / "bad.jsonl")
