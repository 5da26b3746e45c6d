"""From events to figures, and from figures to the page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import table
from bench.children.profile_ours import PYTHON, ceiling_seconds, part_of
from bench.jobs import JOBS, MODES
from bench.process import Finished
from bench.results import against, check_work, ratios, summarise, training_record
from bench.runner import Options, Runner, read_results

FACTS = {"tokens": 600, "supervised": 300, "data_sha256": "a"}


def finished(times: list[float], tokens: int = 100, supervised: int = 50, error: str | None = None) -> Finished:
    """A child that made a step of `tokens` at each of `times`, began at 1 s and saved a second after the last."""
    steps = [{"event": "step", "t": t, "tokens": tokens, "supervised": supervised} for t in times]
    events = [{"event": "begin", "t": 1.0}, *steps, {"event": "saved", "t": times[-1] + 1}]
    return Finished(0, times[-1] + 2, 5.0, 1.0, 2**30, events, error)


def test_rates() -> None:
    record = training_record(finished([3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), rows=20)
    assert record["tokens"] == 600 and record["supervised"] == 300
    assert record["tokens_per_s"] == pytest.approx(100)  # four steps after the first two, a second each
    assert record["examples_per_s"] == pytest.approx(2.0)  # 20 rows, 10 seconds, start and end included
    assert record["begin_s"] == 1.0 and record["first_step_s"] == 3.0 and record["saved_s"] == 9.0


def test_a_single_step_is_timed_from_its_beginning() -> None:
    assert training_record(finished([3.0]), rows=1)["tokens_per_s"] == pytest.approx(50)


def test_a_run_without_an_adapter_is_no_success() -> None:
    done = finished([3.0, 4.0])
    done.events.pop()
    assert "saved no adapter" in training_record(done, rows=1)["error"]


@pytest.mark.parametrize(
    ("tokens", "supervised", "sha", "wanted"),
    [(100, 50, None, None), (100, 50, "a", None), (99, 50, None, "594 tokens"), (100, 49, None, "294 targets"),
     (100, 50, "b", "other ids")],
)  # fmt: skip
def test_unlike_work_is_told(tokens: int, supervised: int, sha: str | None, wanted: str | None) -> None:
    record = training_record(finished([1.0 * n for n in range(2, 8)], tokens, supervised), rows=20)
    found = check_work(record, FACTS, sha)
    assert found is None if wanted is None else found is not None and wanted in found


def runs() -> list[dict[str, Any]]:
    """Three rounds: ours is 2, 4 and 3 times as fast as a peer, on a machine whose speed changes in between."""
    found = []
    for number, (ours, peer) in enumerate([(20.0, 10.0), (4.0, 1.0), (30.0, 10.0)]):
        for mode, rate in (("ours", ours), ("slow", peer), ("ours-lean", ours / 2)):
            base = {"error": None, "pair": str(number), "ours": mode != "slow", "peak_bytes": 2**30}
            found.append({**base, "mode": mode, "examples_per_s": rate, "wall_s": 1.0, "held_out": 2.0})
    return found


def test_ratios_are_taken_within_pairs() -> None:
    assert ratios(runs(), "ours", "slow", "examples_per_s") == [3.0, 2.0, 4.0]
    assert against(runs(), "ours-lean")["slow"]["examples_per_s"] == [1.5, 1.0, 2.0]


def test_runs_of_other_work_do_not_count() -> None:
    found = runs()
    found[4]["unlike"] = "trained on 3 tokens where the job has 4"  # the slow one of round 1
    summary = summarise(found, "ours")
    assert summary["slow"]["runs"] == 2 and summary["slow"]["error"].startswith("trained on 3")
    assert summary["slow"]["ratios"]["examples_per_s"] == [2.5, 2.0, 3.0]


def test_first_tokens_as_ours() -> None:
    base = {"error": None, "pair": "0", "ours": False, "peak_bytes": 1}
    found = [{**base, "mode": "ours", "ids": [1, 2, 3]}, {**base, "mode": "peer", "ids": [1, 2, 4]}]
    assert summarise(found, "ours")["peer"]["alike"] == 2


def test_the_page_says_what_was_not_measured() -> None:
    entry = {
        "about": "A job", "date": "2000-01-01", "facts": {}, "runs": [], "summary": summarise(runs(), "ours"),
        "absent": {"gone": "could not be installed: no | wheel"},
    }  # fmt: skip
    text = table.page({"jobs": {"a": entry, "b": {"about": "B", "date": "", "error": "needs a folder"}}})
    assert "| ours (3) |" in text and "3.00x (2.00 to 4.00)" in text
    assert "gone: not measured: could not be installed: no \\| wheel" in text
    assert "not measured: needs a folder" in text
    assert table.page(None) == table.page({"jobs": {}}) == table.profile(None) == "not measured"


def test_a_run_that_is_stopped_leaves_the_table_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, left = Runner(Options(out=tmp_path / "results.json", model="", rounds=3, tune_rows=0)), runs()[:3]

    def measure(job: Any, mode: Any, facts: Any, *, seed: int, pair: str) -> dict[str, Any]:
        if not left:
            raise KeyboardInterrupt
        return {**left.pop(0), "mode": mode.name, "ours": mode.ours, "pair": pair}

    found = {"_prepare": {}, "machine": {}, "_present": ([MODES["ours"], MODES["hf-mb4"]], {})}
    for name, value in found.items():
        monkeypatch.setattr(runner, name, lambda *_, value=value: value)
    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(runner.envs, "refresh_ours", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        runner.run([JOBS["alpaca"]])
    text = table.page(read_results(tmp_path / "results.json"))
    assert "| ours (2) |" in text and "| hf-mb4 (1) |" in text


def test_each_machine_stands_above_the_jobs_that_it_ran() -> None:
    def entry(name: str) -> dict[str, Any]:
        facts = {"cpu": name, "cores": 2, "threads": 2}
        return {"about": "A job", "date": "2000-01-01", "machine": facts, "runs": [], "summary": {}}

    text = table.page({"jobs": {"a": entry("One"), "b": entry("One"), "c": entry("Two")}})
    places = [text.index(f"### {name}") for name in "abc"]
    assert text.count("| processor | One,") == text.count("| processor | Two,") == 1
    assert text.index("One,") < places[0] < places[1] < text.index("Two,") < places[2]


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    docs = tmp_path / "page.md"
    docs.write_text("# Page\n<!-- bench:cpu begin -->\nold\n<!-- bench:cpu end -->\nrest\n")
    for text in ("first", "second"):
        table.write("cpu", text, docs)
    assert docs.read_text() == "# Page\n<!-- bench:cpu begin -->\n\nsecond\n\n<!-- bench:cpu end -->\nrest\n"
    with pytest.raises(ValueError, match="bench:gpu"):
        table.write("gpu", "x", docs)


def test_the_page_of_the_project_has_all_sections() -> None:
    page = table.DOCS.read_text(encoding="utf-8")
    for name in ("cpu", "profile", "cuda"):
        assert page.index(f"<!-- bench:{name} begin -->") < page.index(f"<!-- bench:{name} end -->")


@pytest.mark.parametrize(
    ("chain", "part"),
    [
        (["aten::mm", "aten::linear"], "linears"),
        (["aten::mm", "_ChunkedLoss"], "head and loss"),
        (["aten::bmm", "_NativeBackward", "autograd::engine::evaluate_function: _NativeBackward"], "attention"),
        (["_RMSNorm"], "norms, rotary, SwiGLU"),
        (["aten::mul", "bench: update"], "optimizer and clipping"),
        (["aten::add"], "embedding, sums, copies"),
        (["something"], PYTHON),
    ],
)
def test_a_call_belongs_to_the_nearest_part(chain: list[str], part: str) -> None:
    event = None
    for name in reversed(chain):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert part_of(event) == part


def test_ceiling_counts_each_product_twice() -> None:
    """Forward and the gradient of the input: 4 operations a weight and token."""
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=32,
        num_hidden_layers=3,
    )  # fmt: skip
    speeds = dict.fromkeys(("attention", "up", "down", "head"), 1.0)
    weights = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert ceiling_seconds(config, speeds, 10, 5) == pytest.approx(4 * (weights * 10 + 8 * 32 * 5) / 1e9)
