"""The same questions through lm-evaluation-harness, by our model class and by the library's Hugging Face backend.

python -m bench.harness --data-dir FOLDER              four tasks made local over FOLDER/commonsense, float32
python -m bench.harness --data-dir FOLDER --items 40 --rounds 1 --batch-sizes 8
python -m bench.harness --data-dir FOLDER --fresh      forget what an earlier run has finished

Both sides get the same rows, tasks and weights, in a process of their own, by turns; of the other side each batch size
is tried. It needs `pip install 'tunesmith[harness]' transformers accelerate`. Killed and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.ledger import Ledger, Record
from bench.pages import MODEL, discussion, kept, machine, run_options, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import say
from bench.table import NOTHING, grid

TASKS = {  # ours -> the file that holds its rows
    "hellaswag": "hellaswag_3k.jsonl.gz",
    "arc_easy": "ARC-Easy_train.jsonl.gz",
    "arc_challenge": "ARC-Challenge_train.jsonl.gz",
    "openbookqa": "openbookqa_train.jsonl.gz",
}
OURS = "ours"


@dataclass(frozen=True)
class Options:
    """What the page was asked for."""

    model: str
    items: int
    shots: int
    rounds: int
    batch_sizes: tuple[int, ...]
    threads: int

    def sides(self) -> list[str]:
        """Ours, then the other with each batch size."""
        return [OURS, *(f"hf, batch {size}" for size in self.batch_sizes)]

    def key(self, side: str, number: int) -> dict[str, Any]:
        """The specification of one process, by which its results are found again."""
        own = {"model": self.model, "items": self.items, "shots": self.shots, "threads": self.threads}
        return {**own, "side": side, "round": number, "tasks": sorted(TASKS)}


def measure(options: Options, ledger: Ledger, data: Path, work: Path, out: Path) -> int:
    """Run what is not in the ledger yet; returns how many processes failed."""
    failed = 0
    for number in range(options.rounds):
        for side in options.sides():
            key = options.key(side, number)
            if ledger.find(key) is None:
                record = one(key, data, work, options.threads)
                ledger.add(key, record)
                failed += "error" in record
                say(f"round {number + 1}, {side}: {record.get('error') or shown(record)}")
        found = results(options, ledger)
        write_page(out / "harness", found, page(found, kept(out / "harness.md")))
    return failed


def one(key: Mapping[str, Any], data: Path, work: Path, count: int) -> Record:
    """What one side told of one pass over all tasks."""
    places = {name: str(data / "commonsense" / file) for name, file in TASKS.items()}
    wanted = {**key, "files": places, "work": str(work.resolve())}
    spec = write_spec(work / "harness-side.json", wanted)
    done = run([sys.executable, "-m", "bench.children.harness_side", str(spec)], env=threads(count))
    told = done.told("harness")
    if done.error or not told:
        return {"error": done.error or "told nothing"}
    return {name: value for name, value in told[0].items() if name not in ("event", "t")}


def shown(record: Record) -> str:
    """Seconds by task, for the log."""
    return ", ".join(f"{task} {found['seconds']:.1f} s" for task, found in record["tasks"].items())


def results(options: Options, ledger: Ledger) -> dict[str, Any]:
    """What harness.json holds: the options, the machine, and each task's agreement and times."""
    passes: dict[str, list[Record]] = {}
    for side in options.sides():
        records = [ledger.find(options.key(side, number)) for number in range(options.rounds)]
        passes[side] = [record for record in records if record is not None and "error" not in record]
    found: dict[str, Any] = {"format": 1, "options": asdict(options), "about": None, "tasks": {}}
    ours = passes.pop(OURS)
    whole = {side: records for side, records in passes.items() if len(records) == len(ours)}
    if not ours or not whole:
        return found
    best = min(whole, key=lambda side: median(total(record) for record in whole[side]))
    found |= {"about": ours[0]["about"], "best": best, "tried": {s: [total(r) for r in rs] for s, rs in whole.items()}}
    for task in TASKS:
        pairs = [(mine["tasks"][task], other["tasks"][task]) for mine, other in zip(ours, whole[best], strict=True)]
        found["tasks"][task] = {**agreement(*pairs[0]), **speed(pairs)}
    found["all"] = speed(
        [({"seconds": total(a)}, {"seconds": total(b)}) for a, b in zip(ours, whole[best], strict=True)]
    )
    return found


def total(record: Record) -> float:
    """Seconds of all tasks."""
    return sum(task["seconds"] for task in record["tasks"].values())


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """On how many items both choose the same option, by summed and by normalised score; the largest difference."""
    items = len(ours["scores"])
    same = {
        name: sum(a == b for a, b in zip(ours[name], theirs[name], strict=True)) / items for name in ("acc", "acc_norm")
    }
    rows = zip(ours["scores"], theirs["scores"], strict=True)
    furthest = max(abs(a - b) for mine, other in rows for a, b in zip(mine, other, strict=True))
    accuracy = {"ours": ours["accuracy"], "theirs": theirs["accuracy"]}
    return {"items": items, "same": same, "largest_difference": furthest, "accuracy": accuracy}


def speed(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Median seconds of both, and their ratio taken within each round."""
    ratios = [other["seconds"] / mine["seconds"] for mine, other in pairs]
    return {
        "seconds": {"ours": median(a["seconds"] for a, _ in pairs), "theirs": median(b["seconds"] for _, b in pairs)},
        "ratio": {"median": median(ratios), "least": min(ratios), "largest": max(ratios)},
    }


def page(found: Mapping[str, Any], words: str) -> str:
    """harness.md; `words` are a person's own, which are kept."""
    if found["about"] is None:
        return NOTHING
    asked = found["options"]
    head = (
        "",
        "items",
        "same choice, acc",
        "same choice, acc_norm",
        "largest difference",
        "accuracy",
        "ours, s",
        "hf, s",
    )
    rows = [
        (
            f"`{task}`", f"{r['items']:,}", f"{r['same']['acc']:.2%}", f"{r['same']['acc_norm']:.2%}",
            f"{r['largest_difference']:.1e}", f"{r['accuracy']['ours']:.4f} / {r['accuracy']['theirs']:.4f}",
            f"{r['seconds']['ours']:.1f}", f"{r['seconds']['theirs']:.1f}", ratio(r),
        )
        for task, r in found["tasks"].items()
    ]  # fmt: skip
    both = found["all"]
    rows.append(
        ("all", "", "", "", "", "", f"{both['seconds']['ours']:.1f}", f"{both['seconds']['theirs']:.1f}", ratio(both))
    )
    tried = ", ".join(f"{side} {median(seconds):.1f} s" for side, seconds in found["tried"].items())
    lines = [
        *("# lm-evaluation-harness: our backend and its own", "", "```sh", command(asked), "```", ""),
        f"{asked['model']} in float32, {asked['shots']} shots, {asked['threads']} threads. Both sides get the same",
        "local tasks. A time is that of the library's call for log-likelihoods, tokenizing included, after a short one",
        f"that does not count; the median of {asked['rounds']} rounds. Of the Hugging Face backend the fastest batch",
        f"size is taken ({tried}). A score is a summed log-probability; accuracy is ours / theirs.",
        "",
        grid((*head, "ratio"), rows),
        "",
    ]
    return "\n".join([*lines, *discussion(words), "## Machine", "", machine(found["about"]), ""])


def ratio(row: Mapping[str, Any]) -> str:
    """A ratio with its least and largest."""
    found = row["ratio"]
    return f"{found['median']:.2f} ({found['least']:.2f} to {found['largest']:.2f})"


def command(asked: Mapping[str, Any]) -> str:
    """The command that makes the page again."""
    sizes = ",".join(map(str, asked["batch_sizes"]))
    words = f"--items {asked['items']} --shots {asked['shots']} --rounds {asked['rounds']} --batch-sizes {sizes}"
    return f"python -m bench.harness --data-dir FOLDER {words} --threads {asked['threads']}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a process failed, 2 a wrong word."""
    given = _parser().parse_args(words)
    missing = [file for file in TASKS.values() if not (given.data_dir / "commonsense" / file).is_file()]
    if missing:
        say(f"harness: {given.data_dir / 'commonsense' / missing[0]} is not there; say with --data-dir where it is")
        return 2
    options = Options(given.model, given.items, given.shots, given.rounds, tuple(given.batch_sizes), given.threads)
    ledger = Ledger(given.work / "harness.jsonl", fresh=given.fresh)
    try:
        failed = measure(options, ledger, given.data_dir, given.work, given.out)
    except KeyboardInterrupt:
        say("harness: stopped; the same command goes on")
        return 130
    say(json.dumps({task: row["same"] for task, row in results(options, ledger)["tasks"].items()}))
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.harness", description=(__doc__ or "").splitlines()[0])
    sizes = lambda word: [int(size) for size in word.split(",") if size]  # noqa: E731
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds commonsense/*.jsonl.gz")
    parser.add_argument("--model", default=MODEL, help="catalog name, folder or .gguf file")
    parser.add_argument("--items", type=up_to(100_000), default=300, help="of each task")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before every question")
    parser.add_argument("--rounds", type=up_to(100), default=3)
    parser.add_argument("--batch-sizes", type=sizes, default=[1, 8, 32], help="of the Hugging Face backend")
    return run_options(parser)


if __name__ == "__main__":
    sys.exit(main())
