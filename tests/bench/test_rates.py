"""The search of default learning rates: its grid, its queue, a kill, runs that diverge, and what the page says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bench import rates
from bench.children.rate_worker import attempt
from bench.children.trial import Bench, prepare
from bench.ledger import Ledger
from bench.method_table import ROWS, Row, beyond, chosen, grid, label, leads
from bench.pages import ask_facts, kept
from bench.rates_page import choice, further, page
from tests.tiny import review_folder

from tunesmith.adapters import find_method, kinds
from tunesmith.config import load_run, validate_section
from tunesmith.workflow import train_run

ROOT = Path(__file__).resolve().parents[2]
LORA = {"kind": "lora", "rank": 2}
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews without a test set: a search that read one would fail."""
    return review_folder(tmp_path_factory.mktemp("reviews"), "valid")


@pytest.fixture(scope="module")
def bench(tiny_base: Path, data: Path) -> Bench:
    wanted = {"model": str(tiny_base), "data": str(data), "reviews": 24, "held": 8, "split": "valid", "batch": 2}
    return prepare({**wanted, "seed": 0, "threads": 1})


def options(tmp_path: Path, **changes: Any) -> rates.Options:
    given = {"reviews": 24, "rates": 3, "held": 8, "minutes": 1.0, "workers": 2, "model": "m", "data": "d"}
    return rates.Options(**{**given, "out": tmp_path, "work": tmp_path, **changes})


def test_rates_are_one_and_three_times_powers_of_ten() -> None:
    assert grid(3e-4, 4) == [1e-4, 3e-4, 1e-3, 3e-3] and grid(2e-5, 3) == [1e-5, 3e-5, 1e-4]
    assert grid(1e-2, 1) == [1e-2] and grid(1e-3, 5) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert beyond([1e-3, 1e-4], up=True) == 3e-3 and beyond([3e-4, 1e-3], up=False) == 1e-4
    assert [label(rate) for rate in (3e-4, 1e-2, 0.1, 2e-5, 1.0)] == ["3e-4", "1e-2", "1e-1", "2e-5", "1e0"]


def test_one_more_is_tried_beyond_a_best_at_the_edge() -> None:
    losses = {1e-4: {"loss": 3.0}, 3e-4: {"loss": 2.0}, 1e-3: {"loss": 2.5}}
    assert further(losses) is None and choice(losses) == 3e-4
    assert further({**losses, 1e-3: {"loss": 1.0}}) == 3e-3
    assert further({**losses, 1e-4: {"loss": 1.0}}) == 3e-5
    assert further({**losses, 1e-3: {"diverged": "nan"}}) is None  # the highest was tried, and is not the best
    assert further(dict.fromkeys(losses, {"diverged": "nan"})) == 3e-5 and choice({}) is None


# They need images, which movie reviews have not: bench/seeing.py measures them.
SEEING = {"llama_adapter_image", "llama_adapter_v2_image", "image_projection"}


def test_every_method_has_a_row_with_settings_that_it_knows() -> None:
    assert {row.kind for row in ROWS} >= set(kinds()) - SEEING and len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        given = validate_section(find_method(row.kind).settings, row.adapter, "adapter")
        if leads(row):  # its rate becomes the default, so it must be the default's settings
            assert given == validate_section(find_method(row.kind).settings, {"kind": row.kind}, "adapter"), row.name
    leading = {row.kind for row in ROWS if leads(row)}
    assert leading >= set(kinds()) - SEEING - {"mixed"}  # whose parts have rates of their own


def test_rows_are_chosen_by_name_or_kind() -> None:
    assert [row.name for row in chosen("reft,lora-r8-qv")] == ["loreft", "lora-r8-qv", "noreft", "direft"]
    assert [row.name for row in chosen("lora")] == ["lora"], "a row's name is not its kind"
    with pytest.raises(ValueError, match="'prefx'; did you mean 'prefix'"):
        chosen("prefx")


def test_the_defaults_in_the_code_are_those_that_the_recorded_search_chose() -> None:
    file = ROOT / "docs" / "results" / "rates.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    for row in ROWS:
        if leads(row) and row.name in recorded:
            assert find_method(row.kind).learning_rate == recorded[row.name]["chosen"], row.name


def test_a_pair_trains_as_the_command_does(bench: Bench, tiny_base: Path, data: Path, in_process, tmp_path) -> None:
    found = attempt(bench, {**LORA}, 1e-2)
    flags = {
        "model.path": str(tiny_base), "model.dtype": "float32", "data.train": str(data), "adapter.rank": 2,
        "train.batch_size": 2, "train.warmup_ratio": 0.1, "train.learning_rate": 1e-2, "train.pack_tokens": 2048,
        "evaluate.samples": 0, "output_dir": str(tmp_path),
    }  # fmt: skip
    from rich.console import Console

    outcome = train_run(load_run(None, [], flags)[0], Console(quiet=True))
    assert found["loss"] == pytest.approx(outcome.after["eval_loss"], abs=1e-9)
    assert attempt(bench, None, None)["loss"] == pytest.approx(outcome.before["eval_loss"], abs=1e-9)


@pytest.mark.parametrize("adapter", [LORA, {"kind": "full"}, {"kind": "norms"}], ids=lambda adapter: adapter["kind"])
def test_the_base_is_afterwards_as_it_was(bench: Bench, adapter: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in bench.loaded.model.state_dict().items()}
    first = attempt(bench, adapter, 1e-2)
    after = bench.loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in bench.loaded.model.parameters())
    again = attempt(bench, adapter, 1e-2)
    assert again["loss"] == first["loss"] != attempt(bench, None, None)["loss"]


@pytest.mark.parametrize("adapter", [LORA, {"kind": "full"}], ids=lambda adapter: adapter["kind"])
def test_a_run_that_diverges_is_recorded_and_leaves_nothing_behind(bench: Bench, adapter: dict[str, Any]) -> None:
    base = attempt(bench, None, None)["loss"]
    found = attempt(bench, adapter, 1e30)
    assert "loss" not in found and "diverged" in found and json.dumps(found, allow_nan=False)
    assert attempt(bench, None, None)["loss"] == base and bench.loaded.adapters == {}


def test_settings_that_do_not_fit_are_an_error_of_the_pair(bench: Bench) -> None:
    found = attempt(bench, {"kind": "last_layers", "layers": 9}, 1e-3)
    assert "9" in found["error"] and bench.loaded.adapters == {}


class Fake:
    """A worker whose loss is least at 1e-3; it dies at 1e-2, and diverges at 1e-1."""

    asked: list[tuple[str, float | None]] = []

    def __init__(self, wanted: Path, log: Path) -> None:
        self.alive, self.answered = True, False

    def ask(self, adapter: dict[str, Any] | None, rate: float | None) -> dict[str, Any]:
        Fake.asked.append((str(adapter and adapter["kind"]), rate))
        if rate == 1e-2:
            self.alive = False
            return {"error": "the worker ended with -9: no output"}
        self.answered = True
        if rate == 1e-1:
            return {"diverged": "step 2: the loss is nan", "seconds": 1.0}
        return {"loss": 2.0 if rate is None else abs(rate - 1e-3), "seconds": 1.0}

    def end(self) -> None:
        self.alive = False


def searched(tmp_path: Path, rows: list[Row], **changes: Any) -> tuple[dict[str, Any], str]:
    """What a search of `rows` with fake workers finds, and its page."""
    search = rates.Search(options(tmp_path, **changes), rows, Ledger(tmp_path / "rates.jsonl"))
    search.run()
    about = {"cpu": {"model": "c", "cores": 2, "features": []}, "memory": {"total_bytes": 2**30}, "system": "s"}
    facts = {"absent": {"other": "no such method"}, "about": {**about, "versions": {}}}
    found = rates.results(search, {**facts, "rates": {row.name: 1e-3 for row in rows}}, rows, "python -m bench.rates")
    return found, page(found, kept(tmp_path / "rates.md"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(rates, "Worker", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    return Fake


def test_the_queue_the_page_and_going_on(tmp_path: Path, fake: type[Fake]) -> None:
    rows = [Row("a", "x", 3e-4, {"kind": "lora"}), Row("b", "x", 3e-2, {"kind": "ia3"}), Row("c", "x", None, LORA)]
    rows.append(Row("d", "x", 3e-5, {"kind": "bitfit"}))
    found, text = searched(tmp_path, rows, workers=1)
    assert fake.asked[0] == ("None", None) and found["base"] == 2.0
    # a: the best of 1e-4, 3e-4, 1e-3 is the highest, so one more; b: its lowest rate kills the worker, another goes on
    assert [rate for kind, rate in fake.asked if kind == "lora"] == [1e-4, 3e-4, 1e-3, 3e-3]
    assert set(found["rows"]["d"]["rates"]) == {"1e-5", "3e-5", "1e-4", "3e-4", "1e-3"}  # and no more than five
    assert [rate for kind, rate in fake.asked if kind == "ia3"] == [1e-2, 3e-2, 1e-1]
    assert found["rows"]["a"]["chosen"] == 1e-3 and found["rows"]["b"]["chosen"] == 3e-2
    assert "| `a` |  |  | 0.0009 | 0.0007 | **0.0000** | 0.0020 |" in text
    assert "FAILED: `b` at 1e-2**: the worker ended with -9" in text and "`b` at 1e-1 diverged: step 2" in text
    assert "NOT SEARCHED: `other`**: no such method" in text and "method's default rate: `c`" in text
    fake.asked.clear()
    again, _ = searched(tmp_path, rows, workers=1)
    assert fake.asked == [("ia3", 1e-2)] and again["rows"]["a"] == found["rows"]["a"]  # what failed, and that alone
    fake.asked.clear()
    searched(tmp_path, rows, workers=1, reviews=16)  # other work
    assert len(fake.asked) == 1 + 4 + 3 + 5


def test_what_the_time_does_not_allow_is_said(tmp_path: Path, fake: type[Fake]) -> None:
    found, text = searched(tmp_path, [Row("a", "x", 3e-4, {"kind": "lora"})], minutes=0.0)
    assert fake.asked == [] and found["rows"]["a"]["untried"] == ["1e-4", "3e-4", "1e-3"]
    assert "UNFINISHED: `a`**: no time was left for 1e-4, 3e-4, 1e-3" in text


def search_words(base: Path, data: Path, folder: Path) -> list[str]:
    words = ["--model", base, "--data", data, "--reviews", 24, "--held", 8, "--rates", 3, "--methods", "ia3,norms"]
    words += ["--out", folder, "--work", folder / "work"]
    return [sys.executable, "-m", "bench.rates", *map(str, words)]


def orphans(folder: Path) -> list[psutil.Process]:
    """Workers of a search in `folder`."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder / "work") in " ".join(p.info["cmdline"] or ())]


def test_killed_and_started_again_it_goes_on(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    command = search_words(tiny_base, data, tmp_path)
    given = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT / "src")}, "text": True}
    ledger = tmp_path / "work" / "rates.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **given) as first:
        until = time.monotonic() + 300
        while time.monotonic() < until and not (ledger.is_file() and ledger.read_text(encoding="utf-8")):
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
    while time.monotonic() < until and orphans(tmp_path):  # they end with the pair at hand
        time.sleep(0.05)
    assert not orphans(tmp_path)
    before = ledger.read_text(encoding="utf-8")
    assert before.splitlines() and not (tmp_path / "rates.md").exists()
    ledger.write_text(before + '{"key": {"torn', encoding="utf-8")
    (tmp_path / "rates.md").write_text("<!-- discussion begin -->\nMy words.\n<!-- discussion end -->\n", "utf-8")
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, **given)
    assert done.returncode == 0, done.stderr
    lines = ledger.read_text(encoding="utf-8").splitlines()
    keys = [json.dumps(json.loads(line)["key"]) for line in lines]
    assert lines[: len(before.splitlines())] == before.splitlines() and len(set(keys)) == len(keys)
    found = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))
    for name in ("ia3", "norms"):  # more moves this model farther at 3 steps, so the highest is best, and two are added
        tried = found["rows"][name]["rates"].values()
        assert (
            found["rows"][name]["chosen"] == min(tried, key=lambda record: record["loss"])["rate"] and len(tried) == 5
        )
    assert len(keys) == 1 + 5 + 5 and all(record["loss"] < found["base"] for record in tried)
    text = (tmp_path / "rates.md").read_text(encoding="utf-8")
    assert text == done.stdout.rstrip("\n") + "\n" and "My words." in text and "Default learning rates" in text


@pytest.mark.parametrize("words", [["--reviews", "401"], ["--rates", "6"], ["--rates", "0"]])
def test_a_search_stays_small(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        rates.main(words)
    assert stopped.value.code == 2


def test_wrong_words_and_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rates.main(["--methods", "lorra"]) == 2 and "did you mean 'lora'" in capsys.readouterr().err
    words = ["--model", str(tmp_path / "none"), "--out", str(tmp_path), "--work", str(tmp_path)]
    assert rates.main([*words, "--methods", "ia3"]) == 1 and "none" in capsys.readouterr().err


def test_what_this_checkout_cannot_do_is_asked_of_a_child(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    rows = [Row("a", "x", 1e-3, LORA), Row("b", "x", 1e-3, {"kind": "lorra"}), Row("c", "x", 1e-3, {**LORA, "rnk": 1})]
    facts = ask_facts(rows, str(tiny_base), str(data), tmp_path)
    assert facts["rates"] == {"a": find_method("lora").learning_rate} and facts["about"]["versions"]["torch"]
    assert "'lorra'" in facts["absent"]["b"] and "rnk" in facts["absent"]["c"]
