"""OpenAI's API over an engine: models, chat and plain completions, whole or streamed; adapters loaded and removed.

request -> Guard (host, key, size) -> read strictly (requests.py) -> prompt by the model's own template
        -> engine -> reply (answers.py), whole or as events (stream.py)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith import __version__
from tunesmith.errors import RequestError, ResourceError, TunesmithError, did_you_mean
from tunesmith.inference.batch import Ask
from tunesmith.serve.answers import Json, Reply, error_body
from tunesmith.serve.engine import Engine
from tunesmith.serve.guard import BODY_BYTES, BODY_SECONDS, App, Guard
from tunesmith.serve.metrics import CONTENT_TYPE, Metrics, counted
from tunesmith.serve.registry import BASE, Entry
from tunesmith.serve.requests import AdapterRequest, ChatRequest, CompletionRequest
from tunesmith.serve.stream import Call, EventStream, whole


@dataclass(frozen=True)
class Options:
    """How a server answers what requests leave open, and how it is guarded.

    `key`: what clients must send (None: for this machine alone, and adapters stay as they are).
    """

    key: str | None = None
    max_new_tokens: int = 512
    temperature: float = 1.0
    body_bytes: int = BODY_BYTES
    body_seconds: float = BODY_SECONDS


class AsciiJson(JSONResponse):
    """JSON in ASCII: whatever a text holds, it can be sent."""

    def render(self, content: Any) -> bytes:
        """See JSONResponse."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for status, about in {
        400: "What was asked cannot be.",
        401: "The key is missing or wrong.",
        403: "Not from here, or not without a key.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        409: "The name is taken.",
        413: "The body is too large.",
        429: "Too much waits already.",
        503: "Waited too long, or the server is stopping.",
        504: "Not finished in time.",
    }.items()
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers, whole; or piece by piece with `stream`.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


def create_app(engine: Engine, options: Options | None = None, metrics: Metrics | None = None) -> App:
    """The ASGI application, guarded; the caller starts and closes the engine."""
    options, metrics = options or Options(), metrics or Metrics()
    metrics.watch(engine)
    app = FastAPI(title="Tunesmith", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    _add_reading(app, engine, metrics)
    _add_answering(app, engine, options)
    _add_adapters(app, engine, options)
    _add_errors(app)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    guard = Guard(app, options.key, body_bytes=options.body_bytes, body_seconds=options.body_seconds)
    return counted(guard, metrics, paths)


def _add_reading(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    registry = engine.registry

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Does the server answer? Needs no key."""
        return AsciiJson({"status": "ok"}) if engine.alive else AsciiJson({"status": "stopped"}, 503)

    @app.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """The base and the adapters that can be asked, by name."""
        return AsciiJson({"object": "list", "data": [_model(entry, registry.name) for entry in registry.entries]})

    @app.get("/v1/models/{name}", response_model=None)
    async def model(name: str) -> Response:
        """One of them."""
        with registry.using(name) as entry:
            return AsciiJson(_model(entry, registry.name))


def _add_answering(app: FastAPI, engine: Engine, options: Options) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses=ANSWER)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation, by the template that the model was trained with."""
        settings = asked.settings(asked.most(options.max_new_tokens), options.temperature)
        messages = [message.plain() for message in asked.messages]
        more = {"n": asked.answers, "logprobs": bool(asked.logprobs), "likeliest": asked.top_logprobs or 0}

        def asks(entry: Entry) -> list[Ask]:
            picture = None if asked.image is None else engine.registry.see(entry, asked.image, "messages")
            return [engine.ask(entry, entry.chat(messages, picture), settings, **more)]

        return await _answer(engine, request, asked, asks, 1, True)

    @app.post("/v1/completions", response_model=None, responses=ANSWER)
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        """Go on from a text or from token ids, without a template."""
        settings = asked.settings(asked.most(), options.temperature)
        more = {"n": asked.answers, "logprobs": asked.logprobs is not None, "likeliest": asked.logprobs or 0}

        def asks(entry: Entry) -> list[Ask]:
            prompts = [entry.text(each) if isinstance(each, str) else entry.ids(each) for each in asked.prompts]
            return [engine.ask(entry, prompt, settings, plain=True, **more) for prompt in prompts]

        return await _answer(engine, request, asked, asks, len(asked.prompts), False)


def _add_adapters(app: FastAPI, engine: Engine, options: Options) -> None:
    registry = engine.registry

    def check_key() -> None:
        if options.key is None:
            raise RequestError("adapters change only under a key; start the server with one", 403, "no_key")

    @app.get("/v1/adapters", response_model=None)
    async def adapters() -> Response:
        """The adapters that are loaded, and those that could be."""
        check_key()
        loaded = [_model(entry, registry.name) for entry in registry.entries if entry.seams]
        return AsciiJson({"object": "list", "data": loaded, "loadable": await to_thread.run_sync(registry.loadable)})

    @app.post("/v1/adapters", response_model=None)
    async def load(asked: AdapterRequest) -> Response:
        """Load an adapter from the server's folder of adapters by its name, or load it anew."""
        check_key()
        entry = await asyncio.wrap_future(engine.call(lambda: registry.add(asked.name)))
        return AsciiJson(_model(entry, registry.name))

    @app.delete("/v1/adapters/{name}", response_model=None)
    async def remove(name: str) -> Response:
        """Remove an adapter; requests that use it are answered to their end."""
        check_key()
        entry = await asyncio.wrap_future(engine.call(lambda: registry.remove(name)))
        return AsciiJson({"id": entry.name, "object": "model", "deleted": True})


async def _answer(
    engine: Engine,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    asks: Callable[[Entry], Sequence[Ask]],
    prompts: int,
    chat: bool,
) -> Response:
    """Read the prompts aside, put them to the engine, and reply as asked. Raises TunesmithError."""
    with ExitStack() as held:
        held.enter_context(engine.seats(prompts))
        entry = held.enter_context(engine.registry.using(asked.model))
        made = await to_thread.run_sync(asks, entry)
        call = Call(engine, entry, made, request)
        held.callback(call.close)
        count, read = sum(ask.n for ask in made), sum(len(ask.prompt) for ask in made)
        reply = Reply(entry, chat, count, read, made[0].job.logprobs, engine.registry.fingerprint)
        call.begin()
        if not asked.stream:
            return AsciiJson((await whole(call, reply)).whole())
        first = await call.next()  # so that what goes wrong before it still has a status of its own
        return EventStream(call, reply, first, asked.with_usage, held.pop_all())


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        status, code = 400, "invalid_request"
        if isinstance(error, RequestError):
            status, code = error.status, error.code
        elif isinstance(error, ResourceError):
            status, code = 503, "resources"
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return AsciiJson(error_body(_shown(error), status, code), status, headers)

    async def invalid(_: Request, error: Exception) -> Response:
        faults = error.errors() if isinstance(error, RequestValidationError) else []
        # Of a union's faults, the deepest is of the type that was meant.
        found: Any = max(faults, key=lambda fault: len(fault.get("loc", ())), default={})
        message, param = _invalid(found)
        return AsciiJson(error_body(message, 400, "invalid_request", param), 400)

    async def http(_: Request, error: Exception) -> Response:
        status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
        return AsciiJson(error_body(_shown(getattr(error, "detail", error)), status), status, headers)

    async def unforeseen(_: Request, error: Exception) -> Response:
        return AsciiJson(error_body("the server failed on this request; see its log", 500, "failed"), 500)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        TunesmithError: refused,
        RequestValidationError: invalid,
        HTTPException: http,
        Exception: unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _invalid(found: Any) -> tuple[str, str | None]:
    """One line for one fault of a request, and the field."""
    place = [str(part) for part in found.get("loc", ())[1:] if isinstance(part, int) or part.isidentifier()]
    field = ".".join(place) or None
    message = str(found.get("msg", "not understood")).removeprefix("Value error, ")
    if found.get("type") == "extra_forbidden" and place:
        known = {**ChatRequest.model_fields, **CompletionRequest.model_fields, **AdapterRequest.model_fields}
        message = f"unknown field{did_you_mean(place[-1], known)}"
    named = found.get("type") == "value_error"  # these begin with the field's name themselves
    return _shown(message if named or field is None else f"{field}: {message}"), field


def _shown(error: object) -> str:
    return " ".join(str(error).split())[:1000]


def _model(entry: Entry, base: str) -> Json:
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "tunesmith",
        "root": base,
        "parent": None if entry.kind == BASE else base,
        "kind": entry.kind,
        "version": entry.version,
    }


def _document(app: FastAPI) -> Json:
    """The OpenAPI document: FastAPI's, with the errors as they are and the key."""
    from fastapi.openapi.utils import get_openapi

    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        text = {"type": ["string", "null"]}
        fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
        error = {"type": "object", "required": ["message"], "properties": fields}
        schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": error}}
        for path, methods in found["paths"].items():
            for method in methods.values():
                method["responses"].pop("422", None)
                if path == "/health":
                    method["security"] = []
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
