"""Two hundred clients at once, half of whom go away: no wrong adapter, and everything back as it was."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import threading
import time
from urllib.parse import urlsplit

import psutil
import pytest
from tests.serve.conftest import KEY, LETTERS, Live, Starter

from tunesmith.inference import GenerationSettings, generate
from tunesmith.serve.engine import Limits

httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")
CLIENTS, TOKENS = 200, 16
HEADERS = {"Authorization": f"Bearer {KEY}"}


def body(model: str, number: int, stream: bool) -> dict:
    """A question of one of ten kinds; greedy, so that its answer is known."""
    talk = [{"role": "user", "content": f"Question {number % 10}, {'please ' * (number % 10)}?"}]
    return {"model": model, "messages": talk, "temperature": 0, "max_tokens": TOKENS, "stream": stream}


def solo(live: Live) -> dict[tuple[str, int], str]:
    """What each model answers to each question by itself."""
    found = {}
    for model in LETTERS:
        with live.engine.registry.using(model) as entry:
            for number in range(10):
                ids = entry.chat(body(model, number, False)["messages"])
                answer = generate(
                    entry.model, [ids], GenerationSettings(max_new_tokens=TOKENS, stop=entry.template.stop),
                    eos_ids=entry.tokenizer.eos_ids, tokenizer=entry.tokenizer, adapters=entry.seams,
                )[0]  # fmt: skip
                found[model, number] = answer.text
    return found


async def one(client: httpx.AsyncClient, model: str, number: int, leaves: bool, stream: bool) -> tuple[str, bool]:
    """Ask; who leaves closes the connection under way. Returns what was read, and whether to the end."""
    url = "/v1/chat/completions"
    if not stream:
        task = asyncio.create_task(client.post(url, json=body(model, number, False)))
        if leaves:
            await asyncio.sleep(random.Random(number).random())
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "", False
        reply = await task
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"], True
    text, pieces, after = "", 0, random.Random(number).randint(1, 8)
    async with client.stream("POST", url, json=body(model, number, True)) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))
                text += piece["choices"][0]["delta"].get("content") or ""
                pieces += 1
            if leaves and pieces > after:
                return text, False
    return text, True


async def everyone(live: Live) -> list[tuple[str, int, str, bool]]:
    """All clients at once, each with a connection of its own, while an adapter is loaded anew again and again."""
    draw, models = random.Random(0), list(LETTERS)
    plan = [(draw.choice(models), i, i % 2 == 0, draw.random() < 0.6) for i in range(CLIENTS)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=live.url, headers=HEADERS, limits=limits, timeout=120) as client:
        asked = [asyncio.create_task(one(client, *each)) for each in plan]
        for _ in range(3):
            await asyncio.sleep(0.3)
            for name in ("alpha", "delta"):
                assert (await client.post("/v1/adapters", json={"name": name})).status_code == 200
        said = await asyncio.gather(*asked)
    return [(model, number, *each) for (model, number, _, _), each in zip(plan, said, strict=True)]


def state(live: Live) -> dict[str, int]:
    """Whatever could leak."""
    gc.collect()
    return {
        "descriptors": psutil.Process().num_fds(),
        "threads": sum(1 for thread in threading.enumerate() if "AnyIO" not in thread.name),
        "tasks": len(asyncio.all_tasks(live.loop)),
        "seats": live.engine.inside,
        "rows": len(live.engine.batch.rows),
        "cache": live.engine.batch.cache.bytes,
        "users": sum(entry.users for entry in live.engine.registry.entries),
        "retired": live.engine.registry.retired,
        "adapters": len(live.engine.registry.bank.members),
        "tickets": len(live.engine._running) + live.engine.waiting,
    }


def at_least(found: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """`found`, but for descriptors that were open before and have been closed: they are no leak."""
    return {**found, "descriptors": max(found["descriptors"], before["descriptors"])}


def test_nobody_gets_anothers_answer_and_nothing_stays_behind(start: Starter) -> None:
    live = start(limits=Limits(answers=16, waiting=256))
    with httpx.Client(base_url=live.url, headers=HEADERS, timeout=60) as client:
        assert client.post("/v1/chat/completions", json=body("alpha", 1, False)).status_code == 200
    assert live.settled()
    time.sleep(0.2)
    expected, before = solo(live), state(live)
    assert before["rows"] == before["cache"] == before["seats"] == before["users"] == 0
    said = asyncio.run(everyone(live))
    assert live.settled(), state(live)
    ended = [each for each in said if each[3]]
    assert len(ended) >= CLIENTS // 2 and len({model for model, *_ in ended}) == 5
    for model, number, text, whole in said:
        assert set(text) <= set(LETTERS[model]), (model, text)
        answer = expected[model, number % 10]
        assert text == answer if whole else answer.startswith(text)
    end = time.monotonic() + 20
    while (after := at_least(state(live), before)) != before and time.monotonic() < end:
        time.sleep(0.1)
    assert after == before
    text = live.metrics.text().decode()
    assert 'tunesmith_prompts_total{model="alpha",outcome="answered"}' in text
    assert 'outcome="cancelled"' in text and 'outcome="failed"' not in text


def test_who_leaves_without_having_streamed_is_missed_too(live) -> None:
    """The connection alone says it: nothing is written to it before the answer is whole."""

    def cancelled() -> float:
        return live.metrics.prompts.labels("alpha", "cancelled")._value.get()

    at, before = urlsplit(live.url), cancelled()
    question = json.dumps({**body("alpha", 1, False), "max_tokens": 400}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection((at.hostname, at.port), timeout=20) as line:
        line.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(question)}\r\n\r\n".encode() + question
        )
        end = time.monotonic() + 20
        while not live.engine.batch.rows and time.monotonic() < end:
            time.sleep(0.001)
    assert live.settled() and cancelled() == before + 1


def test_who_never_reads_does_not_keep_his_seat(engine, monkeypatch, caplog) -> None:
    """Writing blocks for ever: the answer's time and a little more, and what it held is free."""
    from contextlib import ExitStack

    from tunesmith.serve import stream

    async def pieces(*_):
        yield b"data: {}\n\n"

    async def send(_) -> None:
        await asyncio.Event().wait()

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(stream, "events", pieces)
    held = ExitStack()
    held.enter_context(engine.seats(3))
    with engine.registry.using("alpha") as entry:
        reply = stream.EventStream(stream.Call(engine, entry, [], None), None, None, False, held)  # type: ignore[arg-type]
    assert reply.seconds > engine.limits.request_seconds and engine.inside == 3
    reply.seconds = 0.1
    asyncio.run(reply({"type": "http"}, receive, send))
    assert engine.inside == 0 and "did not read its answer" in caplog.text
