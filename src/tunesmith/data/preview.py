"""Shows what a model will learn from: prompt and targets of a few rows, special tokens visible, and the counts.

With colours targets are green and the prompt is dim. Without (a file, a pipe), targets stand between [[ and ]].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith.data.encode import EncodedSet, Example
from tunesmith.data.report import DataReport

if TYPE_CHECKING:
    from tunesmith.tokenizer import Tokenizer

PROMPT, TARGET, SPECIAL, TARGET_SPECIAL, WRONG = "dim", "green", "magenta", "bold green", "bold red"


def preview(
    encoded: EncodedSet,
    tokenizer: Tokenizer,
    *,
    rows: int = 3,
    valid: EncodedSet | None = None,
    colour: bool = True,
    max_tokens: int = 400,
) -> RenderableType:
    """Return the first `rows` rows, the counts of the training and validation set, and what is wrong with them.

    `colour=False` marks targets with [[ ]]: legible in a file or a pipe. Long rows are shown with their middle left
    out.
    """
    parts: list[RenderableType] = []
    for example in encoded.examples[:rows]:
        text = show(example, tokenizer, colour=colour, max_tokens=max_tokens)
        title = f"{example.source}  {len(example.ids):,} tokens, {int(example.supervised.sum()):,} supervised"
        title += ", cut" if example.cut else ""
        parts.append(Panel(text, title=Text(title), title_align="left") if colour else Text(f"--- {title}\n") + text)
    parts.append(counts(encoded.report, valid.report if valid else None))
    parts.append(Text(_legend(colour)))
    for name, found in (("train", encoded), ("valid", valid)):
        parts += [Text(f"{name}: {line}", style=WRONG) for line in (found.report.problems() if found else [])]
    return Group(*parts)


def show(example: Example, tokenizer: Tokenizer, *, colour: bool = True, max_tokens: int = 400) -> Text:
    """Return one row's text: runs of targets and of prompt, special tokens by name, a mark where it was cut."""
    special = {i: text for text, i in tokenizer.special_tokens.items()}
    marked = [(int(i), bool(s)) for i, s in zip(example.ids, example.supervised, strict=True)]
    text = Text()
    for k, part in enumerate(_shortened(marked, max_tokens)):
        if k:
            left_out = len(marked) - max_tokens
            text.append(f" ... {left_out:,} tokens left out ... ", style=SPECIAL)
        for supervised, run in groupby(part, key=lambda pair: pair[1]):
            ids = [i for i, _ in run]
            text.append("[[" if supervised and not colour else "")
            _append_run(text, ids, supervised, special, tokenizer)
            text.append("]]" if supervised and not colour else "")
    if example.cut:
        text.append(" <cut here>" if colour else " <cut>", style=WRONG)
    return text


def counts(train: DataReport, valid: DataReport | None = None) -> Table:
    """Return the table of counts, the validation set in a second column."""
    table = Table(box=None, show_header=valid is not None, pad_edge=False)
    table.add_column("")
    table.add_column("train")
    other = dict(valid.table()) if valid else {}
    if valid:
        table.add_column("valid")
    for name, value in train.table():
        if name == "rows shared with train" and not valid:
            continue
        value = "" if name == "rows shared with train" else value
        table.add_row(*map(Text, (name, value, other[name]) if valid else (name, value)))
    return table


def _append_run(
    text: Text, ids: Sequence[int], supervised: bool, special: dict[int, str], tokenizer: Tokenizer
) -> None:
    eos = set(tokenizer.eos_ids)
    for is_special, group in groupby(ids, key=lambda i: i in special):
        run = list(group)
        if not is_special:
            text.append(_visible(tokenizer.decode(run)), style=TARGET if supervised else PROMPT)
            continue
        for i in run:
            mark = f"{special[i]}\u00abEOS\u00bb" if i in eos and supervised else special[i]
            text.append(mark, style=TARGET_SPECIAL if supervised else SPECIAL)


def _shortened(marked: list[tuple[int, bool]], max_tokens: int) -> list[list[tuple[int, bool]]]:
    """The whole row, or its first and last halves of `max_tokens`."""
    if len(marked) <= max_tokens:
        return [marked]
    half = max_tokens // 2
    return [marked[: max_tokens - half], marked[len(marked) - half :]]


def _visible(text: str) -> str:
    """Terminal control characters shown as symbols: a data row cannot write to the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _legend(colour: bool) -> str:
    target, prompt = ("green", "dim") if colour else ("[[...]]", "the rest")
    return f"{target}: supervised, the model learns to write it; {prompt}: read only; \u00abEOS\u00bb: the learnt end"
