"""The planner's peak beside the measured one: methods x storages x recomputation x length, on SmolLM2-135M.

python -m bench.memory                    every case, three fresh processes each: about half an hour on two cores
python -m bench.memory --processes 1      a third of it
python -m bench.memory --fresh            forget what an earlier run has finished

A process loads the base in float32, takes two optimizer steps, saves a checkpoint, and tells the most memory that it
held, less what it held after its imports. Killed and started again, the command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.ledger import Ledger
from bench.pages import MODEL, discussion, kept, machine, run_options, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import say
from bench.table import NOTHING, grid

MB = 10**6
LORA = {"kind": "lora", "rank": 16, "target_modules": "all-linear"}
QV = {"kind": "lora", "rank": 8, "target_modules": ["q_proj", "v_proj"]}
# name of the method, adapter, storage of the base, recomputation, tokens a row; 2,048 tokens a step in all
CASES: tuple[tuple[str, dict[str, Any], str, bool | str, int], ...] = (
    ("lora r16", LORA, "none", False, 128),
    ("lora r16", LORA, "none", False, 1024),
    ("lora r16", LORA, "none", "selective", 256),
    ("lora r16", LORA, "none", True, 256),
    ("lora r16", LORA, "nf4", False, 256),
    ("lora r16", LORA, "nf4", True, 256),
    ("lora r16", LORA, "int8", "selective", 512),
    ("lora r8 qv", QV, "none", False, 512),
    ("lora r8 qv", QV, "nf4", True, 1024),
    ("full", {"kind": "full"}, "none", False, 256),
    ("full", {"kind": "full"}, "none", True, 256),
    ("llama_adapter_v2", {"kind": "llama_adapter_v2"}, "none", False, 256),
    ("prefix", {"kind": "prefix"}, "nf4", False, 128),
    ("bottleneck", {"kind": "bottleneck"}, "none", True, 512),
)
TOKENS = 2048


def specification(case: tuple[str, dict[str, Any], str, bool | str, int], given: argparse.Namespace) -> dict[str, Any]:
    """What a child is given."""
    _, adapter, quant, recompute, tokens = case
    return {
        "model": given.model, "adapter": adapter, "quant": quant, "recompute": recompute, "tokens": tokens,
        "rows": TOKENS // tokens, "threads": given.threads,
    }  # fmt: skip


def command(given: argparse.Namespace) -> str:
    """The command that makes the page again."""
    return f"python -m bench.memory --processes {given.processes} --threads {given.threads}"


def page(found: Mapping[str, Any], words: str) -> str:
    """memory.md; `words` are a person's own, which are kept."""
    lines = ["# The memory plan beside what was measured", "", "```sh", found["command"], "```", ""]
    rows, off = [], []
    for case in found["cases"]:
        if "error" in case:
            rows.append(
                (case["method"], case["quant"], _way(case), str(case["tokens"]), NOTHING, NOTHING, case["error"])
            )
            continue
        ratio = case["planned"] / case["measured"]
        off.append(abs(ratio - 1))
        sizes = (f"{case[key] / MB:,.0f}" for key in ("planned", "measured"))
        rows.append((case["method"], case["quant"], _way(case), str(case["tokens"]), *sizes, f"{ratio - 1:+.1%}"))
    if not rows:
        return NOTHING
    lines += [
        "MB (10^6 bytes) that a process holds at the most beyond what it held after its imports; the median of "
        f"{found['processes']} fresh processes. A step has {TOKENS} tokens.",
        "",
        grid(("method", "base", "recompute", "tokens a row", "planned", "measured", "plan is off by"), rows),
        "",
    ]
    if off:
        lines += [f"The plan is off by {max(off):.1%} at the most, by {median(off):.1%} in the median.", ""]
    return "\n".join([*lines, *discussion(words), machine(found["about"]), ""])


def _way(case: Mapping[str, Any]) -> str:
    return str(case["recompute"]).lower()


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; 1 where a case failed."""
    given = _parser().parse_args(words)
    ledger = Ledger(given.work / "memory.jsonl", fresh=given.fresh)
    found: dict[str, Any] = {
        "format": 1, "about": None, "command": command(given),
        "processes": given.processes, "cases": [],
    }  # fmt: skip
    for case in CASES[: given.cases]:
        wanted = specification(case, given)
        records = [_measured({**wanted, "process": number}, given, ledger) for number in range(given.processes)]
        good = [record for record in records if "measured" in record]
        about = {"method": case[0], "quant": case[2], "recompute": case[3], "tokens": case[4]}
        if good:
            found["about"] = good[0]["about"]
            figures = {key: median(record[key] for record in good) for key in ("planned", "measured")}
            found["cases"].append({**about, **figures, "parts": good[0]["parts"]})
        else:
            found["cases"].append({**about, "error": records[0]["error"]})
        say(f"{about}: {found['cases'][-1].get('planned')} {found['cases'][-1].get('measured')}")
        if found["about"]:
            write_page(given.out / "memory", found, page(found, kept(given.out / "memory.md")))
    print((given.out / "memory.md").read_text(encoding="utf-8"))
    return int(any("error" in case for case in found["cases"]))


def _measured(wanted: Mapping[str, Any], given: argparse.Namespace, ledger: Ledger) -> dict[str, Any]:
    """One process's figures, or its error."""
    known = ledger.find(wanted)
    if known is not None:
        return dict(known)
    file = write_spec(given.work / "memory-step.json", wanted)
    done = run(
        [sys.executable, "-m", "bench.children.memory_step", str(file)], env=threads(given.threads), limit=1800.0
    )
    told = done.told("memory")
    if done.error or not told:
        return {"error": done.error or "told nothing"}
    record = {k: v for k, v in told[0].items() if k not in ("event", "t")}
    ledger.add(wanted, record)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=up_to(100), default=3, help="fresh processes of each case")
    parser.add_argument("--cases", type=up_to(len(CASES)), default=len(CASES), help="only the first cases")
    parser.add_argument("--model", default=MODEL)
    return run_options(parser)


if __name__ == "__main__":
    sys.exit(main())
