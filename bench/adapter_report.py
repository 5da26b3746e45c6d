"""LLaMA-Adapter v1 and v2 with full and with sparse attention: held-out loss on the same reviews.

python -m bench.adapter_report                           about a quarter of an hour on two cores
python -m bench.adapter_report --reviews 32 --held 16    a trial

Every case trains on the same reviews in the same order, once, from the same seed, at its method's default rate; it is
measured on the same validation reviews, with the attention that its pattern evaluates with (s2: full). The untuned base
is measured under each pattern too. The results are written to adapter_report.json and adapter_report.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pages import DATA, MODEL, discussion, kept, machine, threads, up_to, write_page, write_spec
from bench.process import run
from bench.runner import WORK, say
from bench.table import NOTHING, RESULTS, grid
from tunesmith.adapters import find_method

SEED, BATCH = 0, 16
BASE = "untuned base"
ADAPTERS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "LLaMA-Adapter v1": {"kind": "llama_adapter"},
    "LLaMA-Adapter v2": {"kind": "llama_adapter_v2"},
}
# Short, since a review with its template has some 70 tokens.
ATTENTION: dict[str, dict[str, Any] | None] = {
    "full": None,
    "local": {"pattern": "local", "window": 16},
    "strided": {"pattern": "strided", "stride": 8, "window": 8},
    "fixed": {"pattern": "fixed", "block": 16, "columns": 2},
    "factorized": {"pattern": "factorized", "stride": 8},
    "s2": {"pattern": "s2", "group": 32},
}


def cases(rate: float | None) -> list[dict[str, Any]]:
    """Every adapter under every attention; `rate` replaces the methods' own."""
    return [
        {
            "name": name, "under": under, "adapter": adapter, "attention": attention,
            "rate": None if adapter is None else rate or find_method(adapter["kind"]).learning_rate,
        }
        for name, adapter in ADAPTERS.items()
        for under, attention in ATTENTION.items()
    ]  # fmt: skip


def page(found: Mapping[str, Any], words: str) -> str:
    """adapter_report.md; `words` are a person's own, which are kept."""
    asked, done = found["options"], found["cases"]
    if not done:
        return NOTHING
    lines = [
        *("# LLaMA-Adapter with full and sparse attention", "", "```sh", found["command"], "```", ""),
        f"`{asked['model']}` in float32 on `{asked['data']}`: each case trains once on the first {asked['reviews']}",
        f"training reviews (of up to {found['longest']} tokens), batch {BATCH}, seed {SEED}. Held-out loss is of the",
        f"first {asked['held']} validation reviews; s2 acts in training only and is measured with full attention.",
        "",
        grid(("attention", "pairs seen", *(f"{name}, loss" for name in ADAPTERS)), _losses(done)),
        "",
        "CPU seconds of each case, training and measuring:",
        "",
        grid(("attention", *ADAPTERS), _seconds(done)),
        "",
        *discussion(words),
        "## Settings",
        "",
        grid(("", ""), [(f"`{name}`", f"`{_flow(a)}`") for name, a in ATTENTION.items()]),
        "",
        *[f"- {name}: `{_flow(adapter)}`, rate {rate:g}" for name, adapter, rate in _trained(done)],
        "",
        "## Machine",
        "",
        machine(found["about"]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _losses(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    by = {(case["name"], case["under"]): case for case in done}
    rows = []
    for under in ATTENTION:
        share = next((case["pairs"] for case in done if case["under"] == under), None)
        losses = [_loss(by.get((name, under))) for name in ADAPTERS]
        rows.append((f"`{under}`", "" if share is None else f"{share:.0%}", *losses))
    return rows


def _loss(case: Mapping[str, Any] | None) -> str:
    if case is None:
        return ""
    return f"{case['loss']:.4f}" if "loss" in case else f"{NOTHING}: {case.get('diverged') or case.get('error')}"


def _seconds(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    by = {(case["name"], case["under"]): f"{case['cpu_s']:.0f}" for case in done}
    return [(f"`{under}`", *(by.get((name, under), "") for name in ADAPTERS)) for under in ATTENTION]


def _trained(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], float]]:
    """Name, settings and rate of what was trained."""
    return [(case["name"], case["adapter"], case["rate"]) for case in done if case["under"] == "full" and case["rate"]]


def _flow(values: Mapping[str, Any] | None) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in (values or {"pattern": "full"}).items()) + "}"


def main(words: Sequence[str] | None = None) -> int:
    """Train, measure, write the page; returns 1 where a case failed."""
    given = _parser().parse_args(words)
    asked = {
        "model": given.model, "data": given.data, "reviews": given.reviews, "held": given.held, "split": "valid",
        "batch": BATCH, "seed": SEED, "threads": given.threads,
    }  # fmt: skip
    spec = write_spec(given.work / "adapter-report.json", {**asked, "cases": cases(given.rate)})
    say(f"adapter_report: {len(cases(given.rate))} cases")
    done = run(
        [sys.executable, "-m", "bench.children.adapter_report", str(spec)], env=threads(given.threads), limit=14400.0
    )
    told = [{k: v for k, v in case.items() if k not in ("event", "t")} for case in done.told("case")]
    if not told:
        say(f"adapter_report: {done.error}")
        return 1
    about = done.told("about")[0]
    rate = f" --rate {given.rate:g}" if given.rate else ""
    found = {
        "format": 1,
        "command": f"python -m bench.adapter_report --reviews {given.reviews} --held {given.held}{rate}",
        "options": asked, "about": about["about"], "longest": about["longest"], "cases": told,
    }  # fmt: skip
    write_page(given.out / "adapter_report", found, page(found, kept(given.out / "adapter_report.md")))
    print((given.out / "adapter_report.md").read_text(encoding="utf-8"))
    return 0 if done.error is None and all("loss" in case for case in told) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.adapter_report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reviews", type=up_to(10**6), default=400, help="training reviews")
    parser.add_argument("--held", type=up_to(10**6), default=300, help="validation reviews")
    parser.add_argument("--rate", type=float, help="a learning rate for all, instead of the methods' own")
    parser.add_argument("--threads", type=up_to(1024), default=2)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for adapter_report.json and .md")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what is made on the way")
    return parser


if __name__ == "__main__":
    sys.exit(main())
