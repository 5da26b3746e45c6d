"""What bench/rates.py has found, as rates.json and rates.md hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.ledger import Record
from bench.method_table import ROWS, Row, beyond, label, leads
from bench.pages import discussion, loud, machine, settings
from bench.table import NOTHING, grid


def further(known: Mapping[float, Record]) -> float | None:
    """The rate to try beyond `known`: the best is the highest or the lowest of them. Lower where none is finite."""
    best = choice(known)
    if best is None or best == min(known):
        return beyond(known, up=False)
    return beyond(known, up=True) if best == max(known) else None


def choice(known: Mapping[float, Record]) -> float | None:
    """The rate of the least held-out loss; None where nothing was finite."""
    finite = {rate: record["loss"] for rate, record in known.items() if "loss" in record}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def outcome(record: Mapping[str, Any]) -> str:
    """A record in a word: its loss, diverged, or failed."""
    if "loss" in record:
        return f"{record['loss']:.4f}"
    return "diverged" if "diverged" in record else "failed"


def entry(row: Row, records: Mapping[float, Record | None], errors: Mapping[float, str], default: float) -> Record:
    """A row of rates.json, from what came of each rate that it is to be tried at (None: nothing yet)."""
    known = {rate: record for rate, record in sorted(records.items()) if record is not None}
    return {
        "about": row.about,
        "adapter": dict(row.adapter),
        "leads": leads(row),
        "chosen": choice(known),
        "default": default,
        "seconds": round(sum(record["seconds"] for record in known.values()), 1),
        "untried": [label(rate) for rate, record in records.items() if record is None and rate not in errors],
        "failed": {label(rate): error for rate, error in errors.items()},
        "rates": {label(rate): {"rate": rate, **record} for rate, record in known.items()},
    }


def page(found: Mapping[str, Any], words: str) -> str:
    """rates.md; `words` are a person's own, which are kept."""
    asked, entries = found["options"], found["rows"]
    base = NOTHING if found["base"] is None else f"{found['base']:.4f}"
    lines = [
        *("# Default learning rates: the search", "", "```sh", found["command"], "```", ""),
        f"`{asked['model']}` in float32 on `{asked['data']}`: one pass over the first {asked['reviews']} training",
        f"reviews, batch {asked['batch']}, warm-up 10%, then cosine, seed {asked['seed']}. A cell is the loss on the",
        f"first {asked['held']} validation reviews (the test set is not read); the untuned base has {base}.",
        "**Bold** is the least, which is chosen. While that was the highest or the lowest rate, one more was tried.",
        f"The pairs took {found['minutes']} minutes on {found['workers']} processes of one thread each.",
        *("", "`*`: the first row of its method; the rate chosen for it is the method's default.", ""),
    ]
    rates = sorted({record["rate"] for row in entries.values() for record in row["rates"].values()})
    head = ("row", *(label(rate) for rate in rates), "chosen", "default in the code", "seconds")
    lines += [grid(head, [_line(name, row, rates) for name, row in entries.items()]) if entries else NOTHING, ""]
    lines += [*loud(found["missing"], "NOT SEARCHED"), *remarks(entries)]
    lines += [*_listed("not searched, they learn at their method's default rate", found["at_default"]), ""]
    lines += [*discussion(words), "## Settings", "", settings(row for row in ROWS if row.name in entries), ""]
    return "\n".join([*lines, "## Machine", "", machine(found["about"]), ""])


def _line(name: str, row: Mapping[str, Any], rates: Sequence[float]) -> list[str]:
    cells = []
    for rate in rates:
        record = row["rates"].get(label(rate))
        text = "" if record is None else outcome(record)
        cells.append(f"**{text}**" if rate == row["chosen"] else text)
    best = "none" if row["chosen"] is None else label(row["chosen"])
    return [f"`{name}`{' *' if row['leads'] else ''}", *cells, best, label(row["default"]), f"{row['seconds']:.0f}"]


def remarks(entries: Mapping[str, Any]) -> list[str]:
    """What must not be overlooked: what was not tried or failed, a best rate at the edge, a default not chosen here."""
    found, edge, other = [], [], []
    for name, row in entries.items():
        tried = [record["rate"] for record in row["rates"].values()]
        if row["untried"]:
            found.append(f"- **UNFINISHED: `{name}`**: no time was left for {', '.join(row['untried'])}")
        found += [f"- **FAILED: `{name}` at {rate}**: {error}" for rate, error in row["failed"].items()]
        diverged = {rate: record["diverged"] for rate, record in row["rates"].items() if "diverged" in record}
        found += [f"- `{name}` at {rate} diverged: {why}" for rate, why in diverged.items()]
        if tried and not row["untried"] and row["chosen"] in (None, min(tried), max(tried)):
            edge.append(name)
        if row["leads"] and row["chosen"] not in (None, row["default"]):
            other.append(name)
    found += _listed("**the default in the code is not the rate chosen here**", other)
    return found + _listed("the best rate is at the edge of those tried", edge)


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"- {what}: {', '.join(f'`{name}`' for name in names)}"] if names else []
