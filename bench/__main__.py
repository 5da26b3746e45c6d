"""The bench's commands.

python -m bench setup [NAME ...]                     one environment for each side, in bench/.envs
python -m bench run --data-dir FOLDER --write-docs   every job, results in docs/results, tables in docs/benchmarks.md
python -m bench run --jobs decode --rounds 1 --peers hf --out /tmp/r.json
python -m bench run --device cuda --shape 8b         random weights of that shape, on a GPU
python -m bench profile                              where the step's time goes
python -m bench table                                write the tables again from the results that are there
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import table
from bench.envs import NAMES, EnvError, Envs, setup
from bench.jobs import JOBS, MODEL, MODES, SHAPES, Job, in_float32, shape_job, small
from bench.runner import WORK, Options, Runner, data_dir, read_results, say


def main(words: list[str] | None = None) -> int:
    """Carry out a command; returns its exit code: 0 done, 1 something could not be made or prepared, 2 a wrong word."""
    given = _parser().parse_args(words)
    commands = {"setup": _setup, "run": _run, "profile": _profile, "table": _table}
    return commands[given.command](given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("setup", help="make the environments")
    make.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none is all")
    run = commands.add_parser("run", help="run jobs, ours and peers by turns")
    run.add_argument("--jobs", default=",".join(JOBS), help=f"of {','.join(JOBS)}")
    run.add_argument("--float32", action="store_true", help="in fp32, for a processor that only emulates bf16")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--rows", type=int, help="fewer rows than a job has, for a trial")
    run.add_argument(
        "--peers", default="", help=f"sides or modes (ours: no peer), of {','.join(NAMES[1:])} or {','.join(MODES)}"
    )
    run.add_argument(
        "--tune-rows", type=int, default=96, help="rows on which a peer's modes are tried first; 0: none are"
    )
    run.add_argument("--held-out", type=int, default=100, help="rows for the held-out loss")
    run.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer, for a decoding job")
    run.add_argument("--limit", type=float, default=3600.0, help="seconds that one run may take")
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    run.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape instead of the jobs' model")
    run.add_argument("--dry-run", action="store_true", help="print what would be run")
    profile = commands.add_parser("profile", help="where the time of our step goes")
    profile.add_argument("--job", default="alpaca", choices=[name for name, job in JOBS.items() if job.kind == "train"])
    profile.add_argument("--rows", type=int, default=96)
    for command in (run, profile):
        command.add_argument("--model", default=MODEL, help="catalog name, folder or .gguf file")
        command.add_argument(
            "--data-dir", default=data_dir(), help="experiment data with alpaca/ (TUNESMITH_BENCH_DATA)"
        )
        command.add_argument(
            "--ceiling-seconds", type=float, default=1.0, help="spent on each ceiling that is measured"
        )
        command.add_argument("--work", type=Path, default=WORK, help="folder for what is made on the way")
        command.add_argument("--out", type=Path, help="results file; default in docs/results")
        command.add_argument("--write-docs", action="store_true", help="write the table into docs/benchmarks.md")
        command.add_argument(
            "--python", action="append", default=[], metavar="SIDE=PATH", help="an interpreter to use for a side"
        )
    commands.add_parser("table", help="write the tables again")
    return parser


def _setup(given: argparse.Namespace) -> int:
    unknown = set(given.names) - set(NAMES)
    if unknown:
        say(f"setup: {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
        return 2
    return 1 if setup(given.names or NAMES) else 0


def _run(given: argparse.Namespace) -> int:
    names = [name for name in given.jobs.split(",") if name]
    peers = tuple(name for name in given.peers.split(",") if name)
    unknown = [name for name in names if name not in JOBS] + [n for n in peers if n not in (*NAMES, *MODES)]
    if unknown:
        say(f"run: {', '.join(unknown)}: jobs are {', '.join(JOBS)}; peers {', '.join(NAMES[1:])}")
        return 2
    if given.device == "cuda" and not given.shape:
        say("run: --device cuda needs --shape: the jobs of a CPU are too small for a GPU")
        return 2
    if given.float32 and given.shape:
        say("run: --float32 goes with the jobs, not with --shape, whose weights are in bf16")
        return 2
    jobs = [shape_job(given.shape)] if given.shape else [JOBS[name] for name in names]
    if given.float32:
        jobs = list({job.name: job for job in map(in_float32, jobs)}.values())
    jobs = [small(job, given.rows) for job in jobs]
    if given.dry_run:
        print("\n".join(line for job in jobs for line in plan(job, given.rounds, peers, given.tune_rows)))
        return 0
    name = "cuda" if given.device == "cuda" else "cpu"
    out = given.out or table.RESULTS / f"{name}.json"
    options = Options(
        out=out, model=given.model, rounds=given.rounds, peers=peers, data_dir=given.data_dir, device=given.device,
        shape=given.shape, tune_rows=given.tune_rows, held=given.held_out, new_tokens=given.new_tokens,
        limit=given.limit, ceiling_seconds=given.ceiling_seconds, work=given.work,
        envs=_envs(given),
    )  # fmt: skip
    runner = Runner(options)
    try:
        failed = runner.run(jobs)
    except EnvError as error:
        say(f"run: ours: {error}")
        return 1
    text = table.page(runner.results)
    if given.write_docs:
        table.write(name, text)
    print(text)
    return 1 if failed else 0


def _profile(given: argparse.Namespace) -> int:
    out = given.out or table.RESULTS / "profile.json"
    options = Options(
        out=out, model=given.model, data_dir=given.data_dir, ceiling_seconds=given.ceiling_seconds, work=given.work,
        envs=_envs(given),
    )  # fmt: skip
    from bench.profiling import profile

    try:
        found = profile(options, small(JOBS[given.job], given.rows))
    except EnvError as error:
        say(f"profile: {error}")
        return 1
    if found is None:
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = table.profile(found)
    if given.write_docs:
        table.write("profile", text)
    print(text)
    return 0


def _table(given: argparse.Namespace) -> int:
    for name in ("cpu", "cuda"):
        table.write(name, table.page(read_results(table.RESULTS / f"{name}.json")))
    file = table.RESULTS / "profile.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    table.write("profile", table.profile(found))
    return 0


def plan(job: Job, rounds: int, peers: tuple[str, ...], tune_rows: int) -> list[str]:
    """What a run of `job` would do, in lines."""
    chosen = [MODES[name] for name in job.modes]
    chosen = [mode for mode in chosen if mode.ours or not peers or {mode.name, mode.side} & set(peers)]
    others = [mode.name for mode in chosen if not mode.ours]
    tuned = (
        f", each tried on {tune_rows} rows, the fastest of a side goes on" if tune_rows and job.kind == "train" else ""
    )
    return [
        f"{job.name}: {job.about}; {job.rows} rows, {rounds} rounds by turns",
        f"  ours: {', '.join(mode.name for mode in chosen if mode.ours)}",
        f"  peers: {', '.join(others) or 'none'}{tuned}",
    ]


def _envs(given: argparse.Namespace) -> Envs:
    return Envs(dict(word.split("=", 1) for word in given.python))


if __name__ == "__main__":
    sys.exit(main())
