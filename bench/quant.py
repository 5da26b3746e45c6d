"""Quantized bases: perplexity, resident bits, and what reading and training on them cost.

python -m bench.quant --data-dir FOLDER              SmolLM2 on FOLDER/text/wikitext2_valid.txt; GPTQ calibrates on
                                                     FOLDER/text/c4_300.jsonl
python -m bench.quant --data-dir FOLDER --rows fp32,nf4 --parts perplexity
python -m bench.quant --data-dir FOLDER --fresh      forget what an earlier run has finished

Every row is a fresh process. The speed of a quantized base and of the dense one are taken in turn in one process, so
that a busy minute falls on both. Killed and started again, it goes on. The results are in quant.json and quant.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.ledger import Ledger, Record
from bench.pages import MODEL, discussion, kept, machine, run_options, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import say
from bench.table import NOTHING, grid
from tunesmith.files import atomic_write_text


def _spec(kind: str, double: bool = False) -> dict[str, Any]:
    return {"spec": {"kind": kind, "block_size": 64, "double_quant": double}}


def _gptq(bits: int, equal_tokens: bool) -> dict[str, Any]:
    return {"gptq": {"bits": bits, "group_size": 64, "act_order": False, "equal_tokens": equal_tokens}}


# name -> how the linears are held
ROWS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": _spec("int8"),
    "llm-int8": _spec("llm-int8"),
    "nf4": _spec("nf4"),
    "nf4+dq": _spec("nf4", double=True),
    "fp4": _spec("fp4"),
    "int4": _spec("int4"),
    **{f"gptq-{bits}": _gptq(bits, equal_tokens=True) for bits in (4, 3)},
    **{f"gptq-{bits}-paper": _gptq(bits, equal_tokens=False) for bits in (4, 3)},
    **{f"nearest-{bits}": {"nearest": {"bits": bits, "group_size": 64}} for bits in (4, 3)},
    "nf3": _spec("nf3"),
    "nf2": _spec("nf2"),
}
# An independent computation of the same: 4 x 2,048 tokens, linears only, no BOS.
PUBLISHED = {"fp32": 19.86, "nf4": 23.44, "fp4": 26.88, "int4": 28.08}
SPEED = ("nf4+dq", "int8")
TEXT, CALIBRATION = Path("text", "wikitext2_valid.txt"), Path("text", "c4_300.jsonl")


@dataclass(frozen=True)
class Options:
    """What a page was asked for."""

    rows: tuple[str, ...]
    parts: tuple[str, ...]
    model: str
    windows: int
    calibration_windows: int
    length: int
    dtype: str
    repeats: int
    threads: int

    def key(self, part: str, name: str) -> dict[str, Any]:
        """The specification of one process, by which its results are found again."""
        own = {"part": part, "row": name, "held": ROWS[name], "model": self.model}
        if part == "speed":
            how = {"threads": self.threads, "dtype": self.dtype, "repeats": self.repeats}
            return {**own, "length": self.length, **how}
        return {**own, "length": self.length, "windows": self.windows, "calibration_windows": self.calibration_windows}


def jobs(options: Options) -> list[tuple[str, str]]:
    """(part, row) of each process."""
    found = [("perplexity", name) for name in options.rows] if "perplexity" in options.parts else []
    return found + ([("speed", name) for name in SPEED if name in options.rows] if "speed" in options.parts else [])


def measure(options: Options, ledger: Ledger, data: Path, work: Path, out: Path) -> int:
    """Run what is not in the ledger yet; returns how many processes failed."""
    failed = 0
    for part, name in jobs(options):
        key = options.key(part, name)
        if ledger.find(key) is None:
            files = {"text": str(data / TEXT), "calibration": str(_calibration(data, work))}
            spec = write_spec(work / "quant-row.json", {**key, "threads": options.threads, **files})
            done = run([sys.executable, "-m", "bench.children.quant_row", str(spec)], env=threads(options.threads))
            told = done.told("quant")
            record: Record = told[0] if told else {"error": done.error or "told nothing"}
            ledger.add(key, {k: v for k, v in record.items() if k not in ("event", "t")})
            failed += "error" in record
            shown = record.get("error") or ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))
            say(f"{part}, {name}: {shown}")
        found = results(options, ledger)
        write_page(out / "quant", found, page(found, kept(out / "quant.md")))
    return failed


def _calibration(data: Path, work: Path) -> Path:
    """The texts of the calibration file, end to end, as one text file."""
    file = work / "calibration.txt"
    if not file.is_file() and (data / CALIBRATION).is_file():
        lines = (data / CALIBRATION).read_text(encoding="utf-8").splitlines()
        atomic_write_text(file, " ".join(json.loads(line)["text"] for line in lines))
    return file


def results(options: Options, ledger: Ledger) -> dict[str, Any]:
    """What quant.json holds: the options, and each part's rows that are there."""
    found: dict[str, Any] = {"format": 1, "options": asdict(options), "about": None, "perplexity": {}, "speed": {}}
    commits: dict[str, None] = {}  # rows that were there already may be of another one
    for part, name in jobs(options):
        record = ledger.find(options.key(part, name))
        if record is not None:
            commits[record["about"]["versions"]["commit"]] = None
            versions = {**record["about"]["versions"], "commit": " and ".join(commits)}
            found["about"] = {**record["about"], "versions": versions}
            found[part][name] = {key: value for key, value in record.items() if key != "about"}
    return found


def page(found: Mapping[str, Any], words: str) -> str:
    """quant.md; `words` are a person's own, which are kept."""
    asked = found["options"]
    if found["about"] is None:
        return NOTHING
    lines = [
        *("# Quantized bases", "", "```sh", command(asked), "```", ""),
        f"{asked['model']}, the linears of its blocks quantized, everything else in float32; blocks of 64. Perplexity:",
        f"the first {asked['windows']} windows of {asked['length']:,} tokens of the WikiText-2 file, no BOS. GPTQ is",
        f"calibrated on {asked['calibration_windows']} windows of C4, each token alike; in the rows `paper` as",
        "in the paper. `nearest` rounds each weight to GPTQ's grid by itself. Bits: measured on the tensors that are",
        "resident.",
        "",
        grid(("", "bits a weight", "perplexity", "expected"), [_row(n, r) for n, r in found["perplexity"].items()]),
        "",
    ]
    if found["speed"]:
        head = ("", "step, dense, s", "step, quantized, s", "ratio", "read, GB/s", "copy, GB/s")
        rows = [
            (
                f"`{name}`", f"{r['step_s']['dense']:.2f}", f"{r['step_s']['quantized']:.2f}", f"{r['ratio']:.2f}",
                f"{r['read_gbps']:.1f}", f"{r['copy_gbps']:.1f}",
            )
            for name, r in found["speed"].items()
        ]  # fmt: skip
        said = f"One row of {asked['length']:,} tokens, LoRA of rank 8, {asked['dtype']}, {asked['threads']} threads."
        lines += ["## What it costs", "", f"{said} GB/s of dense numbers written.", "", grid(head, rows), ""]
    return "\n".join([*lines, *discussion(words), "## Machine", "", machine(found["about"]), ""])


def _row(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    expected = PUBLISHED.get(name)
    shown = f"{record['perplexity']:.2f}" if record["perplexity"] < 1e5 else f"{record['perplexity']:.0e}"
    return f"`{name}`", f"{record['bits']:.3f}", shown, f"{expected}" if expected else ""


def command(asked: Mapping[str, Any]) -> str:
    """The command that makes the page again."""
    words = [f"--windows {asked['windows']} --length {asked['length']} --calibration-windows"]
    words += [f"{asked['calibration_windows']} --dtype {asked['dtype']} --threads {asked['threads']}"]
    words += [f"--repeats {asked['repeats']}"]
    if tuple(asked["rows"]) != tuple(ROWS):
        words.append(f"--rows {','.join(asked['rows'])}")
    return f"python -m bench.quant --data-dir FOLDER {' '.join(words)}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 0 done, 1 a process failed, 2 a wrong word."""
    given = _parser().parse_args(words)
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown or set(given.parts) - {"perplexity", "speed"}:
        say(f"quant: rows are {', '.join(ROWS)}, parts perplexity and speed; got {unknown or given.parts}")
        return 2
    if not (given.data_dir / TEXT).is_file():
        say(f"quant: {given.data_dir / TEXT} is not there; say with --data-dir where it is")
        return 2
    options = Options(
        tuple(given.rows), tuple(given.parts), given.model, given.windows, given.calibration_windows, given.length,
        given.dtype, given.repeats, given.threads,
    )  # fmt: skip
    ledger = Ledger(given.work / "quant.jsonl", fresh=given.fresh)
    try:
        failed = measure(options, ledger, given.data_dir, given.work, given.out)
    except KeyboardInterrupt:
        say("quant: stopped; the same command goes on")
        return 130
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quant", description=(__doc__ or "").splitlines()[0])
    names = lambda word: [name for name in word.split(",") if name]  # noqa: E731
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds text/wikitext2_valid.txt")
    parser.add_argument("--rows", type=names, default=list(ROWS))
    parser.add_argument("--parts", type=names, default=["perplexity", "speed"])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--windows", type=up_to(1000), default=4)
    parser.add_argument("--calibration-windows", type=up_to(1000), default=16)
    parser.add_argument("--length", type=up_to(1 << 20), default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the speed part")
    parser.add_argument("--repeats", type=up_to(100), default=5)
    return run_options(parser)


if __name__ == "__main__":
    sys.exit(main())
