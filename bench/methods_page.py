"""What bench/methods.py has measured, as methods.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.method_table import ROWS, label
from bench.pages import discussion, loud, machine, settings
from bench.table import NOTHING, grid

MIB = 2**20
SHOWN = 120  # characters of a sample
HEAD = (
    "row", "rate", "trained parameters", "file", "training, s", "tokens/s", "peak, MiB", "a review, ms",
    "a review merged, ms", "16 tokens, ms", "16 tokens merged, ms", "held-out loss", "accuracy",
)  # fmt: skip


def page(found: Mapping[str, Any], words: str) -> str:
    """methods.md; `words` are a person's own, which are kept."""
    asked, rows = found["options"], found["rows"]
    measured = sorted((row for row in rows.items() if "loss" in row[1]), key=lambda item: item[1]["loss"])
    diverged = {name: row["diverged"] for name, row in rows.items() if "diverged" in row}
    lines = [
        *("# Every method at equal budget", "", "```sh", found["command"], "```", ""),
        f"`{asked['model']}` in float32 on `{asked['data']}`: each row trains on the first {asked['reviews']} training",
        f"reviews, once, batch {asked['batch']}, warm-up 10%, then cosine, seed {asked['seed']}, in a fresh process of",
        f"{asked['threads']} threads. Loss and accuracy (with its 95% interval) are of the first {asked['held']} test",
        f"reviews. All rows took {found['minutes']} minutes.",
        "",
        *_legend(),
        "",
    ]
    line = [] if found["base"] is None else [_line("untuned base", found["base"])]
    line += [_line(f"`{name}`", row) for name, row in measured]
    lines += [grid(HEAD, line) if line else NOTHING, ""]
    lines += [*loud(found["missing"], "NOT RUN"), *loud(diverged, "DIVERGED"), *_remarks(dict(measured)), ""]
    lines += [*discussion(words), "## Answers", "", *_samples(found, dict(measured))]
    lines += ["## Settings", "", settings(row for row in ROWS if row.name in rows), ""]
    return "\n".join([*lines, "## Machine", "", machine(found["about"]), ""])


def _legend() -> list[str]:
    return [
        "- **rate**: the peak learning rate, chosen on validation reviews ([the search](rates.md)): the method's",
        "  default, or a variant's own.",
        "- **file**: the tensors of the saved adapter. **training**: the loop alone. **tokens/s**: a token that",
        "  reviews share counts once for each.",
        "- **peak**: the largest resident set until training ended, over that after the imports; the base's weights,",
        "  read and expanded, are in it (of the base: all it did).",
        "- **a review**: scoring both labels of one of 32 reviews in a batch. **16 tokens**: one greedy answer.",
        "  **merged**: the same with the adapter folded into plain weights; empty where it does not fold.",
    ]


def _line(name: str, row: Mapping[str, Any]) -> list[str]:
    return [
        name,
        label(row["rate"]) if row.get("rate") else "",
        f"{row['parameters']:,}" if "parameters" in row else "0",
        _size(row.get("file_bytes")),
        _number(row.get("train_s"), 1),
        _number(row.get("tokens_per_s"), 0),
        f"{(row['peak_bytes'] - row['imports_bytes']) / MIB:,.0f}",
        _number(row["prompt_ms"], 1),
        _number(row.get("merged_prompt_ms"), 1),
        _number(row["greedy_ms"], 0),
        _number(row.get("merged_greedy_ms"), 0),
        f"{row['loss']:.4f}",
        f"{row['accuracy']:.1%} ± {row['interval']:.1%}",
    ]


def _remarks(rows: Mapping[str, Any]) -> list[str]:
    """Why a row does not fold, where that is not plain; what was said in training; attaching that took its time."""
    found = []
    for name, row in rows.items():
        if len(row.get("not_merged", "")) > len("it trains the base's own weights"):
            found.append(f"- `{name}` was not merged: {row['not_merged']}")
        found += [f"- `{name}`: {line}" for line in row.get("said", ())]
        if row.get("attach_s", 0.0) > 5:
            found.append(f"- `{name}`: its start took {row['attach_s']:.0f} s before training")
    return found


def _samples(found: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """What each row answers to the first test reviews."""
    answering = {**({"untuned base": found["base"]} if found["base"] else {}), **rows}
    if not answering:
        return [NOTHING, ""]
    questions = next(iter(answering.values()))["samples"]
    lines = [f"{n}. {_short(q['review'])} (**{q['label']}**)" for n, q in enumerate(questions, 1)]
    head = ("row", *(f"answer {n}" for n in range(1, len(questions) + 1)))
    table = [[f"`{name}`", *(_short(said["answer"]) for said in row["samples"])] for name, row in answering.items()]
    return [*lines, "", grid(head, table), ""]


def _short(text: str) -> str:
    """One line of a text, without what Markdown would take for markup."""
    flat = " ".join(text.split()).replace("`", "'").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
    return flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 3]}..."


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
