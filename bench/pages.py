"""What the pages of bench/rates.py and bench/methods.py share: facts asked of a child, kept text, machine, settings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.envs import last_line
from bench.method_table import Row
from bench.process import run
from bench.runner import QUIET, WORK
from bench.table import GIB, RESULTS, grid
from tunesmith.files import atomic_write_text

NOT_WRITTEN = "Not written yet."
MODEL, DATA = "smollm2-135m-instruct", "movie-reviews"


class PageError(Exception):
    """Nothing can be measured; the text says why."""


def ask_facts(rows: Sequence[Row], model: str, data: str, work: Path) -> dict[str, Any]:
    """What a child finds: machine and versions, each row's default rate, and the rows that cannot run with the reason.

    Model and data are then in the cache. Raises PageError.
    """
    file = write_spec(work / "facts.json", {"rows": {r.name: r.adapter for r in rows}, "model": model, "data": data})
    done = run([sys.executable, "-m", "bench.children.method_facts", str(file)], env=QUIET)
    told = done.told("facts")
    if done.error or not told:
        raise PageError(done.error or last_line(done.log))
    return told[0]


def write_spec(file: Path, wanted: Mapping[str, Any]) -> Path:
    """Write a child's specification; returns where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted), encoding="utf-8")
    return file.resolve()


def threads(count: int) -> dict[str, str]:
    """The environment of a child that computes with `count` threads."""
    return {**QUIET, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def up_to(most: int) -> Callable[[str], int]:
    """An argument's type: a whole number from 1 to `most`."""

    def number(word: str) -> int:
        value = int(word)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between 1 and {most}")
        return value

    return number


def page_parser(stem: str, about: str | None, minutes: float, sets: str) -> argparse.ArgumentParser:
    """The options that `python -m bench.STEM` shares with other pages; `sets` names the files that it reads."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{stem}", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", help="rows or kinds, by commas; the page then holds these alone")
    parser.add_argument("--minutes", type=float, default=minutes, help="what is not done by then is left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for {stem}.json and {stem}.md")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what is made on the way")
    parser.add_argument("--model", default=MODEL, help="catalog name, folder or .gguf file")
    parser.add_argument("--data", default=DATA, help=f"catalog name, or folder with {sets}")
    parser.add_argument("--fresh", action="store_true", help="forget what was finished before")
    return parser


def run_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what every command that can be gone on with takes: threads, folders, a fresh start."""
    parser.add_argument("--threads", type=up_to(1024), default=2)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what is made on the way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the page and its JSON")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has finished")
    return parser


def write_page(stem: Path, found: Mapping[str, Any], text: str) -> None:
    """STEM.json and STEM.md."""
    atomic_write_text(stem.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    atomic_write_text(stem.with_suffix(".md"), text)


def kept(page: Path) -> str:
    """What a person wrote into the page between its two markers."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    _, found, rest = text.partition(BEGIN)
    inside, closed, _ = rest.partition(END)
    return inside.strip() if found and closed and inside.strip() else NOT_WRITTEN


BEGIN, END = "<!-- discussion begin -->", "<!-- discussion end -->"


def discussion(text: str) -> list[str]:
    """The place for a person's words, which the command keeps."""
    return ["## What it says", "", BEGIN, "", text, "", END, ""]


def machine(about: Mapping[str, Any]) -> str:
    """Machine and versions as a table."""
    cpu, memory = about["cpu"], about["memory"]
    return grid(
        ("machine", ""),
        [
            ("processor", f"{cpu['model']}, {cpu['cores']} cores ({', '.join(cpu['features']) or 'no AVX2'})"),
            ("memory", f"{memory['total_bytes'] / GIB:.1f} GiB"),
            ("system", about["system"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        ],
    )


def settings(rows: Iterable[Row]) -> str:
    """What each row is, and its settings under `adapter:`."""
    return grid(("row", "what it is", "`adapter:`"), [(f"`{r.name}`", r.about, f"`{_yaml(r.adapter)}`") for r in rows])


def _yaml(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return json.dumps(value) if not isinstance(value, str) or set(value) & set(" :,{}[]#") else value


def loud(absent: Mapping[str, str], what: str) -> list[str]:
    """One line for each row that is missing from a table."""
    return [f"- **{what}: `{name}`**: {reason}" for name, reason in absent.items()]
