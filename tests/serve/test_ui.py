"""What stands behind the web page, without a browser: questions, runs, commands, and the fence around Gradio."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.serve.conftest import KEY, LETTERS

from tunesmith.data.templates import get_template
from tunesmith.errors import GenerationError, RequestError
from tunesmith.processes import start_python
from tunesmith.serve.ui.jobs import RUNNING, Jobs, words
from tunesmith.serve.ui.runs import BYTES, runs, shown
from tunesmith.serve.ui.talk import Ask, answers, choices, guarded

SOURCE = str(Path(__file__).parents[2] / "src")
GREEDY = Ask(temperature=0, max_new_tokens=6)


def say(engine, models, text="Hello", history=(), ask=GREEDY, most=64):
    """The last state of the answers and the line about them."""
    return list(answers(engine, models, history, text, ask, most))[-1]


def test_models_answer_at_once_each_by_its_own_adapter(engine) -> None:
    texts, line = say(engine, ["base", "alpha", "beta"])
    for text, name in zip(texts, ("base", "alpha", "beta"), strict=True):
        assert len(text) == 6 and set(text) <= set(LETTERS[name])
    assert re.fullmatch(r"18 tokens in [\d.]+ s\. cut at 6 tokens: base, alpha, beta", line.split(". the template")[0])
    alone = [say(engine, [name])[0][0] for name in ("base", "alpha", "beta")]
    assert texts == alone


def test_answers_grow_and_closing_them_stops_the_engine(engine) -> None:
    step, engine.batch.step = engine.batch.step, lambda: (time.sleep(0.06), step())[1]
    states = answers(engine, ["alpha"], [], "Hello", Ask(temperature=0, max_new_tokens=200), 500)
    first, second = next(states)[0][0], next(states)[0][0]
    assert second.startswith(first) and len(second) > len(first) > 0
    states.close()
    end = time.monotonic() + 10
    while (engine.inside or engine.batch.rows) and time.monotonic() < end:
        time.sleep(0.02)
    assert not engine.inside and not engine.batch.rows


def test_a_template_of_one_question_says_that_turns_stand_alone(engine) -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with engine.registry.using("beta") as entry:
        entry.template = get_template("{instruction} ->", entry.tokenizer)
    assert "one question and one answer" in say(engine, ["beta"], history=history)[1]
    assert "one question and one answer" not in say(engine, ["alpha"], history=history)[1]
    assert say(engine, ["beta"], history=history)[0] == say(engine, ["beta"])[0]


def test_the_oldest_turns_go_where_the_context_is_short(engine) -> None:
    history = [{"role": role, "content": "many words " * 20} for _ in range(8) for role in ("user", "assistant")]
    assert "its oldest turns are left out" in say(engine, ["alpha"], history=history)[1]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ({"seed": "x"}, "seed: give a whole number"),
        ({"seed": "-1"}, "seed: give a whole number"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_p": -0.5}, "top_p"),
    ],
)
def test_settings_that_cannot_be_are_refused(form, line) -> None:
    with pytest.raises((RequestError, GenerationError), match=line):
        Ask(**form).settings(64)


def test_settings_reach_the_model() -> None:
    made = Ask("", 100, 0.5, 0.9, 7, 1.3, " 12 ").settings(64)
    assert (made.max_new_tokens, made.temperature, made.top_p, made.top_k) == (64, 0.5, 0.9, 7)
    assert (made.repetition_penalty, made.seed) == (1.3, 12)
    greedy = Ask("", 10, 0, 0.9, 7, 1.0, "12").settings(64)
    assert (greedy.top_p, greedy.top_k, greedy.seed) == (None, None, None)
    assert Ask.names() == ["system", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"]


@pytest.mark.parametrize(("models", "text", "line"), [(["base"], " ", "no question"), (["nobody"], "a", "no model")])
def test_an_error_is_one_line_in_place_of_an_answer(engine, models, text, line) -> None:
    (told,) = guarded(lambda: answers(engine, models, [], text, GREEDY, 64), lambda error: ([], error))
    assert told[0] == [] and line in told[1] and "\n" not in told[1]


def test_an_adapter_of_the_folder_is_loaded_when_it_is_asked(engine) -> None:
    engine.call(lambda: engine.registry.remove("alpha")).result(10)
    assert "alpha" not in [entry.name for entry in engine.registry.entries] and "alpha" in choices(engine)
    assert set(say(engine, ["alpha"])[0][0]) <= set(LETTERS["alpha"])


def write_run(folder: Path, name: str, lines: str = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n') -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(lines)
    return run


def test_runs_are_listed_the_newest_first_and_nothing_else_is(tmp_path) -> None:
    assert runs(tmp_path / "nowhere") == [] and "No runs" in shown(tmp_path, None)
    for number, name in enumerate(("old", "new")):
        path = write_run(tmp_path, name) / "metrics.jsonl"
        os.utime(path, (number, number))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(write_run(tmp_path / "elsewhere", "run"))
    assert runs(tmp_path) == ["new", "old"]


@pytest.mark.parametrize("name", ["../x", "nobody", "/etc", "link"])
def test_only_a_run_of_the_folder_is_shown(tmp_path, name) -> None:
    write_run(tmp_path.parent, "x-" + tmp_path.name)
    with pytest.raises(RequestError, match="there is no run"):
        shown(tmp_path, name)


def test_a_run_is_shown_in_a_frame_without_scripts(tmp_path) -> None:
    run = write_run(tmp_path, 'a" onload="alert(1)')
    assert "Training loss" in shown(tmp_path, run.name)  # it goes on: the curves so far
    (run / "report.html").write_text('<script>alert(1)</script>"><b>')
    frame = shown(tmp_path, run.name)
    assert frame.startswith('<iframe class="report" sandbox="" ') and frame.count("<") == 2
    assert 'onload="' not in frame.replace("onload=&quot;", "")
    (run / "report.html").write_bytes(b" " * (BYTES + 1))
    with pytest.raises(RequestError, match="open it from disk"):
        shown(tmp_path, run.name)


def test_a_form_becomes_words() -> None:
    form = {"model.path": " m ", "data.limit": "", "name": None, "train.epochs": 2, "adapter.kind": "lora"}
    more = "# rank\nadapter.rank = 4\n\ntrain.epochs=1\nadapter.target_modules=[a, b]"
    assert words(form, more) == [
        "model.path=m", "train.epochs=1", "adapter.kind=lora", "adapter.rank=4", "adapter.target_modules=[a, b]"
    ]  # fmt: skip
    for wrong in ("rank", "--method-file=x.py", "a b=1", "=1", "a..b=1"):
        with pytest.raises(RequestError, match="more settings, line 2: .* is not key=value"):
            words(form, f"a=1\n{wrong}")


def test_a_command_runs_and_says_how_it_ended(tmp_path) -> None:
    jobs = Jobs(tmp_path)
    assert jobs.text() == "" and list(jobs.follow()) == [""]
    jobs.stop()
    jobs.start(["inspect"], ["nowhere"])
    last = list(jobs.follow())[-1].splitlines()
    assert last[0] == "$ tunesmith inspect nowhere" and last[1].startswith("error: ") and len(last) == 3
    assert last[2] == "ended with exit status 2" and not jobs.running
    jobs.start(["--version"], [])
    assert list(jobs.follow())[-1].endswith("done\n")


def test_one_command_at_a_time_and_stop_is_ctrl_c(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_command.py").write_text(
        "import time\nprint('begun')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(
        "tunesmith.serve.ui.jobs.start_python",
        lambda _, *rest, **options: start_python("slow_command", *rest, **options),
    )
    jobs = Jobs(tmp_path)
    jobs.start(["train"], ["a=1"])
    states = jobs.follow()
    while "begun" not in next(states):
        pass
    assert jobs.running
    with pytest.raises(RequestError, match=RUNNING):
        jobs.start(["train"], [])
    threading.Timer(0.2, jobs.stop).start()
    assert [*states][-1].endswith("saved\ndone\n")


@pytest.fixture
def client(engine, tmp_path):
    """A client of the page's application, on loopback without a key."""
    pytest.importorskip("gradio", reason="NOT TESTED: pip install 'tunesmith[ui]'")
    yield from clients(engine, tmp_path, None)


def clients(engine, folder, key):
    from starlette.testclient import TestClient

    from tunesmith.serve.ui.page import Options, create_page

    app = create_page(engine, Options(folder, "m", key=key), Jobs(folder))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def test_the_page_allows_nothing_from_elsewhere(client) -> None:
    found = client.get("/")
    assert found.status_code == 200 and "Tunesmith" in found.text
    policy = found.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "script-src-attr 'none'" in policy and "//" not in policy
    assert client.get("/", headers={"Host": "elsewhere.test"}).status_code == 403
    assert client.get("/", headers={"Origin": "https://elsewhere.test"}).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/file=pyproject.toml"),
        ("GET", "/gradio_api/proxy=http://elsewhere.test/"), ("GET", "/gradio_api/stream/a/b/c"),
        ("POST", "/gradio_api/component_server"), ("GET", "/openapi.json"), ("GET", "/docs"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_closed(client, method, path) -> None:
    found = client.request(method, path, json={} if method == "POST" else None)
    assert found.status_code == 404 and "root:" not in found.text
    assert "content-security-policy" in found.headers


def test_no_function_of_the_page_is_a_documented_api(client) -> None:
    assert client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_the_key_is_the_password_of_a_browser(engine, tmp_path) -> None:
    pytest.importorskip("gradio", reason="NOT TESTED: pip install 'tunesmith[ui]'")
    for client in clients(engine, tmp_path, KEY):
        for path in ("/", "/config", "/theme.css", "/gradio_api/queue/join"):
            found = client.get(path)
            assert found.status_code == 401 and found.headers["www-authenticate"].startswith("Basic ")

        def status(user: str) -> int:
            given = base64.b64encode(user.encode()).decode()
            return client.get("/", headers={"Authorization": f"Basic {given}"}).status_code  # noqa: B023

        assert status(f"anybody:{KEY}") == 200 and status(f":{KEY}") == 200
        assert {status(wrong) for wrong in (KEY, f"a:{KEY}x", "a:", "", f"a:Bearer {KEY}")} == {401}
        assert client.get("/", headers={"Authorization": "Basic %%%"}).status_code == 401
        assert client.get("/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_page_is_served_until_it_is_interrupted(base, adapters, tmp_path) -> None:
    """The whole command, with a clean end at Ctrl-C."""
    httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")
    pytest.importorskip("gradio", reason="NOT TESTED: pip install 'tunesmith[ui]'")
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "ui", "--model", base, "--adapter", adapters / "alpha", "--port", "0",
         "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": SOURCE},
        cwd=tmp_path,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if found := re.search(r"open (\S+) in a browser", line):
                break
        end = time.monotonic() + 60
        while True:
            try:
                assert "alpha" in httpx.get(f"{found[1]}config", timeout=30).text
                break
            except httpx.ConnectError:
                assert time.monotonic() < end
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and out == "" and "Traceback" not in err
    finally:
        process.kill()


def test_beyond_loopback_only_with_a_key(command, base, monkeypatch) -> None:
    pytest.importorskip("gradio", reason="NOT TESTED: pip install 'tunesmith[ui]'")
    monkeypatch.delenv("TUNESMITH_API_KEY", raising=False)
    code, _, err = command("ui", "--model", base, "--host", "0.0.0.0")
    assert code == 2 and "a key is needed" in err and err.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(command, base, monkeypatch) -> None:
    from tunesmith.cli import ui

    monkeypatch.setattr(ui, "NEEDED", ("gradio", "no_such_library"))
    code, _, err = command("ui", "--model", base)
    assert code == 2 and "no_such_library; install it with: pip install 'tunesmith[ui]'" in err


def test_streams_of_an_open_page_end_with_the_server() -> None:
    pytest.importorskip("gradio", reason="NOT TESTED: pip install 'tunesmith[ui]'")
    from tunesmith.serve.ui.page import Fenced

    stopping, sent = threading.Event(), []

    async def endless(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"alive", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def never() -> dict:
        return await asyncio.Event().wait()

    async def send(message) -> None:
        sent.append(message)

    threading.Timer(0.2, stopping.set).start()
    fenced = Fenced(endless, stopping.is_set)
    asyncio.run(asyncio.wait_for(fenced({"type": "http", "path": "/"}, never, send), 10))
    assert [message.get("more_body", False) for message in sent] == [False, True, False]
