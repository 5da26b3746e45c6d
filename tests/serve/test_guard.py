"""What a server refuses, with which status and which words; and that no input makes it fail."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from tests.serve.conftest import KEY, Live, Starter

from tunesmith.errors import ConfigError
from tunesmith.serve.guard import Guard, check_address, is_loopback

httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")
BEARER = {"Authorization": f"Bearer {KEY}"}
ROUTES = [
    ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/alpha"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/alpha"),
    ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("PATCH", "/v1/models"), ("GET", "//health"),
    ("GET", "/health/"), ("GET", "/v1/models/..%2f..%2fhealth"),
]  # fmt: skip


def chat(live: Live, body: object, **more) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **BEARER}
    return httpx.post(f"{live.url}/v1/chat/completions", content=content, headers=headers, timeout=30, **more)


def asked(**changes) -> dict:
    return {"model": "alpha", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2, **changes}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "10.0.0.1", ""])
def test_beyond_loopback_only_with_a_key(host) -> None:
    with pytest.raises(ConfigError, match="a key is needed: set TUNESMITH_API_KEY"):
        check_address(host, None)
    check_address(host, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host) -> None:
    check_address(host, None)
    assert is_loopback(host)


@pytest.mark.parametrize(
    "key", ["short", "x" * 15, "with a space in it", "umlaut-ä-0123456789", "line\nbreak0123456789"]
)
def test_a_key_that_is_none(key) -> None:
    with pytest.raises(ConfigError, match="at least 16 printable ASCII characters"):
        check_address("127.0.0.1", key)


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong-key-0123456789", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer"]
)
def test_without_the_key_nothing_but_health(live, given) -> None:
    headers = {} if given is None else {"Authorization": given}
    with httpx.Client(base_url=live.url, headers=headers) as client:
        for method, path in ROUTES:
            reply = client.request(method, path)
            assert reply.status_code == 401, (method, path)
            assert reply.json()["error"]["message"].startswith("the key is missing or wrong")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").json() == {"status": "ok"}


def test_with_the_key_routes_answer(live) -> None:
    with httpx.Client(base_url=live.url, headers={"authorization": f"bearer {KEY}"}) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/nowhere").status_code == 404 and client.get("/docs").status_code == 404
        assert client.patch("/v1/models").status_code == 405
        text = client.get("/metrics").text
    assert 'tunesmith_responses_total{route="/v1/models",status="200"}' in text
    assert 'status="401"' in text and "tunesmith_cache_bytes" in text


def test_the_key_is_compared_in_constant_time(monkeypatch) -> None:
    """Every comparison is hmac's, of digests of one length: nothing of the key is told by time."""
    seen: list[tuple[bytes, bytes]] = []
    guard = Guard(lambda *_: None, KEY)  # type: ignore[arg-type]
    monkeypatch.setattr("tunesmith.serve.guard.hmac.compare_digest", lambda a, b: seen.append((a, b)) or False)

    async def ask(header: bytes) -> int:
        sent: list[dict] = []

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", header)]}
        await guard(scope, None, send)  # type: ignore[arg-type]
        return sent[0]["status"]

    for header in (b"", b"Bearer x", b"Bearer " + KEY.encode(), b"Bearer " + b"x" * 10_000):
        assert asyncio.run(ask(header)) == 401
    assert len(seen) == 4 and {len(each) for pair in seen for each in pair} == {32}


WRONG = {
    "n of 1000": (asked(n=1000), "n: Input should be less than or equal to 8"),
    "n of 0": (asked(n=0), "n: Input should be greater than or equal to 1"),
    "a template": (asked(chat_template="{{ 1 }}"), "a template in a request is never used"),
    "a template's words": (asked(chat_template_kwargs={"a": 1}), "a template in a request is never used"),
    "tools": (asked(tools=[{"type": "function"}]), "tools: not supported here"),
    "a penalty": (asked(presence_penalty=0.5), "presence_penalty: not supported here"),
    "an image": (
        asked(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]),
        "image_url: give the image itself",
    ),
    "a role": (asked(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
    "an unknown field": (asked(temprature=1), "temprature: unknown field; did you mean 'temperature'"),
    "no message": (asked(messages=[]), "messages: List should have at least 1 item"),
    "text for a number": (asked(temperature="1"), "temperature: Input should be a valid number"),
    "a hot temperature": (asked(temperature=3), "temperature: Input should be less than or equal to 2"),
    "an empty stop": (asked(stop=[""]), "stop"),
    "stream options alone": (asked(stream_options={"include_usage": True}), "no effect without stream"),
    "two lengths": (asked(max_completion_tokens=3), "max_tokens: differs from max_completion_tokens"),
    "alternatives alone": (asked(top_logprobs=2), "top_logprobs: has no effect without logprobs"),
    "a surrogate": (b'{"model": "alpha", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
    "not a number": (b'{"model": "alpha", "messages": [], "temperature": NaN}', ""),
    "no JSON": (b"{", "JSON"),
    "no object": (b"[]", ""),
    "depth": (b"[" * 200_000, ""),
    "a long number": (b'{"seed": ' + b"9" * 5000 + b"}", ""),
    "nothing": (b"", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_one_line(live, name) -> None:
    body, words = WRONG[name]
    reply = chat(live, body)
    message = reply.json()["error"]["message"]
    assert reply.status_code == 400 and words in message and "\n" not in message and len(message) <= 1000
    assert live.engine.inside == 0


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "/etc/passwd", "alpha/../beta", "", "nobody", "a\x00b", "ä" * 500]
)
def test_a_model_that_is_not_there(live, name) -> None:
    reply = chat(live, asked(model=name))
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    assert "there is no model" in reply.json()["error"]["message"]
    assert 'model="nobody"' not in live.metrics.text().decode(), "names that clients make up are counted nowhere"


def test_bodies_are_bounded_while_they_are_read(live) -> None:
    """A megabyte is read; one byte more is refused: by its announced length at once, and by counting without one."""
    fitting = asked(messages=[{"role": "user", "content": "x"}], metadata={"pad": ""})
    room = (1 << 20) - len(json.dumps(fitting))
    fitting["metadata"]["pad"] = "x" * room
    assert len(json.dumps(fitting)) == 1 << 20 and chat(live, fitting).status_code == 200
    assert chat(live, json.dumps(fitting).encode() + b" ").status_code == 413
    sent = _chunks(live, 1 << 16, 64)
    assert sent[0].startswith(b"HTTP/1.1 413") and sent[1] < 64, "refused before all of it was sent"


def _chunks(live: Live, size: int, count: int) -> tuple[bytes, int]:
    """Send a body in chunks until the server answers: what it says, and how many it took."""
    at = urlsplit(live.url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((at.hostname, at.port), timeout=20) as line:
        line.sendall(head.encode())
        for number in range(count):
            line.setblocking(False)
            try:
                if answer := line.recv(1 << 16):
                    return answer, number
            except BlockingIOError:
                pass
            line.setblocking(True)
            try:
                line.sendall(f"{size:x}\r\n".encode() + b"x" * size + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                return line.recv(1 << 16), number
            time.sleep(0.01)
        return line.recv(1 << 16), count


def test_a_body_that_never_comes_is_given_up(start: Starter) -> None:
    live = start(names=(), body_seconds=0.3)
    at = urlsplit(live.url)
    with socket.create_connection((at.hostname, at.port), timeout=20) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
        line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert line.recv(1 << 16).startswith(b"HTTP/1.1 408")


@pytest.fixture(scope="module")
def keyless(start: Starter) -> Live:
    """A server without a key, as on a desk."""
    return start(None, names=("alpha",))


def test_without_a_key_only_this_machine_is_answered(keyless) -> None:
    port = urlsplit(keyless.url).port
    for headers, status in [
        ({}, 200),
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": f"http://127.0.0.1:{port}"}, 200),
    ]:
        assert httpx.get(f"{keyless.url}/v1/models", headers=headers).status_code == status, headers


def test_without_a_key_adapters_stay_as_they_are(keyless) -> None:
    with httpx.Client(base_url=keyless.url) as client:
        for reply in (
            client.post("/v1/adapters", json={"name": "beta"}),
            client.delete("/v1/adapters/alpha"),
            client.get("/v1/adapters"),
        ):
            assert reply.status_code == 403 and "only under a key" in reply.json()["error"]["message"]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny-base", "alpha"]


def test_adapters_are_loaded_and_removed_under_the_key(start: Starter) -> None:
    live = start(names=("alpha",))
    with httpx.Client(base_url=live.url, headers=BEARER, timeout=30) as client:
        found = client.get("/v1/adapters").json()
        assert [model["id"] for model in found["data"]] == ["alpha"]
        assert found["loadable"] == ["alpha", "beta", "delta", "gamma"]
        assert client.post("/v1/adapters", json={"name": "gamma"}).json()["version"] == 1
        assert client.post("/v1/adapters", json={"name": "alpha"}).json()["version"] == 2
        told = client.post("/v1/chat/completions", json=asked(model="gamma")).json()
        assert set(told["choices"][0]["message"]["content"]) <= set("ijkl")
        for name, status in [("../alpha", 400), ("nobody", 404), ("base", 409), ("tiny-base", 409), ("", 400)]:
            assert client.post("/v1/adapters", json={"name": name}).status_code == status, name
        assert client.delete("/v1/adapters/alpha").json()["deleted"] is True
        assert client.delete("/v1/adapters/alpha").status_code == 404
        assert client.delete("/v1/adapters/base").status_code == 409
        assert client.post("/v1/chat/completions", json=asked(model="alpha")).status_code == 404


def test_a_full_queue_answers_429(start: Starter) -> None:
    live = start(names=("alpha",))
    with httpx.Client(base_url=live.url, headers=BEARER, timeout=30) as client:
        with live.engine.seats(live.engine.limits.answers + live.engine.limits.waiting):
            reply = client.post("/v1/chat/completions", json=asked())
            assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
            assert client.get("/health").status_code == 200
        assert client.post("/v1/chat/completions", json=asked()).status_code == 200
        live.engine.close()
        assert client.get("/health").status_code == 503
        assert client.post("/v1/chat/completions", json=asked()).status_code == 503
