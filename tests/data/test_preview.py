"""The preview shows what is supervised with colours and without, and lets no row write to the terminal."""

import io

from rich.console import Console

from tunesmith.data.encode import encode_rows
from tunesmith.data.preview import preview
from tunesmith.data.schemas import SCHEMAS, read_row
from tunesmith.data.templates import get_template


def encoded(tokenizer, texts, cutoff=200, against=None):
    rows = [
        read_row({"prompt": prompt, "completion": answer}, f"f.jsonl:{i}", SCHEMAS["prompt-completion"])
        for i, (prompt, answer) in enumerate(texts, 1)
    ]
    return encode_rows(rows, get_template("chat", tokenizer), tokenizer, cutoff=cutoff, against=against)


def printed(renderable, colour):
    out = io.StringIO()
    Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=200).print(renderable)
    return out.getvalue()


def test_plain_preview_marks_targets(tokenizer):
    train = encoded(tokenizer, [("What is 2 + 2?", "four [red]"), ("b", "c")])
    valid = encoded(tokenizer, [("b", "c")], against=train)
    shown = printed(preview(train, tokenizer, colour=False, valid=valid), False)
    assert "What is 2 + 2?<|im_end|>" in shown and "[[four [red]<|im_end|>«EOS»]]" in shown
    assert "<|im_start|>assistant\n[[" in shown and "f.jsonl:1" in shown and "\x1b" not in shown
    for count in ("supervised tokens", "rows cut", "rows without EOS", "rows with two BOS", "duplicate rows"):
        assert count in shown
    assert "valid: 1 of 1 rows also occur in the training set" in shown


def test_colours(tokenizer):
    shown = printed(preview(encoded(tokenizer, [("a", "four")]), tokenizer), True)
    assert "\x1b[32mfour" in shown and "\x1b[1;32m<|im_end|>«EOS»" in shown and "[[" not in shown


def test_cut_rows_and_long_rows(tokenizer):
    train = encoded(tokenizer, [("a", "word " * 300)], cutoff=150)
    shown = printed(preview(train, tokenizer, colour=False, max_tokens=60), False)
    assert "tokens left out" in shown and "<cut>" in shown and "train: 1 of 1 rows end inside the answer" in shown


def test_rows_cannot_write_to_the_terminal(tokenizer):
    shown = printed(preview(encoded(tokenizer, [("\x1b[2J\x07\u202ehi", "b")]), tokenizer, colour=False), False)
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown and "\\x1b[2J" in shown
