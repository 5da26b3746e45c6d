"""From a loaded base to a server that listens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Literal

import uvicorn

from tunesmith.errors import ConfigError
from tunesmith.serve.api import Options, create_app
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.guard import check_address
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.registry import Registry

GRACE_SECONDS = 10  # what is being answered may still end after a stop is asked for


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises ConfigError where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None


def run(registry: Registry, host: str, port: int, options: Options, limits: Limits, say: Callable[[str], None]) -> None:
    """Answer until a signal ends it. Raises ConfigError for an address that is taken, or open to others without a key.

    `say` is told where the server listens once it does.
    """
    check_address(host, options.key)
    metrics = Metrics()
    with listen(host, port) as door:
        engine = Engine(registry, limits, metrics).start()
        try:
            server = uvicorn.Server(config(create_app(engine, options, metrics), limits))
            say(f"listening on http://{shown_host(host)}:{door.getsockname()[1]}/v1 (Ctrl-C stops)")
            server.run(sockets=[door])
        finally:
            engine.close()


def shown_host(host: str) -> str:
    """As it is written in an address."""
    return f"[{host}]" if ":" in host else host


def config(app: object, limits: Limits, lifespan: Literal["on", "off"] = "off") -> uvicorn.Config:
    """uvicorn's settings: no access log, no banner, and not more connections than can matter."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan=lifespan,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
        limit_concurrency=4 * (limits.answers + limits.waiting) + 64,
    )
