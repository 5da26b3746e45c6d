"""The page: four tabs over one engine, and the application that serves it behind the server's guard.

browser -> Guard (host, key, size) -> Fenced (closed routes; a policy that lets nothing else be fetched) -> Gradio
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, on the next line

import gradio as gr
from fastapi import FastAPI

from tunesmith.serve.engine import Engine
from tunesmith.serve.guard import App, Guard, Message, Receive, Send
from tunesmith.serve.ui.chat_tab import chat_tab
from tunesmith.serve.ui.jobs import Jobs
from tunesmith.serve.ui.parts import HIDDEN
from tunesmith.serve.ui.runs_tab import runs_tab
from tunesmith.serve.ui.sides_tab import sides_tab
from tunesmith.serve.ui.talk import choices
from tunesmith.serve.ui.train_tab import train_tab

# What a browser may do on the page: nothing from elsewhere, and no script in an attribute of an element.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
# Routes of Gradio that the page has no use for: no file of the server and no address is fetched for a client.
CLOSED = ("/file", "/proxy", "/stream", "/component_server", "/deep_link", "/vibe", "/monitoring", "/login")
BODY_BYTES = 16 << 20  # an image as a camera makes it
LOOK_EVERY = 0.5  # seconds
UPLOAD_SECONDS = 3600  # that an uploaded image is kept
STYLE = """
.told { min-height: 1.5em; opacity: .8; overflow-wrap: anywhere }
.turns { height: 55vh; overflow-y: auto; display: flex; flex-direction: column-reverse; border-radius: 6px;
 padding: .8rem; border: 1px solid var(--border-color-primary) }
.turns .inside { margin-bottom: auto } .turns .none { margin: auto; opacity: .6 }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; max-width: 85%; margin: .4rem 0;
 padding: .5rem .8rem; border-radius: 10px;
 background: var(--background-fill-secondary); color: var(--body-text-color) }
.turn.user { margin-left: auto; background: var(--color-accent-soft) } .turn:empty::after { content: "\2026" }
iframe.report { width: 100%; height: 75vh; border: 0; background: white; color-scheme: light }
.side textarea, #said textarea { font-family: ui-monospace, monospace; font-size: .85rem }
"""


@dataclass(frozen=True)
class Options:
    """`runs`: folder that runs are looked for and made in; `model`: the base, as the form names it.

    `key`: the password that a browser asks for (None: for this machine alone).
    """

    runs: Path
    model: str
    max_new_tokens: int = 1024
    key: str | None = None
    streams: int = 64  # answers and followed commands at once, over all browsers


def build(engine: Engine, options: Options, jobs: Jobs) -> gr.Blocks:
    """Lay out the tabs."""
    kept = (UPLOAD_SECONDS, UPLOAD_SECONDS)
    with gr.Blocks(title="Tunesmith", analytics_enabled=False, fill_width=True, delete_cache=kept) as blocks:
        with gr.Tab("Chat"):
            one = chat_tab(engine, options.max_new_tokens)
        with gr.Tab("Side by side"):
            several = sides_tab(engine, options.max_new_tokens)
        with gr.Tab("Runs") as seen:
            runs_tab(seen, options.runs)
        with gr.Tab("Data and training") as training:
            said, follow = train_tab(jobs, options.runs, options.model)

        def known() -> tuple[gr.Dropdown, gr.Dropdown]:
            found = choices(engine)
            return gr.Dropdown(found), gr.Dropdown(found)

        blocks.load(known, None, [one, several], api_visibility=HIDDEN)
        training.select(follow, None, said, show_progress="hidden", api_visibility=HIDDEN)
    blocks.queue(default_concurrency_limit=options.streams, api_open=False)
    return blocks


def create_page(engine: Engine, options: Options, jobs: Jobs, stopping: Callable[[], bool] = lambda: False) -> App:
    """The ASGI application, guarded; the caller starts and closes the engine, and stops the jobs.

    `stopping`: is the server about to end? Then streams of pages that are open end too.
    """
    app = FastAPI(title="Tunesmith", docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Default(  # fonts of the machine: none is fetched
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    gr.mount_gradio_app(
        app, build(engine, options, jobs), path="/", footer_links=[], run_history=False, theme=theme, css=STYLE,
        ssr_mode=False, pwa=False, mcp_server=False, show_error=False, enable_monitoring=False,
        app_kwargs={"openapi_url": None},
    )  # fmt: skip
    return Guard(Fenced(app, stopping), options.key, password=True, body_bytes=BODY_BYTES)


class Fenced:
    """The application without its closed routes, each answer with HEADERS.

    An open page keeps streams that never end by themselves: once `stopping()`, they are told that nobody listens.
    """

    def __init__(self, app: App, stopping: Callable[[], bool]) -> None:
        self.app, self.stopping = app, stopping

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = ended = False

        async def with_headers(message: Message) -> None:
            nonlocal begun, ended
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        path = scope["path"].removeprefix("/gradio_api")
        if path.startswith(CLOSED):
            await with_headers({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, partial(self._receive, receive), with_headers)
        if begun and not ended:
            await send({"type": "http.response.body", "body": b""})

    async def _receive(self, receive: Receive) -> Message:
        coming = asyncio.ensure_future(receive())
        try:
            while not self.stopping():
                if (await asyncio.wait({coming}, timeout=LOOK_EVERY))[0]:
                    return coming.result()
            return {"type": "http.disconnect"}
        finally:
            coming.cancel()
