"""metrics.jsonl over resumes and kills, trackers that come, go and fail, the display in a terminal or not."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys

import pytest
from rich.console import Console

from tunesmith.errors import ConfigError
from tunesmith.train import log
from tunesmith.train.log import LOGGED_NAMES, MetricsFile, Progress, Trackers, open_trackers, read_metrics


def line(step: int) -> dict[str, float]:
    return {name: step / 3 for name in LOGGED_NAMES if name != "step"}


def write(path, first: int, last: int, **options) -> None:
    file = MetricsFile(path, **options)
    for step in range(first, last + 1):
        file.write(step, line(step))


def test_one_line_a_step_with_the_ecosystems_names(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 3)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in lines] == [1, 2, 3]
    assert set(lines[0]) == set(LOGGED_NAMES) and lines[2] == {"step": 3, **line(3)}


def test_no_step_appears_twice_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7)
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # torn by a kill
    assert [each["step"] for each in read_metrics(path)] == list(range(1, 8))
    write(path, 5, 9, resume_step=4)
    assert [each["step"] for each in read_metrics(path)] == list(range(1, 10))
    write(path, 1, 2)  # a new run in the same folder
    assert [each["step"] for each in read_metrics(path)] == [1, 2]


def test_values_that_are_not_finite_stay_json(tmp_path):
    MetricsFile(tmp_path / "m.jsonl").write(1, {"grad_norm": math.inf, "loss": math.nan, "epoch": 0.5})
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "loss": None, "epoch": 0.5}
    assert read_metrics(tmp_path / "absent.jsonl") == []


class Recorder:
    def __init__(self, project="", name="", folder=None, config=None, resume_step=0, fail_at=None):
        self.seen, self.finished, self.fail_at = [], False, fail_at

    def log(self, step, values):
        if step == self.fail_at:
            raise ConnectionError("no route to host")
        self.seen.append((step, dict(values)))

    def finish(self):
        self.finished = True


def test_a_failing_tracker_is_named_once_and_the_others_go_on(caplog):
    good, bad = Recorder(), Recorder(fail_at=2)
    trackers = Trackers({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            trackers.log(step, {"loss": 1.0})
        trackers.finish()
    assert [step for step, _ in good.seen] == [1, 2, 3, 4] and good.finished
    assert [step for step, _ in bad.seen] == [1] and not bad.finished
    assert len(caplog.records) == 1 and "bad failed" in caplog.text and "no route to host" in caplog.text


def test_a_tracker_that_cannot_start_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("no API key")

    monkeypatch.setitem(log.TRACKERS, "wandb", refuse)
    monkeypatch.setitem(log.TRACKERS, "trackio", Recorder)
    trackers = open_trackers(["wandb", "trackio"], project="p", name="n", folder=tmp_path)
    assert list(trackers.trackers) == ["trackio"] and "no API key" in caplog.text


def test_none_by_default_and_unknown_or_missing_ones_are_named(tmp_path, monkeypatch):
    loaded = set(sys.modules)
    assert open_trackers([], project="p", name="n", folder=tmp_path).trackers == {}
    assert set(sys.modules) == loaded and list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        open_trackers(["wandbd"], project="p", name="n", folder=tmp_path)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for name in log.TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
        with pytest.raises(ConfigError, match=rf"pip install 'tunesmith\[{name}\]'"):
            open_trackers([name], project="p", name="n", folder=tmp_path)


def run_tracker(name, folder, resume_step=0, steps=(1, 2)):
    trackers = open_trackers(
        [name], project="proj", name="run", folder=folder, config={"rank": 8}, resume_step=resume_step
    )
    assert list(trackers.trackers) == [name]
    for step in steps:
        trackers.log(step, {"loss": 1.0 / step})
    trackers.finish()
    assert list(trackers.trackers) == [name]


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tracker("tensorboard", tmp_path)
    run_tracker("tensorboard", tmp_path, resume_step=1, steps=(2, 3))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_wandb_offline_for_real(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_tracker("wandb", tmp_path)
    first = (tmp_path / "wandb" / "run-id").read_text()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    run_tracker("wandb", tmp_path, resume_step=2, steps=(3,))
    assert (tmp_path / "wandb" / "run-id").read_text() == first
    assert capsys.readouterr().out == ""


def test_trackio_local_for_real(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run_tracker("trackio", tmp_path)
    run_tracker("trackio", tmp_path, resume_step=2, steps=(3,))
    assert list((tmp_path / "trackio").glob("proj*"))
    assert capsys.readouterr().out == ""


def show(terminal: bool, steps, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, _environ={"TERM": "xterm", **os.environ})
    with Progress(steps[-1], console=console, **options) as progress:
        progress.note("[a] note")
        for step in steps:
            progress.update(step, loss=2.0 / step, tokens_per_second=1234.5, memory_gib=1.5)
    return out.getvalue()


def test_plain_lines_come_now_and_then(capsys):
    times = iter([0.0, *range(1, 101)])
    text = show(False, range(1, 101), plain_seconds=20.0, clock=lambda: float(next(times)))
    lines = text.splitlines()
    assert lines[0] == "[a] note" and "\x1b" not in text
    assert [each.split()[1] for each in lines[1:]] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert "loss 2.0000" in lines[1] and "1,234 tokens/s" in lines[1] and "1.50 GiB" in lines[1]
    assert "1:39 left" in lines[1] and "0:59 left" in lines[3] and "left" not in lines[-1]


def test_time_left_counts_from_the_resumed_step():
    times = iter([0.0, 10.0, 20.0])
    text = show(False, (91, 100), plain_seconds=0.0, clock=lambda: next(times), start_step=90)
    assert "1:30 left" in text


def test_terminal_shows_a_bar():
    text = show(True, range(1, 4))
    assert "3/3" in text and "loss 0.6667" in text and "[a] note" in text


def test_display_is_on_stderr(capsys):
    with Progress(1) as progress:
        progress.update(1, loss=1.0, tokens_per_second=1.0, memory_gib=1.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "step 1/1" in captured.err
