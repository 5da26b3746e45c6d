"""Results as Markdown, written into docs/benchmarks.md between markers; "not measured" where nothing was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.envs import ROOT

DOCS = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "docs" / "results"
NOTHING = "not measured"
GIB = 2**30


def write(name: str, text: str, docs: Path = DOCS) -> None:
    """Put `text` between the markers of section `name` in the page. Raises ValueError where they are missing."""
    begin, end = f"<!-- bench:{name} begin -->", f"<!-- bench:{name} end -->"
    page = docs.read_text(encoding="utf-8")
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{docs}: has no section between {begin} and {end}; put both lines where the table should be")
    docs.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")


def page(results: Mapping[str, Any] | None) -> str:
    """All that a results file holds, as Markdown: above jobs of one command, the machine as it was then."""
    if not results or not results.get("jobs"):
        return NOTHING
    jobs: Mapping[str, Any] = results["jobs"]
    parts: list[str] = []
    shown = None
    for name, entry in jobs.items():
        facts = entry.get("machine")
        if not parts or facts and facts != shown:
            parts.append(machine(facts))
            shown = facts
        parts.append(job(name, entry))
    return "\n\n".join(parts)


def machine(facts: Mapping[str, Any] | None) -> str:
    """The machine, its ceilings, and every side's versions."""
    if not facts:
        return f"Machine: {NOTHING}"
    rows = [
        ("processor", f"{facts.get('cpu')}, {facts.get('cores')} cores, {facts.get('threads')} threads used"),
        ("memory", f"{facts.get('memory_bytes', 0) / GIB:.1f} GiB, copy {facts.get('copy_gb_s', 0):.0f} GB/s"),
        ("system", f"{facts.get('system')}, torch {facts.get('torch')} ({facts.get('capability')})"),
    ]
    if "gpu" in facts:
        rows.append(("GPU", facts["gpu"]))
    for dtype, products in facts.get("gflops", {}).items():
        shown = ", ".join(f"{name} {value:,.0f}" for name, value in products.items())
        rows.append((f"matrix products in {dtype}, GFLOP/s", shown))
    for side, versions in facts.get("versions", {}).items():
        rows.append((f"versions: {side}", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return grid(("machine", ""), rows)


def job(name: str, entry: Mapping[str, Any]) -> str:
    """One job: its table, and below it what could not be measured and why."""
    lines = [f"### {name}", "", f"{entry['about']}. {_facts(entry)}".strip(), ""]
    if "error" in entry:
        return "\n".join([*lines, f"{NOTHING}: {entry['error']}"])
    summary = entry.get("summary")
    if not summary:
        return "\n".join([*lines, f"{NOTHING}: the command was interrupted"])
    decoding = any("tokens_per_s_1" in found for found in summary.values())
    lines.append(_decoding(summary) if decoding else _training(entry, summary))
    for lean, peers in entry.get("lean", {}).items():
        shown = [f"{peer} {_times(found.get('examples_per_s'))}" for peer, found in peers.items()]
        lines += ["", f"{lean} in the whole run, beside the peer of its pairs: {', '.join(shown) or NOTHING}."]
    if entry.get("held_out_base") is not None:
        lines += ["", f"Held-out loss of the base without an adapter: {entry['held_out_base']:.4f}."]
    problems = {**entry.get("absent", {}), **{m: f["error"] for m, f in summary.items() if "error" in f}}
    unheld = {f"{r['mode']}, held-out loss": r["held_out_error"] for r in entry["runs"] if r.get("held_out_error")}
    problems |= unheld
    lines += [f"\n{mode}: {NOTHING}: {_cell(error)}" for mode, error in problems.items()]
    tuned = [r for r in entry.get("tuned", ()) if r.get("tokens_per_s")]
    if tuned:
        tried = sorted(tuned, key=lambda record: -record["tokens_per_s"])
        shown = [f"{record['mode']} {record['tokens_per_s']:.0f}" for record in tried]
        lines += ["", f"Tried on a few rows, tokens/s: {', '.join(shown)}."]
    return "\n".join(lines)


def _facts(entry: Mapping[str, Any]) -> str:
    facts = entry.get("facts", {})
    if not facts.get("tokens") or facts.get("prompts_only"):
        return f"Measured on {entry['date']}." if facts else ""
    said = f"{facts['rows']} rows, {facts['tokens']:,} tokens, {facts['supervised']:,} of them targets"
    return said + f", longest row {facts['longest']}. Measured on {entry['date']}."


def _training(entry: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    rows = []
    for mode, found in _sorted(summary, "examples_per_s"):
        ratio = found.get("ratios", {})
        peak = found.get("device_peak_bytes") or found["peak_bytes"]
        losses = found.get("held_out")
        rows.append(
            (
                f"{mode} ({found['runs']})",
                _number(found.get("examples_per_s"), 2),
                _times(ratio.get("examples_per_s")),
                _number(found.get("tokens_per_s"), 0),
                _times(ratio.get("tokens_per_s")),
                f"{peak / GIB:.2f}",
                f"{_number(found.get('begin_s'), 1)} / {_number(found.get('first_step_s'), 1)}",
                f"{_number(found.get('saved_s'), 1)} / {_number(found.get('wall_s'), 1)}",
                _times(ratio.get("examples_per_s_to_saved")),
                _number(found.get("user_s", 0) + found.get("system_s", 0), 0),
                f"{sum(losses) / len(losses):.4f}" if losses else "",
            )
        )
    head = (
        "mode (runs)", "examples/s, whole run", "ours is faster", "tokens/s, steady", "ours is faster", "peak GiB",
        "first step begins / ends, s", "adapter saved / process ended, s", "ours is faster to saved", "CPU s",
        "held-out loss",
    )  # fmt: skip
    return grid(head, rows)


def _decoding(summary: Mapping[str, Any]) -> str:
    rows = []
    for mode, found in _sorted(summary, "tokens_per_s_1"):
        ratio = found.get("ratios", {})
        rows.append(
            (
                f"{mode} ({found['runs']})",
                _number(found.get("tokens_per_s_1"), 1),
                _times(ratio.get("tokens_per_s_1")),
                _number(found.get("tokens_per_s_8"), 1),
                _times(ratio.get("tokens_per_s_8")),
                f"{found['peak_bytes'] / GIB:.2f}",
                _number(found.get("begin_s"), 1),
                _number(found.get("alike"), 0),
            )
        )
    head = (
        "mode (runs)", "tokens/s, batch 1", "ours is faster", "batch 8", "ours is faster", "peak GiB", "loaded, s",
        "first tokens as ours, of 16",
    )  # fmt: skip
    return grid(head, rows)


def profile(results: Mapping[str, Any] | None) -> str:
    """Where the step's time goes, and how near the matrix products' ceiling it is."""
    if not results:
        return NOTHING
    total = sum(results["parts"].values())
    rows = [(part, f"{ms:,.0f}", f"{ms / total:.1%}") for part, ms in results["parts"].items()]
    said = (
        f"{results['about']}{_on(results)}: {results['tokens_per_s']:,.0f} tokens/s, {results['step_s']:.2f} s a step. "
        f"Its matrix products alone, at the speed measured for each shape, would take {results['ceiling_s']:.2f} s: "
        f"the step reaches **{results['share']:.0%}** of that ceiling. The parts are from a profiled, slower step."
    )
    return f"{said}\n\n{grid(('part', 'ms a step', 'share'), rows)}"


def _on(results: Mapping[str, Any]) -> str:
    facts = results.get("machine") or {}
    return f", on {facts['cpu']} with {facts['threads']} threads" if "cpu" in facts else ""


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _sorted(summary: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Modes that ran, ours (which have no ratio) first, then the fastest peer."""
    ran = [(mode, found) for mode, found in summary.items() if found["runs"]]
    return sorted(ran, key=lambda item: ("ours" not in item[0], -item[1].get(key, 0.0)))


def _times(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
