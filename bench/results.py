"""From what runs told to figures: rates, medians, and ratios pair by pair.

A run is one child; a pair is two runs one after the other, ours and a peer's, so that both saw the same machine. The
ratio of a mode is the median of its pairs' ratios, with the least and the largest beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from bench.process import Finished

Record = dict[str, Any]
SKIPPED_STEPS = 2  # steps that do not count as steady, where there are more than twice as many


def training_record(done: Finished, rows: int) -> Record:
    """A training run's figures: seconds, bytes, examples/s of the whole run, tokens/s of the steady state."""
    record = _cost(done)
    steps = done.told("step")
    begin, saved = done.told("begin"), done.told("saved")
    if done.error is None and not (steps and saved):
        record["error"] = "ended without an error, but told of no step or saved no adapter"
    if record["error"] is not None:
        return record
    tokens = [step["tokens"] for step in steps]
    skip = SKIPPED_STEPS if len(steps) > 2 * SKIPPED_STEPS else min(1, len(steps) - 1)
    since = steps[skip - 1]["t"] if skip else (begin[0]["t"] if begin else 0.0)
    steady = sum(tokens[skip:]) / (steps[-1]["t"] - since)
    record |= {
        "begin_s": begin[0]["t"] if begin else None,
        "first_step_s": steps[0]["t"],
        "saved_s": saved[-1]["t"],
        "steps": [[round(step["t"], 3), step["tokens"]] for step in steps],
        "tokens": sum(tokens),
        "supervised": sum(step.get("supervised", 0) for step in steps) or None,
        "examples_per_s": rows / done.wall_s,
        "examples_per_s_to_saved": rows / saved[-1]["t"],
        "tokens_per_s": steady,
        "device_peak_bytes": saved[-1].get("device_peak") or None,
    }
    return record


def decoding_record(done: Finished) -> Record:
    """A decoding run's figures: tokens/s at each batch size (the median repetition), and its first tokens."""
    record = _cost(done)
    told = done.told("decoded")
    if record["error"] is None and not told:
        record["error"] = "ended without an error, but decoded nothing"
    for size in sorted({event["batch"] for event in told}):
        rates = [event["tokens"] / event["seconds"] for event in told if event["batch"] == size]
        record[f"tokens_per_s_{size}"] = median(rates)
    record["ids"] = next((event["ids"] for event in told if event["batch"] == 1), None)
    loaded = done.told("loaded")
    record["begin_s"] = loaded[0]["t"] if loaded else None
    return record


def check_work(record: Record, facts: Mapping[str, Any], data_sha256: str | None) -> str | None:
    """What is unlike in the work of a run, in one line; None if it trained on the job's very tokens."""
    if record.get("error") is not None:
        return None
    if record["tokens"] != facts["tokens"]:
        return f"trained on {record['tokens']:,} tokens where the job has {facts['tokens']:,}"
    if record["supervised"] is not None and record["supervised"] != facts["supervised"]:
        return f"had {record['supervised']:,} targets where the job has {facts['supervised']:,}"
    if data_sha256 is not None and data_sha256 != facts["data_sha256"]:
        return "encoded other ids than the job's"
    return None


RATES = ("examples_per_s", "tokens_per_s", "examples_per_s_to_saved", "tokens_per_s_1", "tokens_per_s_8")
SHOWN = (
    *RATES,
    "begin_s",
    "first_step_s",
    "saved_s",
    "wall_s",
    "user_s",
    "system_s",
    "peak_bytes",
    "device_peak_bytes",
)


def summarise(runs: Sequence[Record], ours: str) -> dict[str, Record]:
    """For each mode: medians over its good runs, held-out losses, and how many times faster `ours` was in its pairs."""
    summary: dict[str, Record] = {}
    for mode in dict.fromkeys(run["mode"] for run in runs):
        own = [run for run in runs if run["mode"] == mode]
        good = [run for run in own if usable(run)]
        entry: Record = {"runs": len(good)}
        problems = [run.get("error") or run.get("unlike") for run in own if not usable(run)]
        if problems:
            entry["error"] = problems[0]
        for key in SHOWN:
            values = [run[key] for run in good if run.get(key) is not None]
            if values:
                entry[key] = median(values)
        alike = [n for run in good if (n := leading(runs, ours, run)) is not None]
        if alike and mode != ours:
            entry["alike"] = median(alike)
        losses = [run["held_out"] for run in good if run.get("held_out") is not None]
        if losses:
            entry["held_out"] = losses
        if mode != ours:
            entry["ratios"] = {key: found for key in RATES if (found := ratios(runs, ours, mode, key)) is not None}
        summary[mode] = entry
    return summary


def against(runs: Sequence[Record], lean: str) -> dict[str, dict[str, list[float]]]:
    """How many times faster `lean` is than each peer of its pairs: {peer: {rate: [median, least, largest]}}."""
    peers = {run["mode"]: None for run in runs if not run["ours"]}
    found = {peer: {key: r for key in RATES if (r := ratios(runs, lean, peer, key)) is not None} for peer in peers}
    return {peer: entry for peer, entry in found.items() if entry}


def ratios(runs: Iterable[Record], ours: str, peer: str, key: str) -> list[float] | None:
    """[median, least, largest] of ours / peer over the pairs in which both have `key`."""
    pairs: dict[Any, dict[str, float]] = {}
    for run in runs:
        if usable(run) and run.get(key) is not None:
            pairs.setdefault(run["pair"], {})[run["mode"]] = run[key]
    found = [pair[ours] / pair[peer] for pair in pairs.values() if ours in pair and peer in pair]
    return [median(found), min(found), max(found)] if found else None


def leading(runs: Iterable[Record], ours: str, run: Record) -> int | None:
    """How many first tokens of a decoding run are those of ours in its pair; None where either did not tell."""
    own = next((r for r in runs if r["mode"] == ours and r["pair"] == run["pair"]), {})
    if not (own.get("ids") and run.get("ids")):
        return None
    same = [a == b for a, b in zip(own["ids"], run["ids"], strict=False)]
    return same.index(False) if False in same else len(same)


def usable(run: Record) -> bool:
    """Did the run succeed, and do the same work as all others?"""
    return run.get("error") is None and run.get("unlike") is None


def _cost(done: Finished) -> Record:
    return {
        "error": done.error, "wall_s": done.wall_s, "user_s": done.user_s, "system_s": done.system_s,
        "peak_bytes": done.peak_bytes,
    }  # fmt: skip
