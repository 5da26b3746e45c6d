"""Serving several adapters: requests at once and one at a time, ours over HTTP, transformers and PEFT switching.

python -m bench.serve                     8 requests over 4 adapters, three rounds, and a single stream beside peers
python -m bench.serve --python hf=PATH    an interpreter that has transformers and PEFT; else bench/.envs/hf
python -m bench.serve --fresh             forget what an earlier run has finished

Ours runs in this interpreter (pip install 'tunesmith[serve]'). In every round ours and each peer run in turn, each in a
fresh process, on the same weights, adapters and prompts; a ratio is taken within its round. The first token's time
counts from the round's beginning, when all requests came. The results are in serve.json and serve.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.envs import EnvError, Envs
from bench.ledger import Ledger, Record
from bench.pages import (
    MODEL,
    PageError,
    discussion,
    kept,
    loud,
    machine,
    run_options,
    threads,
    up_to,
    write_page,
    write_spec,
)
from bench.process import run
from bench.runner import say
from bench.table import NOTHING, grid

SIDES = {"ours": "serve_ours", "hf": "serve_hf"}  # where all requests are answered
STREAMS = {"ours": "decode_ours", "hf": "decode_hf", "llamacpp": "decode_llamacpp"}  # one request alone, no adapter
PARTS = {"together": SIDES, "stream": STREAMS}
OURS = "ours-batched"


@dataclass(frozen=True)
class Options:
    """What was asked for; by it results are found again."""

    model: str
    dtype: str
    adapters: int
    rank: int
    requests: int
    new_tokens: int
    rounds: int
    repeats: int
    threads: int
    parts: tuple[str, ...] = ("together", "stream")

    def work(self) -> list[tuple[int, str, str, str]]:
        """(round, part, side, child) of each process."""
        rounds, parts = range(self.rounds), [part for part in PARTS if part in self.parts]
        return [
            (number, part, side, child) for number in rounds for part in parts for side, child in PARTS[part].items()
        ]

    def key(self, number: int, part: str, side: str) -> Record:
        """By which a process's results are found again."""
        own = {name: value for name, value in asdict(self).items() if name not in ("rounds", "parts")}
        return {**own, "round": number, "part": part, "side": side}


def measure(options: Options, envs: Envs, ledger: Ledger, work: Path, out: Path) -> int:
    """Run what is not in the ledger yet; returns how many processes failed. Raises PageError."""
    work = (work / "serve").resolve()
    facts = prepare(options, work)
    failed = 0
    for number, part, side, child in options.work():
        key = options.key(number, part, side)
        if ledger.find(key) is None:
            record = _measured(options, envs, facts, work, side, child)
            ledger.add(key, record)
            failed += "error" in record
            say(f"round {number + 1}, {part}, {side}: {record.get('error') or _shown(record)}")
        found = results(options, ledger, facts["about"])
        write_page(out / "serve", found, page(found, kept(out / "serve.md")))
    return failed


def prepare(options: Options, work: Path) -> Record:
    """Model, adapters and prompts for every side. Raises PageError."""
    wanted = {**asdict(options), "folder": str(work), "prompts": 4 * options.requests}
    file = write_spec(work / "prepare.json", wanted)
    done = run([sys.executable, "-m", "bench.children.serve_prepare", str(file)], env=threads(options.threads))
    told = done.told("prepared")
    if done.error or not told:
        raise PageError(f"could not be prepared: {done.error}")
    return told[0]


def _measured(options: Options, envs: Envs, facts: Record, work: Path, side: str, child: str) -> Record:
    """One process: each of its modes' repetitions, or the error."""
    try:
        python = sys.executable if side == "ours" else envs.python(side)
    except EnvError as error:
        return {"error": str(error)}
    wanted = {
        **asdict(options), "folder": str(work), "model": str(work / f"model-{options.dtype}"), "batches": [1],
        "context": 512, "model_path": facts["model_path"], "prompts": facts["prompts"], "eos": facts["eos"],
    }  # fmt: skip
    file = write_spec(work / f"{child}.json", wanted)
    done = run([python, "-m", f"bench.children.{child}", str(file)], env=threads(options.threads))
    if done.error:
        return {"error": done.error}
    modes: dict[str, list[Record]] = {}
    for event in (*done.told("served"), *done.told("decoded")):
        modes.setdefault(event.get("mode", side), []).append(
            {key: event[key] for key in ("seconds", "tokens", "first_token_s") if key in event}
        )
    absent = {event["mode"]: event["error"] for event in done.told("absent")}
    return {"modes": modes, "absent": absent, "peak_bytes": done.peak_bytes}


def _shown(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{mode} {speed(found):.1f} tokens/s" for mode, found in record["modes"].items())


def speed(found: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second, the median of the repetitions."""
    return median(each["tokens"] / each["seconds"] for each in found)


def results(options: Options, ledger: Ledger, about: Mapping[str, Any]) -> Record:
    """What serve.json holds: options, machine, and for each part the rounds of each mode."""
    found: Record = {
        "format": 1,
        "options": asdict(options),
        "about": about,
        "together": {},
        "stream": {},
        "absent": {},
    }
    for number, part, side, _ in options.work():
        key = options.key(number, part, side)
        record = ledger.find(key) or {"modes": {}, "absent": {}}
        if (error := ledger.error(key)) is not None:
            found["absent"][f"{side}, {part}"] = error
        found["absent"] |= record["absent"]
        for mode, each in record["modes"].items():
            found[part].setdefault(mode, {})[str(number)] = each
    return found


def page(found: Mapping[str, Any], words: str) -> str:
    """serve.md; `words` are a person's own, which are kept."""
    asked = found["options"]
    if not found["together"] and not found["stream"]:
        return NOTHING
    head = ("", "tokens/s", f"`{OURS}` over it", "first token, s: median", "first token, s: longest")
    together = [_row(mode, rounds, found["together"]) for mode, rounds in found["together"].items()]
    lines = [
        *("# Serving", "", "```sh", command(asked), "```", ""),
        f"{asked['model']} in {asked['dtype']}, {asked['adapters']} LoRA adapters of rank {asked['rank']} on all "
        f"linears, {asked['threads']} threads.",
        f"{asked['requests']} requests that come at once, up to {asked['new_tokens']} new tokens each, greedy. Ours is",
        "asked over HTTP and streams. Medians over the rounds; a ratio is taken within its round.",
        "",
        grid(head, together),
        "",
        *(_stream_of(found["stream"]) if found["stream"] else []),
        *loud(found["absent"], "not measured"),
        *([""] if found["absent"] else []),
    ]
    return "\n".join([*lines, *discussion(words), "## Machine", "", machine(found["about"]), ""])


def _stream_of(part: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"`{mode}`", f"{median(speed(each) for each in rounds.values()):.1f}", _ratio(part, "ours", mode))
        for mode, rounds in part.items()
    ]
    said = "One request at a time, the base without an adapter."
    return ["## A single stream", "", said, "", grid(("", "tokens/s", "`ours` over it"), rows), ""]


def _row(mode: str, rounds: Mapping[str, Any], part: Mapping[str, Any]) -> tuple[str, ...]:
    firsts = [each["first_token_s"] for repeats in rounds.values() for each in repeats]
    return (
        f"`{mode}`",
        f"{median(speed(each) for each in rounds.values()):.1f}",
        _ratio(part, OURS, mode),
        f"{median(median(first) for first in firsts):.2f}",
        f"{median(max(first) for first in firsts):.2f}",
    )


def _ratio(part: Mapping[str, Any], ours: str, mode: str) -> str:
    """The median ratio of speeds within a round, and in parentheses the least and the largest."""
    mine, theirs = part.get(ours, {}), part[mode]
    both = [speed(mine[number]) / speed(theirs[number]) for number in theirs if number in mine]
    if not both or mode == ours:
        return ""
    return f"{median(both):.2f} ({min(both):.2f} to {max(both):.2f})"


def command(asked: Mapping[str, Any]) -> str:
    """The command that makes the page again."""
    names = ("model", "dtype", "adapters", "rank", "requests", "new_tokens", "rounds", "repeats", "threads")
    words = [f"--{name.replace('_', '-')} {asked[name]}" for name in names]
    return " ".join(["python -m bench.serve", *words, "--parts", ",".join(asked["parts"])])


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a process failed, 2 a wrong word."""
    given = _parser().parse_args(words)
    options = Options(
        given.model, given.dtype, given.adapters, given.rank, given.requests, given.new_tokens, given.rounds,
        given.repeats, given.threads, tuple(given.parts),
    )  # fmt: skip
    if wrong := set(given.parts) - set(PARTS):
        say(f"serve: parts are {', '.join(PARTS)}; got {', '.join(sorted(wrong))}")
        return 2
    pairs = [word.partition("=") for word in given.python]
    if wrong := [side for side, _, path in pairs if side not in STREAMS or not path]:
        say(f"serve: --python takes SIDE=PATH, a side of {', '.join(STREAMS)}; got {wrong}")
        return 2
    envs = Envs({side: path for side, _, path in pairs})
    try:
        return int(
            measure(options, envs, Ledger(given.work / "serve.jsonl", fresh=given.fresh), given.work, given.out) > 0
        )
    except PageError as error:
        say(f"serve: {error}")
        return 1
    except KeyboardInterrupt:
        say("serve: stopped; the same command goes on")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="catalog name, folder or .gguf file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--adapters", type=up_to(100), default=4)
    parser.add_argument("--rank", type=up_to(1024), default=8)
    parser.add_argument("--requests", type=up_to(256), default=8)
    parser.add_argument("--new-tokens", type=up_to(4096), default=64)
    parser.add_argument("--rounds", type=up_to(100), default=3)
    parser.add_argument("--repeats", type=up_to(100), default=2)
    parser.add_argument("--parts", type=lambda word: word.split(","), default=list(PARTS))
    parser.add_argument("--python", action="append", default=[], metavar="SIDE=PATH", help="an interpreter for a side")
    return run_options(parser)


if __name__ == "__main__":
    sys.exit(main())
