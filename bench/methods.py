"""Every method on movie-reviews at equal budget, on one page.

python -m bench.methods                                  every row of bench/method_table.py: under an hour on two cores
python -m bench.methods --methods lora,ia3 --limit 128   some rows or kinds, fewer reviews
python -m bench.methods --fresh                          forget what an earlier run has finished

Equal budget: the same reviews in the same order, once, in the same batches from the same seed, each row at its own
rate: its method's default, or for a variant the one that bench/rates.py has chosen for it. A row is a fresh process:

    load -> attach, train -> save -> loss and accuracy on test reviews -> latencies, answers -> fold, latencies again

The untuned base comes first. Killed and started again, it goes on: a finished row (a line of WORK/methods.jsonl) is not
measured again, and the page is written after each. What a person writes into the page between its markers stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ledger import Ledger, Record
from bench.method_table import Row, chosen
from bench.methods_page import page
from bench.pages import PageError, ask_facts, kept, page_parser, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import say
from bench.table import RESULTS
from tunesmith.hardware import share_cores

SEED, BATCH = 0, 16
BASE = "untuned base"
NO_TIME = "no time was left"


@dataclass(frozen=True)
class Options:
    """What a page was asked for; `key` is what its rows depend on."""

    limit: int
    test: int
    threads: int
    minutes: float
    model: str
    data: str
    out: Path
    work: Path
    command: str

    def key(self, row: Row | None, rate: float | None) -> dict[str, Any]:
        """The specification of one row's child; without a row, of the bare base."""
        return {
            "model": self.model, "data": self.data, "reviews": self.limit, "held": self.test, "split": "test",
            "batch": BATCH, "seed": SEED, "threads": self.threads, "rate": rate,
            "adapter": None if row is None else dict(row.adapter),
        }  # fmt: skip


class Pages:
    """Measures row after row and keeps the page up to date."""

    def __init__(
        self,
        options: Options,
        rows: Sequence[Row],
        facts: Mapping[str, Any],
        rates: Mapping[str, float],
        ledger: Ledger,
    ) -> None:
        self.options, self.rows, self.facts, self.rates = options, rows, facts, rates
        self.ledger = ledger
        self.missing: dict[str, str] = dict(facts["absent"])
        self._began, self._longest = time.monotonic(), 0.0

    def run(self) -> dict[str, Any]:
        """Measure what is not there yet; returns what methods.json holds."""
        todo = [None, *(row for row in self.rows if row.name in self.rates)]
        for row in todo:
            name, key = (row.name if row else BASE), self.key(row)
            left = 60 * self.options.minutes - (time.monotonic() - self._began)
            if self.ledger.find(key) is not None:
                continue
            if left < 1.2 * self._longest:
                self.missing[name] = NO_TIME
                continue
            record = self._measure(name, key, left)
            if record is None:
                self.missing[name] = NO_TIME
                continue
            self.ledger.add(key, record)
            if "error" in record:
                self.missing[name] = record["error"]
            say(f"{name}: {_said(record)}")
            self.write()
        return self.write()

    def key(self, row: Row | None) -> dict[str, Any]:
        """What a row's line in the ledger is found by."""
        return self.options.key(row, None if row is None else self.rates[row.name])

    def _measure(self, name: str, key: Mapping[str, Any], left: float) -> Record | None:
        """One row's figures, or its error; None where the time was over before it ended."""
        spec = write_spec(self.options.work / "method.json", key)
        command = [sys.executable, "-m", "bench.children.method_row", str(spec)]
        say(f"{name}: begins, {left / 60:.0f} minutes are left")
        done = run(command, env=threads(self.options.threads), limit=left)
        if done.wall_s >= left:
            return None
        self._longest = max(self._longest, done.wall_s)
        told = done.told("row")
        if done.error or not told:
            return {"error": done.error or "ended without an error, but told nothing"}
        return {**{k: v for k, v in told[0].items() if k not in ("event", "t")}, "wall_s": round(done.wall_s, 1)}

    def write(self) -> dict[str, Any]:
        """methods.json and methods.md as far as is known; returns the former."""
        known = {row.name: self.ledger.find(self.key(row)) for row in self.rows if row.name in self.rates}
        measured = {
            row.name: {"about": row.about, "adapter": dict(row.adapter), "rate": self.rates[row.name], **record}
            for row in self.rows
            if (record := known.get(row.name)) is not None
        }
        base = self.ledger.find(self.key(None))
        records = [*measured.values(), *([base] if base else [])]
        found = {
            "format": 1,
            "command": self.options.command,
            "options": {k: v for k, v in self.options.key(None, None).items() if k not in ("adapter", "rate")},
            "minutes": round(sum(record["wall_s"] for record in records) / 60, 1),
            "about": self.facts["about"],
            "base": base,
            "rows": measured,
            "missing": self.missing,
        }
        write_page(self.options.out / "methods", found, page(found, kept(self.options.out / "methods.md")))
        return found


def rate_of(row: Row, facts: Mapping[str, Any], searched: Path) -> float:
    """The rate that a row learns at: what the search has chosen for these very settings, else its method's default."""
    found: Mapping[str, Any] = {}
    if searched.is_file():
        found = json.loads(searched.read_text(encoding="utf-8"))["rows"].get(row.name, {})
    default = float(facts["rates"][row.name])
    if found.get("leads", True) or found.get("chosen") is None or found["adapter"] != dict(row.adapter):
        return default
    return float(found["chosen"])


def _said(record: Mapping[str, Any]) -> str:
    if "loss" in record:
        return f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.1%} ({record['wall_s']:.0f} s)"
    return f"diverged: {record['diverged']}" if "diverged" in record else f"error: {record['error']}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a row failed or was left over, 2 a wrong word."""
    given = _parser().parse_args(words)
    share_cores()  # for the children, which import torch
    try:
        rows = chosen(given.methods)
    except ValueError as error:
        say(f"methods: {error}")
        return 2
    methods = f" --methods {given.methods}" if given.methods else ""
    command = f"python -m bench.methods --limit {given.limit} --test {given.test}{methods}"
    options = Options(
        given.limit, given.test, given.threads, given.minutes, given.model, given.data, given.out, given.work, command
    )
    try:
        facts = ask_facts(rows, options.model, options.data, options.work)
    except PageError as error:
        say(f"methods: {error}")
        return 1
    rates = {row.name: rate_of(row, facts, given.rates) for row in rows if row.name in facts["rates"]}
    pages = Pages(options, rows, facts, rates, Ledger(options.work / "methods.jsonl", fresh=given.fresh))
    try:
        found = pages.run()
    except KeyboardInterrupt:
        say("methods: stopped; the same command goes on")
        return 130
    print((options.out / "methods.md").read_text(encoding="utf-8"))
    return 0 if found["base"] and found["missing"].keys() <= facts["absent"].keys() else 1


def _parser() -> argparse.ArgumentParser:
    parser = page_parser("methods", __doc__, 85.0, "train.jsonl and test.jsonl")
    parser.add_argument("--limit", type=up_to(10**6), default=512, help="training reviews")
    parser.add_argument("--test", type=up_to(10**6), default=300, help="test reviews that are measured on")
    parser.add_argument("--threads", type=up_to(1024), default=2, help="threads of each row's process")
    parser.add_argument("--rates", type=Path, default=RESULTS / "rates.json", help="the search of bench/rates.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
