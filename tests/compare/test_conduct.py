"""Which cells are run, in which order, and what becomes of those that fail; a stand-in does the work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.compare.made import BASE, INPUTS, grid_of, rights, write_cell

from tunesmith.compare.conduct import Conductor, alone
from tunesmith.compare.grid import speed_of
from tunesmith.compare.publish import publish
from tunesmith.compare.read import Found, folder_of, read_cell
from tunesmith.compare.record import Failure, write_failure
from tunesmith.compare.table import tabulate
from tunesmith.errors import ConfigError, DiskError, Interrupted

TEXT = BASE + "methods: [lora, prompt]\nseeds: [0, 1]\nmeasure: {metrics: [accuracy]}\n"


class Worker:
    """Leaves a result, or what `ends` says of a cell whose slug begins so: a failure, or an exception."""

    def __init__(self, grid, out: Path, **ends) -> None:
        self.grid, self.out, self.ends, self.tasks = grid, out, ends, []
        self.loss = {}  # of a trial, by rate

    def __call__(self, task) -> None:
        self.tasks.append(task)
        cell = self.cell(task)
        for slug, end in self.ends.items():
            if cell.slug.startswith(slug):
                if isinstance(end, BaseException):
                    raise end
                return write_failure(Path(task["folder"]), task["key"], end)
        rate = task["rate"] or cell.run.train.learning_rate
        valid = {"eval_loss": self.loss.get(rate, 1.0)} if cell.role == "trial" else {}
        outcomes = {"accuracy": rights(0.5 + cell.run.train.seed / 10)} if cell.role in ("cell", "base") else {}
        write_cell(cell, self.out, outcomes, valid=valid, used={"rate": rate} if rate else None)

    def cell(self, task):
        trials = [t for cell in self.grid.cells for t in self.grid.trials(cell)]
        known = [*self.grid.cells, *self.grid.bases.values(), *trials, *map(speed_of, (*self.grid.cells, *trials))]
        return next(cell for cell in known if cell.key(INPUTS) == task["key"] and cell.role == task["role"])

    @property
    def done(self) -> list[str]:
        return [self.cell(task).slug for task in self.tasks]


def conduct(grid, out, **ends):
    worker, said = Worker(grid, out, **ends), []
    again = ends.pop("again", False)
    return worker, said, Conductor(grid, out, INPUTS, worker, say=said.append, again=again)


def test_each_cell_once_and_never_again(tmp_path):
    grid = grid_of(tmp_path, TEXT)
    worker, said, conductor = conduct(grid, tmp_path)
    conductor.run()
    assert worker.done == ["untuned", "lora_seed=0", "prompt_seed=0", "lora_seed=1", "prompt_seed=1"]
    assert said[1] == "[2/5] lora_seed=0: accuracy 0.5"
    again, said, conductor = conduct(grid, tmp_path)
    conductor.run()
    assert again.done == [] and said[1] == "[2/5] lora_seed=0: there already"
    more, _, conductor = conduct(grid_of(tmp_path, TEXT, "seeds=[0, 1, 2]"), tmp_path)
    conductor.run()
    assert more.done == ["lora_seed=2", "prompt_seed=2"]


def test_the_task_is_whole_and_plain(tmp_path):
    grid = grid_of(tmp_path, TEXT)
    worker, _, conductor = conduct(grid, tmp_path)
    conductor.run()
    task = worker.tasks[1]
    assert json.loads(json.dumps(task))["run"]["adapter"] == {"kind": "lora"}
    assert task["budget"] == {"examples": 64, "tokens": None, "seconds": None, "memory": None}
    assert Path(task["folder"]).parent == tmp_path / "cells" and task["folder"].endswith(task["key"][:8])


@pytest.mark.parametrize("end", [Failure("diverged", "the loss is nan"), Failure("out of memory", "8 GiB")])
def test_a_failed_cell_stops_no_other_and_is_a_line_of_the_report(tmp_path, end):
    grid = grid_of(tmp_path, TEXT)
    worker, said, conductor = conduct(grid, tmp_path, prompt_seed=end)
    conductor.run()
    assert len(worker.done) == 5
    assert f"[3/5] prompt_seed=0: failed: {end.kind}: {end.error}" in said
    publish(grid, tmp_path, INPUTS)
    assert f"| prompt\\_seed=0 | failed | {end.kind}: {end.error} |" in (tmp_path / "report.md").read_text()
    assert end.error in (tmp_path / "report.html").read_text()
    later, _, conductor = conduct(grid, tmp_path)
    conductor.run()
    assert later.done == []  # it would fail again
    retried, _, _ = conduct(grid, tmp_path)
    Conductor(grid, tmp_path, INPUTS, retried, say=lambda line: None, again=True).run()
    assert retried.done == ["prompt_seed=0", "prompt_seed=1"]
    assert not tabulate(grid, tmp_path, INPUTS).lost


def test_a_worker_that_leaves_nothing_is_a_failure(tmp_path):
    grid = grid_of(tmp_path, TEXT)
    Conductor(grid, tmp_path, INPUTS, lambda task: None, say=lambda line: None).run()
    assert {lost.kind for lost in tabulate(grid, tmp_path, INPUTS).lost} == {"failed"}


@pytest.mark.parametrize("end", [Interrupted("stopped"), DiskError("full"), KeyboardInterrupt()])
def test_an_interrupt_or_a_full_disk_ends_the_grid_and_it_goes_on(tmp_path, end):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    grid = grid_of(tmp_path, TEXT)
    conduct(grid, whole)[2].run()
    publish(grid, whole, INPUTS)
    stopped, _, conductor = conduct(grid, parts, **{"lora_seed=1": end})
    with pytest.raises(type(end)):
        conductor.run()
    assert stopped.done[-1] == "lora_seed=1"
    worker, _, conductor = conduct(grid, parts)
    conductor.run()
    assert worker.done == ["lora_seed=1", "prompt_seed=1"]
    publish(grid, parts, INPUTS)
    for name in ("report.html", "report.md", "report.csv", "cells.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_damaged_cell_is_left_alone_and_named(tmp_path):
    grid = grid_of(tmp_path, TEXT)
    conduct(grid, tmp_path)[2].run()
    folder = folder_of(grid.cells[0], tmp_path, INPUTS)
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    worker, said, conductor = conduct(grid, tmp_path)
    conductor.run()
    assert worker.done == [] and any("damaged: metrics.jsonl" in line for line in said)


class TestSearch:
    TEXT = TEXT + "search: {rates: 3, factor: 10, share: 0.5}\n"

    def run(self, tmp_path, loss, **ends):
        grid = grid_of(tmp_path, self.TEXT)
        worker, said, conductor = conduct(grid, tmp_path, **ends)
        worker.loss = loss
        conductor.run()
        return grid, worker

    def test_the_best_rate_on_validation_rows_is_taken_by_every_seed(self, tmp_path):
        grid, worker = self.run(tmp_path, {})
        rates = grid.cells[0].rates
        assert worker.done[1:5] == [*(f"trial_lora_rate={rate:g}" for rate in rates), "lora_seed=0"]
        assert len(worker.done) == 1 + 2 * 3 + 4  # searched once a method, not once a seed
        for task in worker.tasks:
            if task["role"] == "cell":  # all trials are alike: the smallest rate of the tied
                assert task["rate"] == worker.cell(task).rates[0]
                assert task["budget"]["examples"] == 32
        assert all(task["budget"]["examples"] == 10 for task in worker.tasks if task["role"] == "trial")

    def test_the_least_loss_wins(self, tmp_path):
        rates = grid_of(tmp_path, self.TEXT).cells[0].rates
        _, worker = self.run(tmp_path, {rates[0]: 0.9, rates[1]: 0.2, rates[2]: 0.4})
        assert [t["rate"] for t in worker.tasks if t["role"] == "cell"][0] == rates[1]

    def test_a_rate_that_diverges_only_loses(self, tmp_path):
        rates = grid_of(tmp_path, self.TEXT).cells[0].rates
        ends = {f"trial_lora_rate={rates[0]:g}": Failure("diverged", "nan")}
        grid, worker = self.run(tmp_path, {}, **ends)
        assert [t["rate"] for t in worker.tasks if t["role"] == "cell"][0] == rates[1]
        publish(grid, tmp_path, INPUTS)
        assert f"| lora | {rates[0]:g} | failed: diverged: nan |" in (tmp_path / "report.md").read_text()

    def test_no_rate_at_all_is_a_line_of_the_report_and_is_tried_again(self, tmp_path):
        grid, worker = self.run(tmp_path, {}, trial_lora=Failure("diverged", "nan"))
        lost = tabulate(grid, tmp_path, INPUTS).lost
        assert [one.cell.slug for one in lost] == ["lora_seed=0", "lora_seed=1"]
        assert all(one.kind == "waiting" and "no rate of its search trained" in one.why for one in lost)
        assert "prompt_seed=1" in worker.done
        better, _, conductor = conduct(grid, tmp_path)
        Conductor(grid, tmp_path, INPUTS, better, say=lambda line: None, again=True).run()
        assert "lora_seed=0" in better.done


def test_a_budget_in_seconds_is_timed_first(tmp_path):
    text = TEXT.replace("examples: 64", "seconds: 30") + "search: {rates: 2, share: 0.5}\n"
    grid = grid_of(tmp_path, text)
    worker, _, conductor = conduct(grid, tmp_path)
    conductor.run()
    assert worker.done[1:5] == ["speed_lora", *(f"trial_lora_rate={r:g}" for r in grid.cells[0].rates), "lora_seed=0"]
    assert worker.done.count("speed_lora") == 1
    for task in worker.tasks[2:5]:
        assert task["speed"] == pytest.approx(80 / 1000)
    assert [task["budget"]["seconds"] for task in worker.tasks[2:5]] == [7.5, 7.5, 15.0]


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    with alone(tmp_path / "out"):
        with pytest.raises(ConfigError, match="another tunesmith compare is at work there"), alone(tmp_path / "out"):
            pass
    with alone(tmp_path / "out"):
        pass


def test_changed_is_told_after_each_cell(tmp_path):
    grid = grid_of(tmp_path, TEXT)
    seen = SimpleNamespace(counts=[])

    def changed():
        seen.counts.append(sum(isinstance(read_cell(c, tmp_path, INPUTS), Found) for c in grid.in_order()))

    Conductor(grid, tmp_path, INPUTS, Worker(grid, tmp_path), say=lambda line: None, changed=changed).run()
    assert seen.counts == [1, 2, 3, 4, 5]
