"""One HTTP request on the engine: what other threads say arrives in the event loop, and ends when the client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tunesmith.errors import TunesmithError
from tunesmith.inference.batch import Ask, Said
from tunesmith.serve.answers import DONE, Reply, error_body, event
from tunesmith.serve.engine import Engine, Event, Ticket
from tunesmith.serve.registry import Entry

Numbered = tuple[int, Event]
SLACK_SECONDS = 30.0
logger = logging.getLogger(__name__)


class Call:
    """The prompts of one request. Answers are numbered prompt by prompt; `close` cancels what has not ended."""

    def __init__(self, engine: Engine, entry: Entry, asks: Sequence[Ask], request: Request) -> None:
        self.engine, self.entry, self.asks, self.request = engine, entry, asks, request
        self._events: asyncio.Queue[Numbered] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._watch: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Hand the prompts to the engine, and watch for the client to go. Raises RequestError."""
        loop, first = asyncio.get_running_loop(), 0
        for ask in self.asks:

            def deliver(event: Event, first: int = first) -> None:
                number = first + (event.number if isinstance(event, Said) else 0)
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

            self._tickets.append(self.engine.submit(self.entry, ask, deliver))
            first += ask.n
        self._watch = loop.create_task(self._until_gone())

    async def next(self) -> tuple[int, Said]:
        """The number of an answer and what it gained. Raises the error that ended a prompt."""
        number, happened = await self._events.get()
        if isinstance(happened, TunesmithError):
            raise happened
        return number, happened

    def close(self) -> None:
        """Nobody listens any more."""
        if self._watch is not None:
            self._watch.cancel()
        for ticket in self._tickets:
            self.engine.cancel(ticket)

    async def _until_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        for ticket in self._tickets:
            self.engine.cancel(ticket)


class EventStream(StreamingResponse):
    """A reply as server-sent events. `held` is let go of however it ends, even before it began.

    A client that does not read has SLACK_SECONDS more than the answer: then the connection is given up.
    """

    def __init__(self, call: Call, reply: Reply, first: tuple[int, Said], with_usage: bool, held: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events(call, reply, first, with_usage), media_type="text/event-stream", headers=headers)
        self._close: Callable[[], None] = held.close
        self.seconds = call.engine.limits.request_seconds + SLACK_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            async with asyncio.timeout(self.seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client did not read its answer within %g s; its connection was closed", self.seconds)
        finally:
            self._close()


async def events(call: Call, reply: Reply, first: tuple[int, Said], with_usage: bool) -> AsyncIterator[bytes]:
    """The reply piece by piece. An error ends it as an event of its own: the status has been sent."""
    for opening in reply.opening():
        yield event(opening)
    index, said = first
    while True:
        reply.take(index, said)
        if (piece := reply.piece(index, said)) is not None:
            yield event(piece)
        if not reply.open:
            break
        try:
            index, said = await call.next()
        except TunesmithError as error:
            yield event(error_body(str(error), getattr(error, "status", 500), getattr(error, "code", None)))
            return
    if with_usage:
        yield event(reply.last())
    yield DONE


async def whole(call: Call, reply: Reply) -> Reply:
    """The reply when all of its answers have ended. Raises TunesmithError."""
    while reply.open:
        reply.take(*await call.next())
    return reply
