"""The Python of docs/serve.md runs, and its tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.serve.conftest import LETTERS, Starter
from tests.test_docs import fenced, leaf, run_code

from tunesmith.serve.engine import Limits
from tunesmith.serve.requests import MOST_ANSWERS, MOST_PROMPTS

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_client_of_the_page_runs(start: Starter, tmp_path, capsys) -> None:
    pytest.importorskip("openai", reason="NOT TESTED: pip install openai")
    live = start(None, names=("alpha", "beta"), max_new_tokens=6)
    first, _ = fenced(PAGE)
    given = first.replace("http://127.0.0.1:8000", live.url).replace('"formal"', '"alpha"').replace('"short"', '"beta"')
    run_code(given, tmp_path)
    listed, said, streamed = capsys.readouterr().out.split("\n")
    assert listed == "['tiny-base', 'alpha', 'beta']"
    assert set(said) <= set(LETTERS["alpha"]) and set(streamed) <= set(LETTERS["beta"]) and len(streamed) == 6


def test_the_engine_of_the_page_runs(base, adapters, tmp_path, capsys) -> None:
    _, second = fenced(PAGE)
    given = {"smollm2-135m-instruct": base, "runs/formal/adapter": adapters / "gamma"}
    for name, path in given.items():
        assert f'"{name}"' in second
        second = second.replace(f'"{name}"', repr(str(path)))
    run_code(second, tmp_path)
    assert set(capsys.readouterr().out) <= set(LETTERS["gamma"])


def test_the_tables_say_what_is_so() -> None:
    limits = Limits()
    defaults = {parameter.opts[0]: parameter.default for parameter in leaf("serve")[0].params}
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| (\d+)", PAGE, re.M))
    assert rows.keys() == {
        "--answers", "--waiting", "--queue-seconds", "--request-seconds", "--cache-mib", "--prefix-cache-mib",
    }  # fmt: skip
    assert {name: int(value) for name, value in rows.items()} == {name: defaults[name] for name in rows}
    assert [defaults[name] for name in rows] == [
        limits.answers, limits.waiting, limits.queue_seconds, limits.request_seconds,
        limits.cache_bytes >> 20, limits.prefix_bytes >> 20,
    ]  # fmt: skip
    assert f"up to {MOST_ANSWERS} answers" in PAGE and f"up to {MOST_PROMPTS}," in PAGE
