"""A small recorded search of each method's default learning rate.

python -m bench.rates                                    every row of bench/method_table.py: under an hour on two cores
python -m bench.rates --methods lora,ia3 --rates 5       some rows or kinds
python -m bench.rates --fresh                            forget what an earlier search has finished

One seed, at most 400 reviews and 5 rates a method, one pass, batch 16, warm-up 10%, then cosine; chosen by the loss on
fixed validation reviews, never on the test set. Two processes hold the base and try one rate after another:

    queue of (row, rate)  ->  attach, train, measure, take off  ->  a line of WORK/rates.jsonl  ->  rates.json, rates.md

Rates are 1 and 3 times powers of ten about the row's centre; while the best is the highest or the lowest of them, one
more is tried beyond it, up to five. Killed and started again, it goes on: a finished pair is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.envs import ROOT, last_line
from bench.ledger import Ledger, Record
from bench.method_table import Row, chosen, grid, label
from bench.pages import PageError, ask_facts, kept, page_parser, threads, up_to, write_page, write_spec
from bench.process import MARK
from bench.rates_page import entry, further, outcome, page
from bench.runner import say
from tunesmith.hardware import share_cores

MOST_REVIEWS, MOST_RATES = 400, 5
SEED, BATCH = 0, 16
BASE = "untuned"


@dataclass(frozen=True)
class Options:
    """What a search was asked for; `key` is what its results depend on."""

    reviews: int
    rates: int
    held: int
    minutes: float
    workers: int
    model: str
    data: str
    out: Path
    work: Path

    @property
    def key(self) -> dict[str, Any]:
        """What every pair of the search has in common."""
        return {
            "model": self.model, "data": self.data, "reviews": self.reviews, "held": self.held, "split": "valid",
            "batch": BATCH, "seed": SEED,
        }  # fmt: skip

    def pair(self, row: Row | None, rate: float | None) -> dict[str, Any]:
        """The key of one pair; without a row, of the bare base."""
        return {**self.key, "adapter": None if row is None else dict(row.adapter), "rate": rate}


class Worker:
    """A child that keeps the base in memory and tries one adapter and rate after another (children/rate_worker.py)."""

    def __init__(self, wanted: Path, log: Path) -> None:
        self.log, self.answered = log, False
        with log.open("w", encoding="utf-8") as file:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "bench.children.rate_worker", str(wanted)], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
                env={**os.environ, **threads(1)},
            )  # fmt: skip

    def ask(self, adapter: Mapping[str, Any] | None, rate: float | None) -> Record:
        """What came of a pair; an error where the child has ended."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: what it wrote tells why
            self._child.stdin.write(json.dumps({"adapter": adapter, "rate": rate}) + "\n")
            self._child.stdin.flush()
        for line in self._child.stdout:
            if line.startswith(MARK):
                self.answered = True
                told = json.loads(line[len(MARK) :])
                return {key: value for key, value in told.items() if key not in ("event", "t")}
        self._child.wait()
        said = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
        return {"error": f"the worker ended with {self._child.returncode}: {said}"}

    @property
    def alive(self) -> bool:
        """Has it not ended?"""
        return self._child.poll() is None

    def end(self) -> None:
        """Kill it, if it has not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()


class Search:
    """Hands out pairs to the workers until none is left or the time is over."""

    def __init__(self, options: Options, rows: Sequence[Row], ledger: Ledger) -> None:
        self.options, self.rows, self.ledger = options, rows, ledger
        self.failed: str | None = None
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._given: set[tuple[str, float | None]] = set()
        self._seconds: list[float] = []
        self._workers: list[Worker] = []
        self._over = False

    def run(self) -> None:
        """Work through the queue; what is still at work when the time is over is stopped and left out."""
        wanted = write_spec(self.options.work / "rates.json", {**self.options.key, "threads": 1})
        numbers = range(self.options.workers)
        hands = [threading.Thread(target=self._serve, args=(wanted, n), daemon=True) for n in numbers]
        for hand in hands:
            hand.start()
        try:
            while any(hand.is_alive() for hand in hands) and self._left() > 0 and not self._over:
                time.sleep(0.1)
        finally:  # Ctrl-C as well: no worker may go on without its parent
            with self._lock:
                self._over = True
                for worker in self._workers:
                    worker.end()
        for hand in hands:
            hand.join()

    def pairs(self, row: Row) -> dict[float, Record | None]:
        """Each rate that the row is to be tried at, as far as is known by now, and what came of it."""
        rates = grid(row.centre, self.options.rates) if row.centre is not None else []
        records = {rate: self.ledger.find(self.options.pair(row, rate)) for rate in rates}
        while 3 <= len(records) < MOST_RATES:
            known = {rate: record for rate, record in records.items() if record is not None}
            more = further(known) if len(known) == len(records) else None
            if more is None:
                break
            records[more] = self.ledger.find(self.options.pair(row, more))
        return records

    def _next(self) -> tuple[Row | None, float | None] | None:
        """The next pair that nobody has; None at the end, or where it would not be done in time."""
        with self._lock:
            if self._over or self._left() < (1.2 * median(self._seconds) if self._seconds else 0.0):
                return None
            if self.ledger.find(self.options.pair(None, None)) is None and (BASE, None) not in self._given:
                self._given.add((BASE, None))
                return None, None
            for row in self.rows:
                for rate, record in self.pairs(row).items():
                    if record is None and (row.name, rate) not in self._given:
                        self._given.add((row.name, rate))
                        return row, rate
            return None

    def _serve(self, wanted: Path, number: int) -> None:
        """One worker's thread: a new child where the last one has died."""
        worker: Worker | None = None
        while (pair := self._next()) is not None:
            row, rate = pair
            with self._lock:
                if self._over:
                    return
                if worker is None or not worker.alive:
                    worker = Worker(wanted, self.options.work / f"rates-{number}.log")
                    self._workers.append(worker)
            record = worker.ask(row.adapter if row else None, rate)
            with self._lock:
                if self._over:
                    return
                if not worker.answered:  # not the pair's fault: base or data could not be loaded
                    self.failed, self._over = record["error"], True
                    return
                self.ledger.add(self.options.pair(row, rate), record)
                self._seconds.append(record.get("seconds", 0.0))
            name = f"{row.name} at {label(rate)}" if row and rate else BASE
            say(f"{name}: {record.get('error') or outcome(record)} ({record.get('seconds', 0):.0f} s)")

    def _left(self) -> float:
        return 60 * self.options.minutes - (time.monotonic() - self._began)


def results(search: Search, facts: Mapping[str, Any], rows: Sequence[Row], command: str) -> dict[str, Any]:
    """All that the search has found, as it is written to rates.json."""
    options, ledger, entries = search.options, search.ledger, {}
    for row in search.rows:
        if row.centre is None:
            continue
        records = search.pairs(row)
        errors = {rate: error for rate in records if (error := ledger.error(options.pair(row, rate))) is not None}
        entries[row.name] = entry(row, records, errors, facts["rates"][row.name])
    base = ledger.find(options.pair(None, None)) or {}
    minutes = sum(row["seconds"] for row in entries.values()) / options.workers / 60
    return {
        "format": 1,
        "command": command,
        "options": options.key,
        "workers": options.workers,
        "minutes": round(minutes, 1),
        "about": facts["about"],
        "base": base.get("loss"),
        "rows": entries,
        "missing": dict(facts["absent"]),
        "at_default": [row.name for row in rows if row.centre is None],
    }


def main(words: Sequence[str] | None = None) -> int:
    """Search, write rates.json and rates.md; 0 done, 1 something failed or was left over, 2 a wrong word."""
    given = _parser().parse_args(words)
    share_cores()  # for the children, which import torch
    try:
        rows = chosen(given.methods)
    except ValueError as error:
        say(f"rates: {error}")
        return 2
    options = Options(
        given.reviews, given.rates, given.held, given.minutes, given.workers, given.model, given.data, given.out,
        given.work,
    )  # fmt: skip
    try:
        facts = ask_facts(rows, options.model, options.data, options.work)
    except PageError as error:
        say(f"rates: {error}")
        return 1
    present = [row for row in rows if row.name in facts["rates"]]
    search = Search(options, present, Ledger(options.work / "rates.jsonl", fresh=given.fresh))
    stopped = False
    try:
        search.run()
    except KeyboardInterrupt:
        stopped = True
    finally:
        found = results(search, facts, rows, _command(given))
        text = page(found, kept(options.out / "rates.md"))
        write_page(options.out / "rates", found, text)
    if stopped:
        say("rates: stopped; the same command goes on")
        return 130
    if search.failed:
        say(f"rates: {search.failed}")
        return 1
    print(text)
    return 1 if any(row["untried"] or row["failed"] for row in found["rows"].values()) else 0


def _command(given: argparse.Namespace) -> str:
    methods = f" --methods {given.methods}" if given.methods else ""
    return f"python -m bench.rates --reviews {given.reviews} --rates {given.rates}{methods}"


def _parser() -> argparse.ArgumentParser:
    parser = page_parser("rates", __doc__, 58.0, "train.jsonl and valid.jsonl")
    parser.add_argument("--reviews", type=up_to(MOST_REVIEWS), default=192, help="training reviews, at most 400")
    parser.add_argument("--rates", type=up_to(MOST_RATES), default=3, help="rates of a row to begin with, at most 5")
    parser.add_argument("--held", type=up_to(1000), default=100, help="validation reviews that choose")
    parser.add_argument("--workers", type=up_to(64), default=2, help="processes, of one thread each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
