"""Time and memory of full and sparse attention against the length of the sequence.

python -m bench.sparse                                   512 to 8,192 tokens: about half an hour on two cores
python -m bench.sparse --lengths 512,1024 --layers 2     a trial
python -m bench.sparse --fresh                           forget what an earlier run has finished

A measurement is a fresh process: some layers of SmolLM2-135M's shape with random weights and a LoRA, one sequence, no
head. Rounds go through all patterns and lengths in turn, so that a busy minute of the machine does not fall on one
pattern. Killed and started again, it goes on. The results are written to sparse.json and sparse.md after each process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.ledger import Ledger, Record
from bench.pages import discussion, kept, machine, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import WORK, say
from bench.table import NOTHING, RESULTS, grid

MIB = 2**20
LENGTHS = (512, 1024, 2048, 4096, 8192)
FULL = "full"


def attention(name: str, length: int) -> dict[str, Any] | None:
    """What a row of the tables is, as it is written under `model.attention`."""
    return {
        FULL: None,
        "local": {"pattern": "local", "window": 256},
        "strided": {"pattern": "strided", "stride": 128, "window": 128},
        "fixed": {"pattern": "fixed", "block": 128, "columns": 8},
        "factorized": {"pattern": "factorized", "stride": 128},
        "s2": {"pattern": "s2", "group": length // 4 // 2 * 2},  # LongLoRA: a quarter of the context
    }[name]


PATTERNS = (FULL, "local", "strided", "fixed", "factorized", "s2")


@dataclass(frozen=True)
class Options:
    """What a page was asked for."""

    lengths: tuple[int, ...]
    patterns: tuple[str, ...]
    shape: str
    layers: int
    dtype: str
    threads: int
    rounds: int
    repeats: int

    def key(self, name: str, length: int, number: int) -> dict[str, Any]:
        """The specification of one process, by which its results are found again."""
        return {
            "attention": attention(name, length), "length": length, "shape": self.shape, "layers": self.layers,
            "dtype": self.dtype, "threads": self.threads, "repeats": self.repeats, "round": number,
        }  # fmt: skip


def measure(options: Options, ledger: Ledger, work: Path, out: Path) -> int:
    """Carry out all rounds; returns how many processes failed."""
    failed = 0
    for number in range(options.rounds):
        for length in options.lengths:
            for name in options.patterns:
                key = options.key(name, length, number)
                if ledger.find(key) is not None:
                    continue
                spec = write_spec(work / "sparse-step.json", key)
                command = [sys.executable, "-m", "bench.children.sparse_step", str(spec)]
                done = run(command, env=threads(options.threads))
                told = done.told("sparse")
                record: Record = told[0] if told else {"error": done.error or "told nothing"}
                ledger.add(key, {k: v for k, v in record.items() if k not in ("event", "t")})
                failed += "error" in record
                shown = record.get("error") or f"a step {record['step_s']:.2f} s, peak {record['peak_bytes'] / MIB:.0f}"
                say(f"round {number + 1}, {name}, {length} tokens: {shown}")
                found = results(options, ledger)
                write_page(out / "sparse", found, page(found, kept(out / "sparse.md")))
    return failed


def results(options: Options, ledger: Ledger) -> dict[str, Any]:
    """What sparse.json holds: by pattern and length, medians over the rounds that are there."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in options.patterns}
    about: Mapping[str, Any] | None = None
    for name in options.patterns:
        for length in options.lengths:
            numbers = range(options.rounds)
            records = [r for n in numbers if (r := ledger.find(options.key(name, length, n))) is not None]
            if records:
                about = records[-1]["about"]
                keys = ("attention_s", "step_s", "peak_bytes", "held_bytes", "pairs", "products")
                rows[name][str(length)] = {
                    **{key: median(record[key] for record in records) for key in keys},
                    "least_step_s": min(record["step_s"] for record in records),
                    "kernels": records[-1]["kernels"], "rounds": len(records), "attention": attention(name, length),
                }  # fmt: skip
    return {"format": 1, "options": vars(options), "about": about, "rows": rows, "crossovers": crossovers(rows)}


# quantity -> (what it is called, how it is got from a row's entry)
QUANTITIES = {
    "attention_s": "attention alone",
    "step_s": "the whole step",
    "peak_bytes": "peak memory",
}


def crossovers(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """Of every pattern and quantity: the least length from which on it is below full attention; None: it never is."""
    found: dict[str, dict[str, int | None]] = {}
    for name, entries in rows.items():
        both = sorted((int(n) for n in entries if n in rows.get(FULL, {})), reverse=True)
        if name == FULL or not both:
            continue
        found[name] = {}
        for quantity in QUANTITIES:
            least = None
            for length in both:
                if entries[str(length)][quantity] >= rows[FULL][str(length)][quantity]:
                    break
                least = length
            found[name][quantity] = least
    return found


def page(found: Mapping[str, Any], words: str) -> str:
    """sparse.md; `words` are a person's own, which are kept."""
    asked, rows = found["options"], found["rows"]
    if found["about"] is None:
        return NOTHING
    lengths = [str(length) for length in asked["lengths"]]
    patterns = [f"{asked['layers']} layers of {asked['shape']}'s shape, random weights, {asked['dtype']}"]
    lines = [
        *("# Full and sparse attention by length", "", "```sh", command(asked), "```", ""),
        f"{patterns[0]}, LoRA of rank 8 on queries and values, one sequence, forward and backward without a head,",
        f"{asked['threads']} threads. Each figure is the median over {asked['rounds']} processes, in each of which it",
        f"is the median of {asked['repeats']} repetitions after one that does not count.",
        "",
    ]
    for title, show in (
        ("Pairs that a head sees, in thousands, and their share of full attention's", _pairs),
        ("Attention alone, one layer, forward and backward, ms", lambda e, full: _times(e, full, "attention_s", 1e3)),
        ("The step, s", lambda e, full: _times(e, full, "step_s", 1)),
        ("Peak memory of the process, MiB", lambda e, full: f"{e['peak_bytes'] / MIB:,.0f}"),
    ):
        head = ("", *(f"{int(n):,} tokens" for n in lengths))
        table = [
            (f"`{name}`", *(show(row[n], rows.get(FULL, {}).get(n)) if n in row else "" for n in lengths))
            for name, row in rows.items()
        ]
        lines += [f"## {title}", "", grid(head, table), ""]
    lines += ["## Where it pays", "", *_crossed(found["crossovers"], asked["lengths"]), ""]
    lines += [*discussion(words), "## Patterns", "", _settings(rows), "", "## Machine", "", machine(found["about"]), ""]
    return "\n".join(lines)


def command(asked: Mapping[str, Any]) -> str:
    """The command that makes the page again."""
    lengths = ",".join(map(str, asked["lengths"]))
    more = "" if tuple(asked["patterns"]) == PATTERNS else f" --patterns {','.join(asked['patterns'])}"
    return (
        f"python -m bench.sparse --lengths {lengths} --layers {asked['layers']} --dtype {asked['dtype']} "
        f"--rounds {asked['rounds']} --repeats {asked['repeats']} --threads {asked['threads']}{more}"
    )


def _pairs(entry: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    share = f" ({entry['pairs'] / full['pairs']:.1%})" if full else ""
    return f"{entry['pairs'] / 1e3:,.0f}{share}"


def _times(entry: Mapping[str, Any], full: Mapping[str, Any] | None, key: str, unit: float) -> str:
    faster = f" ({full[key] / entry[key]:.2f}x)" if full and full is not entry else ""
    digits = 1 if unit > 1 else 2
    return f"{entry[key] * unit:,.{digits}f}{faster}"


def _crossed(found: Mapping[str, Mapping[str, int | None]], lengths: Sequence[int]) -> list[str]:
    rows = []
    for name, by_quantity in found.items():
        shown = []
        for quantity in QUANTITIES:
            least = by_quantity[quantity]
            if least is None:
                shown.append(f"not up to {max(lengths):,}")
            else:
                shown.append(f"{least:,}" + (", the shortest" if least == min(lengths) else ""))
        rows.append((f"`{name}`", *shown))
    said = "The shortest of the measured lengths from which on, at every longer one too, it is below full attention:"
    return [said, "", grid(("", *QUANTITIES.values()), rows) if rows else NOTHING]


def _settings(rows: Mapping[str, Mapping[str, Any]]) -> str:
    shown = []
    for name, entries in rows.items():
        made = {str(entry["attention"]): entry["attention"] for entry in entries.values()}
        several = [", ".join(f"{k}: {v}" for k, v in (a or {"pattern": FULL}).items()) for a in made.values()]
        shown.append((f"`{name}`", "; ".join(f"`{{{one}}}`" for one in several)))
    return grid(("", "`model.attention`"), shown)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a process failed, 2 a wrong word."""
    given = _parser().parse_args(words)
    lengths, names = tuple(sorted(set(given.lengths))), tuple(dict.fromkeys(given.patterns))
    unknown = [name for name in names if name not in PATTERNS]
    if unknown or not lengths or min(lengths) < 16:
        say(f"sparse: patterns are {', '.join(PATTERNS)}, lengths 16 tokens or more; got {unknown or given.lengths}")
        return 2
    options = Options(
        lengths, names, given.shape, given.layers, given.dtype, given.threads, given.rounds, given.repeats
    )
    try:
        failed = measure(options, Ledger(given.work / "sparse.jsonl", fresh=given.fresh), given.work, given.out)
    except KeyboardInterrupt:
        say("sparse: stopped; the same command goes on")
        return 130
    found = results(options, Ledger(given.work / "sparse.jsonl"))
    write_page(given.out / "sparse", found, page(found, kept(given.out / "sparse.md")))
    print((given.out / "sparse.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sparse", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, help="tokens of the sequence, by commas")
    parser.add_argument("--patterns", type=lambda text: text.split(","), default=PATTERNS, help=", ".join(PATTERNS))
    parser.add_argument("--shape", default="smollm2-135m", help="of tunesmith/model/shapes.py")
    parser.add_argument("--layers", type=up_to(1000), default=6)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=up_to(1024), default=2)
    parser.add_argument("--rounds", type=up_to(100), default=2)
    parser.add_argument("--repeats", type=up_to(100), default=3, help="of each figure within a process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for sparse.json and sparse.md")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what is made on the way")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has finished")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


if __name__ == "__main__":
    sys.exit(main())
