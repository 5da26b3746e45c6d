"""What every request passes before the application sees it: host, key, and a body that is read here and bounded.

    request -> [ key, or without one a loopback host and origin ] -> [ body <= 1 MiB within 30 s ] -> application

Only /health needs no key. Keys are compared as digests, in constant time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tunesmith.errors import ConfigError, RequestError
from tunesmith.serve.answers import error_body

BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
SHORTEST_KEY = 16
OPEN = ("/health",)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def check_address(host: str, key: str | None) -> None:
    """Raise ConfigError for an address that others can reach without a key, and for a key that can be guessed."""
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError(
            f"--api-key: give at least {SHORTEST_KEY} printable ASCII characters without spaces, for example from: "
            "openssl rand -hex 24"
        )
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: others can reach this address, so a key is needed: set TUNESMITH_API_KEY, or give "
            "--api-key-file; or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Is it this machine alone that can reach `host`?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """The application behind these checks. `key` None: for loopback alone.

    `password`: a browser may send the key as the password of any user (HTTP Basic), which it asks for by itself.
    """

    def __init__(
        self,
        app: App,
        key: str | None = None,
        *,
        password: bool = False,
        body_bytes: int = BODY_BYTES,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self.app, self.body_bytes, self.body_seconds = app, body_bytes, body_seconds
        self._password = password
        self._key = None if key is None else _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI. Anything but HTTP, such as a websocket, is closed."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            if scope["path"] not in OPEN:
                self._admit(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.body_seconds)
        except TimeoutError:
            await _refuse(send, RequestError("the body did not come in time", 408, "timeout"))
        except RequestError as error:
            await _refuse(send, error, "Basic" if self._password else "Bearer")
        else:
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)

    def _admit(self, scope: Message) -> None:
        headers = _headers(scope)
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if self._password and scheme.lower() == b"basic":
                scheme, given = b"bearer", _password(given)
            given = scheme.lower().capitalize() + b" " + given.strip()
            if not hmac.compare_digest(_digest(given), self._key):
                raise RequestError("the key is missing or wrong: send it as Authorization: Bearer KEY", 401, "no_key")
            return
        # Without a key, a page in this machine's browser must not get here by another name or from another site.
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(_name(host)):
            raise RequestError("this server answers to localhost only; start it with a key for others", 403, "host")
        origin = headers.get(b"origin")
        if origin is not None and not is_loopback(_name(origin.decode("latin-1").partition("://")[2])):
            raise RequestError("this server answers no pages of other sites; start it with a key", 403, "origin")

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone. Raises RequestError (413) as soon as it is too large."""
        said = _headers(scope).get(b"content-length", b"")
        body = bytearray()
        if said.isdigit() and int(said[:20]) > self.body_bytes:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(f"the body is larger than {self.body_bytes} bytes, which is the limit", 413, "too_large")


def _headers(scope: Message) -> dict[bytes, bytes]:
    """The last of each name: a second one cannot be hidden behind the first."""
    return {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}


def _name(address: str) -> str:
    """host:port or [address]:port without the port."""
    if address.startswith("["):
        return address.partition("]")[0][1:]
    return address.rpartition(":")[0] if address.count(":") == 1 else address


def _password(given: bytes) -> bytes:
    """Of `user:password` in base64; empty where it is none."""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once; after it, wait as before for the client to go."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message


async def _refuse(send: Send, error: RequestError, scheme: str = "Bearer") -> None:
    text = json.dumps(error_body(str(error), error.status, error.code)).encode("ascii")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    headers += [(b"connection", b"close")] if error.status in (408, 413) else []
    asked = f'{scheme} realm="tunesmith", charset="UTF-8"' if scheme == "Basic" else scheme
    headers += [(b"www-authenticate", asked.encode())] if error.status == 401 else []
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
