"""Carry out jobs: prepare, tune the peers, then ours and each peer by turns, round after round.

    round r      [ours, fastest peer, ours-lean] [ours, next peer] [ours, next peer] ...      one child at a time

Every run is a fresh process with seed r. Results are written after each run, so that nothing measured is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.envs import BENCH, EnvError, Envs
from bench.jobs import MODES, SHAPES, Job, Mode, run_settings
from bench.process import Finished, TrainFolder, run
from bench.results import Record, against, check_work, decoding_record, summarise, training_record, usable

WORK = BENCH / ".work"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


@dataclass(frozen=True)
class Options:
    """What a bench command was asked for."""

    out: Path
    model: str
    rounds: int = 3
    rows: int | None = None
    peers: tuple[str, ...] = ()  # sides or modes; none is all
    data_dir: str | None = None
    device: str = "cpu"
    shape: str | None = None
    tune_rows: int = 96
    held: int = 100
    repeats: int = 2
    new_tokens: int = 128
    ceiling_seconds: float = 1.0
    limit: float = 3600.0
    work: Path = WORK
    envs: Envs = field(default_factory=Envs)


class BenchError(Exception):
    """A job cannot be prepared; the text says why and what to do."""


class Runner:
    """Runs the jobs of one command and keeps its results file up to date."""

    def __init__(self, options: Options) -> None:
        self.options, self.envs = options, options.envs
        self.results: dict[str, Any] = read_results(options.out)
        self._machine: Record | None = None

    def run(self, jobs: Sequence[Job]) -> int:
        """Carry out `jobs`; returns how many could not be prepared. What a peer cannot do is in the results.

        Raises EnvError where this checkout cannot be installed.
        """
        failed = 0
        self.envs.refresh_ours()  # once: what is edited meanwhile is not measured
        for job in jobs:
            about = job.about
            if job.kind == "decode":
                about += f", {self.options.new_tokens} new tokens"
            entry: Record = {"about": about, "date": time.strftime("%Y-%m-%d"), "rows": job.rows}
            self.results["jobs"][job.name] = entry
            try:
                self._job(job, entry)
            except (BenchError, EnvError) as error:
                entry["error"] = str(error)
                failed += 1
                say(f"{job.name}: {error}")
            self.save()
        return failed

    def save(self) -> None:
        """Write what is known so far."""
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.options.out.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.options.out)

    def _job(self, job: Job, entry: Record) -> None:
        facts = self._prepare(job)
        entry["facts"] = {
            key: value for key, value in facts.items() if key not in ("prompts", "model_path", "event", "t")
        }
        entry["machine"] = self.machine(job)
        entry["runs"] = []
        modes, entry["absent"] = self._present(job)
        ours = next(mode for mode in modes if mode.ours)
        peers, entry["tuned"] = self._tune(job, facts, [m for m in modes if not m.ours])
        entry["absent"] |= {record["mode"]: record["error"] for record in entry["tuned"] if record["error"]}
        lean = [mode for mode in modes if mode.ours and mode is not ours]
        out_of_it: set[str] = set()
        for number in range(self.options.rounds):
            # alone, ours is its own only group
            groups = [[ours, peer] for peer in peers] or [[ours]]
            groups[0] += lean
            for place, group in enumerate(groups):
                if len(group) == 2 and group[1].name in out_of_it:
                    continue
                for mode in group:
                    if mode.name in out_of_it:
                        continue
                    record = self.measure(job, mode, facts, seed=number, pair=f"{number}.{place}")
                    entry["runs"].append(record)
                    if not usable(record) and not mode.ours:
                        out_of_it.add(mode.name)
                    self._sum_up(entry, ours, lean)
        self._held_out(job, facts, entry)
        self._sum_up(entry, ours, lean)

    def _sum_up(self, entry: Record, ours: Mode, lean: Sequence[Mode]) -> None:
        """The medians and ratios of the runs so far, written: a run that is stopped leaves them."""
        entry["summary"] = summarise(entry["runs"], ours.name)
        entry["lean"] = {mode.name: against(entry["runs"], mode.name) for mode in lean}
        self.save()

    def _prepare(self, job: Job) -> Record:
        """The job's files and what is known of them. Raises BenchError."""
        options, folder = self.options, self._folder(job)
        if job.source == "alpaca" and not (options.data_dir and (Path(options.data_dir) / "alpaca").is_dir()):
            raise BenchError(
                "needs a folder of experiment data that holds alpaca/train.jsonl.gz and alpaca/dev.jsonl; name it with "
                "--data-dir or TUNESMITH_BENCH_DATA"
            )
        shape = {"config": dict(SHAPES[options.shape].config)} if options.shape else {}
        wanted = {
            "folder": str(folder), "source": job.source, "kind": job.kind, "rows": job.rows, "cutoff": job.cutoff,
            "held": options.held, "model": options.model, "data_dir": options.data_dir,
            "dtypes": ["bfloat16", "float32"], "settings": run_settings(job), **shape,
        }  # fmt: skip
        done = self._child("ours", "prepare", wanted, folder)
        told = done.told("prepared")
        if done.error or not told:
            raise BenchError(f"could not be prepared: {done.error}")
        return told[0]

    def machine(self, job: Job) -> Record:
        """The machine's facts and ceilings, measured once a command; and the versions of every environment."""
        if self._machine is None:
            folder, options = self._folder(job), self.options
            if options.shape:
                config = dict(SHAPES[options.shape].config)
            else:
                config = json.loads((folder.parent / "model-float32" / "config.json").read_text(encoding="utf-8"))
            dtypes = ["bfloat16"] if options.shape else ["bfloat16", "float32"]
            wanted = {"config": config, "device": options.device, "dtypes": dtypes, "seconds": options.ceiling_seconds}
            told = self._child("ours", "machine", wanted, folder).told("machine")
            versions = {}
            for name in ("ours", "hf", "trl", "litgpt", "llamacpp"):
                try:
                    versions[name] = self.envs.versions(name)
                    if name == "ours":
                        versions[name]["source"] = self.envs.source()
                except EnvError as error:
                    versions[name] = {"error": str(error)}
            facts = {key: value for key, value in (told[0] if told else {}).items() if key not in ("event", "t")}
            self._machine = {**facts, "versions": versions}
        return self._machine

    def _present(self, job: Job) -> tuple[list[Mode], dict[str, str]]:
        """The job's modes that were asked for and whose environment is there; and why others are absent."""
        modes, absent = [], {}
        for mode in (MODES[name] for name in job.modes):
            if not mode.ours and self.options.peers and not {mode.name, mode.side} & set(self.options.peers):
                continue
            try:
                self.envs.python(mode.side)
                modes.append(mode)
            except EnvError as error:
                if mode.ours:
                    raise
                absent[mode.name] = str(error)
        return modes, absent

    def _tune(self, job: Job, facts: Record, peers: list[Mode]) -> tuple[list[Mode], list[Record]]:
        """Of each side's modes the fastest on a few rows, and those that always run; the fastest of all first."""
        few = self.options.tune_rows
        if job.kind != "train" or not few or few >= facts["rows"] or len(peers) < 2:
            return peers, []
        tried = [self.measure(job, mode, facts, seed=0, pair="tune", rows=few) for mode in peers]
        speed = {record["mode"]: record.get("tokens_per_s") or 0.0 for record in tried if usable(record)}
        kept: list[Mode] = []
        for mode in sorted((mode for mode in peers if mode.name in speed), key=lambda mode: -speed[mode.name]):
            first = not any(other.side == mode.side for other in kept)
            if first or mode.always:
                kept.append(mode)
        return kept, tried

    def measure(self, job: Job, mode: Mode, facts: Record, *, seed: int, pair: str, rows: int | None = None) -> Record:
        """One run of a mode, as a record; `rows` takes only the first ones, for a trial."""
        folder = self._folder(job) / "runs" / f"{mode.name}-{'tune' if rows else seed}-{pair}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if job.kind == "decode":
            record = decoding_record(self._decode(job, mode, facts, folder))
        else:
            number, train = facts["rows"], self._folder(job) / "train.jsonl"
            if rows is not None and rows < number:
                number, train = rows, _first(train, rows)
            done = self._train(job, mode, facts, folder, train, seed)
            record = training_record(done, number)
            if number == facts["rows"]:
                record["unlike"] = check_work(record, facts, _data_hash(folder / "run" / "adapter"))
        record |= {"mode": mode.name, "ours": mode.ours, "pair": pair, "seed": seed}
        speed = record.get("tokens_per_s") or record.get("tokens_per_s_1")
        told = record["error"] or record.get("unlike") or f"{record['wall_s']:.1f} s, {speed or 0:.0f} tokens/s"
        say(f"{job.name} {pair} {mode.name}: {told}, {record['peak_bytes'] / 2**30:.2f} GiB")
        return record

    def _train(self, job: Job, mode: Mode, facts: Record, folder: Path, train: Path, seed: int) -> Finished:
        if mode.child is None:
            settings = {**run_settings(job), **mode.settings, "train.seed": seed}
            words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            command = [
                *(self.envs.python("ours"), "-m", "tunesmith", "train"),
                *("--model", self.options.model, "--data", str(self._folder(job) / "rows.jsonl")),
                *("--output-dir", str(folder), "--name", "run", *words),
            ]
            return run(command, env=QUIET, limit=self.options.limit, watch=TrainFolder(folder / "run").look)
        shape = {"config": dict(SHAPES[self.options.shape].config)} if self.options.shape else {}
        model = self._folder(job) if self.options.shape else self._folder(job).parent / f"model-{job.dtype}"
        wanted = {
            "model": str(model), "train": str(train), "out": str(folder / "run" / "adapter"), "dtype": job.dtype,
            "seed": seed, "rank": job.rank, "alpha": job.alpha, "targets": job.targets, "cutoff": job.cutoff,
            "batch_size": job.batch_size, "learning_rate": job.learning_rate, "device": self.options.device,
            **shape, **mode.settings,
        }  # fmt: skip
        if "micro_batch" in wanted:
            wanted["micro_batch"] = min(wanted["micro_batch"], job.batch_size)
        return self._child(mode.side, mode.child, wanted, folder)

    def _decode(self, job: Job, mode: Mode, facts: Record, folder: Path) -> Finished:
        dtype = mode.settings.get("dtype", job.dtype)
        wanted = {
            "model": str(self._folder(job).parent / f"model-{dtype}"), "model_path": facts["model_path"],
            "prompts": facts["prompts"], "batches": [1, 8], "new_tokens": self.options.new_tokens,
            "repeats": self.options.repeats, "context": 512, **mode.settings,
        }  # fmt: skip
        return self._child(mode.side, mode.child or "", wanted, folder)

    def _held_out(self, job: Job, facts: Record, entry: Record) -> None:
        """Give each good run its held-out loss, and the entry that of the bare base."""
        if job.kind != "train" or job.source == "random":
            return
        folder = self._folder(job)
        runs = [record for record in entry["runs"] if record.get("error") is None]
        places = [str(folder / "runs" / f"{r['mode']}-{r['seed']}-{r['pair']}" / "run" / "adapter") for r in runs]
        wanted = {"held": str(folder / "held.jsonl"), "model_path": facts["model_path"], "adapters": [None, *places]}
        done = self._child("ours", "held_out", wanted, folder)
        losses = {event["folder"]: event for event in done.told("held_out")}
        entry["held_out_base"] = losses.get(None, {}).get("loss")
        for record, place in zip(runs, places, strict=True):
            record["held_out"] = losses.get(place, {}).get("loss")
            if record["held_out"] is None:
                record["held_out_error"] = losses.get(place, {}).get("error") or done.error

    def _child(self, side: str, child: str, wanted: Mapping[str, Any], folder: Path) -> Finished:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{child}.json"
        file.write_text(json.dumps(wanted), encoding="utf-8")
        command = [self.envs.python(side), "-m", f"bench.children.{child}", str(file)]
        return run(command, env=QUIET, limit=self.options.limit)

    def _folder(self, job: Job) -> Path:
        return (self.options.work / job.name).resolve()


def read_results(path: Path) -> dict[str, Any]:
    """The results of a file, to which a command adds; empty ones where there is no file."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"format": 1, "jobs": {}}


def say(line: str) -> None:
    """Tell the user what is going on, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _first(train: Path, rows: int) -> Path:
    part = train.with_name(f"train-{rows}.jsonl")
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join(lines[:rows]), encoding="utf-8")
    return part


def _data_hash(adapter: Path) -> str | None:
    """The hash of the data that Tunesmith says this adapter was trained on; None for a peer's adapter."""
    file = adapter / "tunesmith.json"
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["notes"].get("data_sha256"))


def data_dir() -> str | None:
    """The folder of experiment data that the environment names."""
    return os.environ.get("TUNESMITH_BENCH_DATA")
