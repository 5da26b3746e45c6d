"""From a loaded base to a page that can be opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import uvicorn

from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.guard import check_address
from tunesmith.serve.registry import Registry
from tunesmith.serve.start import config, listen, shown_host
from tunesmith.serve.ui.jobs import Jobs
from tunesmith.serve.ui.page import Options, create_page


def run(registry: Registry, host: str, port: int, options: Options, limits: Limits, say: Callable[[str], None]) -> None:
    """Serve the page until a signal ends it; a command that it started is stopped then, as Ctrl-C would.

    Raises ConfigError for an address that is taken, or open to others without a key. `say` is told where the page is.
    """
    check_address(host, options.key)
    jobs = Jobs(Path.cwd())
    with listen(host, port) as door:
        engine = Engine(registry, limits).start()
        try:
            servers: list[uvicorn.Server] = []
            app = create_page(engine, options, jobs, lambda: any(server.should_exit for server in servers))
            servers.append(server := uvicorn.Server(config(app, limits, "on")))
            user = "" if options.key is None else ", any user name, the key as password"
            say(f"open http://{shown_host(host)}:{door.getsockname()[1]}/ in a browser{user} (Ctrl-C stops)")
            server.run(sockets=[door])
        finally:
            engine.close()
            jobs.stop()
