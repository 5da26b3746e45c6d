"""One cell of a comparison, whole: its budget as steps, train_run, and what is measured of the adapter that it saved.

    python -m tunesmith.cells   reads a task as a line of JSON from standard input (compare/child.py) and carries it out

What a cell is measured on is read after its training is over and verified: base and adapter are loaded afresh.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tunesmith.adapters import find_method, open_method
from tunesmith.api import load
from tunesmith.compare.budget import used_by, within
from tunesmith.compare.measure import Subjects, measured
from tunesmith.compare.record import Failure, Result, write_failure, write_result
from tunesmith.config import Located, Run, load_run
from tunesmith.config.grid import Budget, Measure, MeasuredSet
from tunesmith.config.load import run_of
from tunesmith.data.schemas import Row
from tunesmith.errors import (
    ConfigError,
    DiskError,
    Interrupted,
    NumericalError,
    OutOfMemory,
    TunesmithError,
    VerificationError,
    is_out_of_memory,
)
from tunesmith.evaluate.held_out import read_split
from tunesmith.files import remove_folder
from tunesmith.footprint import base_without_weights, fitted, work_of
from tunesmith.prepare import (
    Data,
    Loaded,
    base_for,
    held_out_rows,
    load_data,
    sizes_and_tokenizer,
    template_for,
)
from tunesmith.train.checkpoint import latest_checkpoint, list_checkpoints
from tunesmith.train.log import read_metrics
from tunesmith.train.memory import GIB
from tunesmith.workflow import train_run

if TYPE_CHECKING:
    from rich.console import Console

Task = Mapping[str, Any]
WARM_UP = 2  # of the timed steps, the first are slower


def carry_out(task: Task, console: Console) -> None:
    """Do a cell's work and leave its result or its failure in its folder. Raises Interrupted and DiskError only."""
    folder = Path(task["folder"])
    try:
        for file in task["methods"]:
            open_method(file)
        ROLES[task["role"]](task, folder, console)
    except (Interrupted, DiskError):
        raise
    except Exception as error:  # whatever a cell dies of is a line of the report, and the others go on
        failure = why(error)
        console.print(f"{failure.kind}: {failure.error}", markup=False, soft_wrap=True)
        write_failure(folder, task["key"], failure)


def why(error: Exception) -> Failure:
    """A cell's end as the report says it."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NumericalError):
        return Failure("diverged", line)
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return Failure("out of memory", line)
    if isinstance(error, VerificationError):
        return Failure("not verified", line)
    if isinstance(error, TunesmithError):
        return Failure("refused", line)
    return Failure("error", f"{type(error).__name__}: {line}")


def cell(task: Task, folder: Path, console: Console) -> None:
    """Train, then measure."""
    run, used, valid = _train(task, folder, console)
    loaded = load(folder, device=run.model.device)
    _write(task, folder, used, valid, run, loaded)
    _clear(folder, task["keep"])


def part(task: Task, folder: Path, console: Console) -> None:
    """Train only: a trial rate, or timed steps; validation rows are all that it is measured on."""
    _, used, valid = _train(task, folder, console)
    write_result(folder, Result(task["key"], task["role"], used=used, valid=valid), {})
    _clear(folder, "measures")


def base(task: Task, folder: Path, console: Console) -> None:
    """Measure the untuned base."""
    run, _ = run_of([Located(task["run"])])
    _write(task, folder, {}, {}, run, base_for(run, folder))


ROLES: dict[str, Callable[[Task, Path, Console], None]] = {"cell": cell, "trial": part, "speed": part, "base": base}


def fit(run: Run, budget: Budget | None, step_seconds: float | None) -> Run:
    """The run with its budget as steps and packs. Raises ConfigError, OutOfMemory where not even one step fits."""
    if budget is None:
        return run
    if budget.memory is not None:
        run = _within_memory(run, budget.memory)
    if not budget.bounds_steps:
        return run
    lengths = _lengths(run)
    use = within(budget, lengths, run.train, step_seconds)
    an_epoch = -(-len(lengths) // run.train.batch_size)
    epochs = float(-(-use.steps // an_epoch))
    return replace(run, train=replace(run.train, max_steps=use.steps, epochs=epochs))


def _train(task: Task, folder: Path, console: Console) -> tuple[Run, dict[str, Any], dict[str, float]]:
    """The cell's run, carried out or gone on with; what it used, and its measures on validation rows."""
    resumed = folder.is_dir() and latest_checkpoint(folder) is not None
    if resumed:  # as it was begun: budget, rate and packs are in its config.yaml
        run, _ = load_run(folder / "config.yaml")
        run = replace(run, train=replace(run.train, resume=str(folder)))
    else:
        if folder.is_dir():  # it ended before its first checkpoint: nothing of it is worth keeping
            remove_folder(folder)
        run, _ = run_of([Located(task["run"])])
        if task["rate"] is not None:
            run = replace(run, train=replace(run.train, learning_rate=task["rate"]))
        budget = None if task["budget"] is None else Budget(**task["budget"])
        run = fit(run, budget, task["speed"])
    run = replace(run, output_dir=str(folder.parent), name=folder.name)
    outcome = train_run(run, console)
    lines = read_metrics(folder / "metrics.jsonl")
    own = json.loads((folder / "adapter" / "tunesmith.json").read_text(encoding="utf-8"))
    used = {
        "examples": used_by(len(lines), _lengths(run), run.train).examples,
        "rate": run.train.learning_rate or find_method(str(run.adapter["kind"])).learning_rate,
        "parameters": own["parameters"],
        "file_bytes": sum(file.stat().st_size for file in (folder / "adapter").rglob("*.safetensors")),
        "step_seconds": _step_seconds(lines),
        "seconds": None if resumed else round(outcome.seconds, 1),
        "own_process": bool(task.get("own_process")),
    }
    return run, used, dict(outcome.after)


def _lengths(run: Run) -> list[int]:
    """Tokens of each training row."""
    return [len(example.ids) for example in _rows(run)[0].train.examples]


def _rows(run: Run) -> tuple[Data, Callable[[str], Sequence[int]]]:
    """The run's encoded rows, and the tokenizer's way to encode."""
    _, tokenizer = sizes_and_tokenizer(run.model)
    return load_data(run, tokenizer, template_for(run, tokenizer)), tokenizer.encode


def _within_memory(run: Run, gib: float) -> Run:
    """Packs, and recomputation if need be, so that the plan stays within `gib`. Raises OutOfMemory."""
    data, encode = _rows(run)
    work = work_of(run, data.train.examples, encode, base_without_weights(run.model))
    try:
        return fitted(run, work, int(gib * GIB))
    except OutOfMemory as error:
        raise OutOfMemory(f"budget.memory {gib:g} GiB: {error}") from None


def _step_seconds(lines: list[dict[str, Any]]) -> float:
    """The median time of a step, those of the warm-up aside."""
    totals = [0, *(int(line["num_tokens"]) for line in lines)]
    tokens = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    times = [t / line["tokens_per_second"] for t, line in zip(tokens, lines, strict=True) if line["tokens_per_second"]]
    return median(times[WARM_UP:] or times or [0.0])


def _write(task: Task, folder: Path, used: dict[str, Any], valid: dict[str, float], run: Run, loaded: Loaded) -> None:
    """Measure what is loaded and write the result."""
    given = dict(task["measure"])
    sets = {key: tuple(MeasuredSet(**one) for one in given[key]) for key in ("sets", "forgetting")}
    asked = Measure(sets["sets"], sets["forgetting"], given["samples"])
    subjects = Subjects(
        run,
        loaded.model,
        loaded.tokenizer,
        template=lambda name: template_for(replace(run, data=replace(run.data, template=name)), loaded.tokenizer),
        own_rows=lambda split: _own_rows(run, split),
    )
    figures, outcomes, samples, notes = measured(asked, subjects)
    result = Result(task["key"], task["role"], figures, used, valid, samples, notes)
    write_result(folder, result, outcomes)


def _own_rows(run: Run, split: str) -> list[Row]:
    """Rows of the run's own data that it was not trained on. Raises ConfigError, DataError."""
    if split == "valid":
        return held_out_rows(run) or read_split(run.data, "valid")
    if not Path(run.data.train).expanduser().is_file():
        return read_split(run.data, split)
    raise ConfigError(
        f"measure.split: {run.data.train} is one file, which cells train on, and has no {split} rows; give "
        "measure.data, or measure.split=valid with base.data.valid_size"
    )


def _clear(folder: Path, keep: str) -> None:
    """Remove what the report does not need; the result is written by now."""
    if keep != "checkpoints":
        for checkpoint in list_checkpoints(folder):
            remove_folder(checkpoint)
    if keep == "measures":
        for name in ("adapter", "base"):
            if (folder / name).is_dir():
                remove_folder(folder / name)
        (folder / "verify_probe.safetensors").unlink(missing_ok=True)


def main() -> int:
    """Carry out the task on standard input; 0 done (a failure is recorded), 3 no write was possible, 130 stopped."""
    from rich.console import Console

    line = _first_line()
    if not line:
        sys.stderr.write("cells: no task on standard input; tunesmith compare starts this\n")
        return TunesmithError.exit_code
    task = {**json.loads(line), "own_process": True}
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        carry_out(task, Console(stderr=True, highlight=False))
    except DiskError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        return Interrupted.exit_code
    return 0


def _first_line() -> bytes:
    """A line of standard input, past Python's buffers: the thread below waits on the descriptor itself."""
    found = b""
    while not found.endswith(b"\n"):
        if not (piece := os.read(0, 65536)):
            break
        found += piece
    return found


def _end_with_input() -> None:
    """End at once when the parent is gone; what is on the disk is whole at every moment."""
    while os.read(0, 65536):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
