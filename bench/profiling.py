"""`python -m bench profile`: prepare the job, measure the machine's ceilings, and profile our step in a child."""

from __future__ import annotations

from typing import Any

from bench.jobs import Job, run_settings
from bench.runner import BenchError, Options, Runner, say


def profile(options: Options, job: Job) -> dict[str, Any] | None:
    """The figures of one job's step (children/profile_ours.py), or None where it failed. Raises EnvError."""
    runner = Runner(options)
    options.envs.refresh_ours()
    try:
        runner._prepare(job)
    except BenchError as error:
        say(f"profile: {error}")
        return None
    facts, folder = runner.machine(job), runner._folder(job)
    wanted = {
        "model": options.model, "rows": str(folder / "rows.jsonl"), "settings": run_settings(job), "out": str(folder),
        "gflops": facts["gflops"][job.dtype], "steps": 3,
    }  # fmt: skip
    done = runner._child("ours", "profile_ours", wanted, folder)
    told = done.told("profile")
    if done.error or not told:
        say(f"profile: {done.error or 'told nothing'}")
        return None
    found = {key: value for key, value in told[0].items() if key not in ("event", "t")}
    return {"about": f"Job {job.name}, {job.rows} rows", **found, "machine": facts}
