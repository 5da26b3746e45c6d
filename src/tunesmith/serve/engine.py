"""One thread that runs the model for everybody: it takes in what waits, steps the batch, and hands out what was said.

    any thread     submit -> [ waiting, first come first served ] -> [ running batch ] -> deliver(Said | error)
    the engine     calls (load, remove) -> cancelled and late ones out -> step -> admit -> ...

It knows nothing of HTTP: `say` is all that a program needs. What it is told by other threads passes through one lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from tunesmith.errors import GenerationError, RequestError, TunesmithError
from tunesmith.hardware import leave_cores
from tunesmith.inference.answers import Job
from tunesmith.inference.batch import PREFIX_BYTES, ROWS, Ask, RunningBatch, Said
from tunesmith.inference.generate import CACHE_BYTES, evaluation_mode
from tunesmith.inference.sample import GenerationSettings
from tunesmith.serve.registry import Entry, Registry

T = TypeVar("T")
Event = Said | TunesmithError
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one server takes on. Times in seconds; `answers` generated at once, `waiting` prompts beyond them."""

    answers: int = ROWS
    waiting: int = 256
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    cache_bytes: int = CACHE_BYTES
    prefix_bytes: int = PREFIX_BYTES


class Meter(Protocol):
    """Is told what happens; called on the engine's thread."""

    def stepped(self, rows: int, seconds: float) -> None:
        """One step of the batch."""

    def began(self, model: str, seconds: float) -> None:
        """The first token of a prompt's answers came so long after the request."""

    def ended(self, model: str, outcome: str, prompt: int, known: int, generated: int, seconds: float) -> None:
        """A prompt was answered, or not: tokens read, those of them that were known, and tokens generated."""


class NoMeter:
    """Counts nothing."""

    def stepped(self, rows: int, seconds: float) -> None:
        """See Meter."""

    def began(self, model: str, seconds: float) -> None:
        """See Meter."""

    def ended(self, model: str, outcome: str, prompt: int, known: int, generated: int, seconds: float) -> None:
        """See Meter."""


@dataclass(eq=False)
class Ticket:
    """One prompt on its way; `deliver` is given every Said, and an error where it ends with one."""

    entry: Entry
    ask: Ask
    deliver: Callable[[Event], None]
    came: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    checked: bool = False
    running: bool = False
    began: bool = False
    open: set[int] = field(default_factory=set)  # answers that have not ended
    generated: int = 0
    known: int = 0


class Engine:
    """Runs `registry`'s model within `limits`. `start` it, and `close` it at the end."""

    def __init__(self, registry: Registry, limits: Limits | None = None, meter: Meter | None = None) -> None:
        self.registry, self.limits = registry, limits or Limits()
        self.meter: Meter = meter or NoMeter()
        own = self.limits
        self.batch = RunningBatch(
            registry.model, most=own.answers, cache_bytes=own.cache_bytes, prefix_bytes=own.prefix_bytes
        )
        self._wake = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._waiting: list[Ticket] = []
        self._running: dict[Ask, Ticket] = {}
        self._inside = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)

    def start(self) -> Engine:
        """Begin to answer. Whoever calls this has loaded the model, and computes no more."""
        leave_cores()
        self._thread.start()
        return self

    def close(self, seconds: float = 10.0) -> None:
        """Stop; whoever waits or is being answered is told."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Does it answer?"""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Prompts that wait to be read."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Prompts that have a seat, from their arrival to their end."""
        return self._inside

    @contextmanager
    def seats(self, count: int = 1) -> Iterator[None]:
        """Room for so many prompts, from before they are read until they are answered. Raises RequestError (429)."""
        most = self.limits.waiting + self.limits.answers
        with self._wake:
            if self._inside + count > most:
                raise RequestError(
                    f"{self._inside} prompts are being answered or wait, and there is room for {most}: try again later",
                    429,
                    "too_many_requests",
                )
            self._inside += count
        try:
            yield
        finally:
            with self._wake:
                self._inside -= count

    def submit(self, entry: Entry, ask: Ask, deliver: Callable[[Event], None]) -> Ticket:
        """Put a prompt into the queue. The caller has a seat, and `entry` from `Registry.using`, until it ends.

        `deliver` is called on the engine's thread and must return at once. Raises RequestError (503) when closed.
        """
        ticket = Ticket(entry, ask, deliver, open=set(range(ask.n)))
        with self._wake:
            if self._closing or not self.alive:
                raise RequestError("the server is stopping", 503, "stopping")
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the answer any more: its slots are free before the next step."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have `work`, which may change the model, done between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._closing or not self.alive:
                raise RequestError("the server is stopping", 503, "stopping")
            self._calls.append(run)
            self._wake.notify()
        return future

    def ask(self, entry: Entry, prompt: Sequence[int], settings: GenerationSettings, **more: Any) -> Ask:
        """A prompt for this model; `more` as for `Ask`, and logprobs. `plain`: without its template's stop strings."""
        stop = tuple(dict.fromkeys((*settings.stop, *(() if more.pop("plain", False) else entry.template.stop))))
        tokenizer = entry.tokenizer
        job = Job(
            entry.model, settings.changed(stop=stop), frozenset(tokenizer.eos_ids), tokenizer, entry.seams,
            more.pop("logprobs", False),
        )  # fmt: skip
        return Ask(prompt, job, key=entry.key, **more)

    def say(self, model: str, messages: Sequence[Mapping[str, Any]], settings: GenerationSettings) -> Iterator[Said]:
        """Answer a conversation, piece by piece; closing the iterator stops the answer. Raises TunesmithError."""
        with closing(self.each([model], lambda entry: entry.chat(messages), settings)) as events:
            for _, said in events:
                yield said

    def each(
        self, models: Sequence[str], prompt: Callable[[Entry], Sequence[int]], settings: GenerationSettings
    ) -> Generator[tuple[int, Said]]:
        """The answers of several models at once, in one batch: (which of them, its next piece), as they come.

        `prompt` gives the tokens for each. Closing the generator stops them all. Raises TunesmithError, the first.
        """
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        with self.seats(len(models)), ExitStack() as held:
            for number, model in enumerate(models):
                entry = held.enter_context(self.registry.using(model))
                ask = self.ask(entry, prompt(entry), settings)
                ticket = self.submit(entry, ask, partial(_put, events, number))
                held.callback(self.cancel, ticket)
            left = len(models)
            while left:
                number, event = events.get()
                if isinstance(event, TunesmithError):
                    raise event
                yield number, event
                left -= event.result is not None

    def _run(self) -> None:
        with evaluation_mode(self.registry.model):
            try:
                while self._turn():
                    pass
            finally:
                with self._wake:
                    self._closing = True
                    left = [*self._running.values(), *self._waiting]
                    calls, self._calls = self._calls, []
                self.batch.clear()
                for ticket in left:
                    self._fail(ticket, RequestError("the server is stopping", 503, "stopping"), "stopped")
                for call in calls:
                    call()

    def _turn(self) -> bool:
        """Once around; False at the end."""
        with self._wake:
            while not (self._closing or self._calls or self._waiting or self._running or self.registry.retired):
                self._wake.wait()
            if self._closing:
                return False
            calls, self._calls = self._calls, []
        for call in calls:
            call()
        self._put_out()
        self._step()
        self._admit()
        if self.registry.retired:
            self._sweep()
        return True

    def _put_out(self) -> None:
        """Let go of who was cancelled, waited or took too long, or can never be answered."""
        now, limits = time.monotonic(), self.limits
        for ticket in [*self._running.values(), *self._waiting]:
            age = now - ticket.came
            if ticket.cancelled:
                self._fail(ticket, RequestError("cancelled", 499, "cancelled"), "cancelled")
            elif age > limits.request_seconds:
                line = f"not finished within {limits.request_seconds:g} s; ask for fewer tokens"
                self._fail(ticket, RequestError(line, 504, "timeout"), "timeout")
            elif not ticket.running and age > limits.queue_seconds:
                line = f"waited longer than {limits.queue_seconds:g} s; try again later"
                self._fail(ticket, RequestError(line, 503, "queue_timeout"), "timeout")
            elif not ticket.checked:
                ticket.checked = True
                try:
                    self.batch.check(ticket.ask)
                except GenerationError as error:
                    self._fail(ticket, error, "refused")

    def _step(self) -> None:
        began, rows = time.perf_counter(), len(self.batch.rows)
        if not rows:
            return
        try:
            said = self.batch.step()
        except Exception as error:
            self.batch.clear()
            self._broken(list(self._running.values()), error)
            return
        self.meter.stepped(rows, time.perf_counter() - began)
        self._hand_out(said)

    def _admit(self) -> None:
        with self._wake:
            asks = self.batch.fitting(ticket.ask for ticket in self._waiting)
            tickets, self._waiting = self._waiting[: len(asks)], self._waiting[len(asks) :]
            for ticket in tickets:
                ticket.running = True
                self._running[ticket.ask] = ticket
        if not tickets:
            return
        try:
            said = self.batch.admit(asks)
        except Exception as error:
            self._broken(tickets, error)
            return
        self._hand_out(said)

    def _hand_out(self, said: Sequence[Said]) -> None:
        now = time.monotonic()
        for each in said:
            ticket = self._running.get(each.ask)
            if ticket is None:  # another of its answers failed
                continue
            if not ticket.began:
                ticket.began, ticket.known = True, each.known
                self.meter.began(ticket.entry.name, now - ticket.came)
            if each.fault:
                self._fail(ticket, RequestError(each.fault, 500, "not_finite"), "failed")
                continue
            ticket.generated += 1
            self._deliver(ticket, each)
            if each.result is not None:
                ticket.open.discard(each.number)
                if not ticket.open:
                    del self._running[each.ask]
                    self._count(ticket, "answered")

    def _fail(self, ticket: Ticket, error: TunesmithError, outcome: str) -> None:
        """End a ticket without an answer, and free its slots."""
        with self._wake:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        if self._running.pop(ticket.ask, None) is not None:
            self.batch.drop([ticket.ask])
        self._count(ticket, outcome)
        self._deliver(ticket, error)

    def _broken(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """An error that nobody foresaw: those whom it touches are told, and it is logged; the others go on."""
        logger.error("generation failed", exc_info=error)
        for ticket in tickets:
            self._fail(ticket, RequestError("the server failed on this request; see its log", 500, "failed"), "failed")

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.deliver(event)
        except RuntimeError:  # its event loop is closed: nobody listens
            ticket.cancelled = True

    def _count(self, ticket: Ticket, outcome: str) -> None:
        seconds = time.monotonic() - ticket.came
        read = len(ticket.ask.prompt)
        self.meter.ended(ticket.entry.name, outcome, read, ticket.known, ticket.generated, seconds)

    def _sweep(self) -> None:
        """Take off adapters that were replaced or removed, and forget what was read with them."""
        with self._wake:
            busy = [ticket.entry for ticket in (*self._running.values(), *self._waiting)]
        for entry in self.registry.sweep(busy):
            self.batch.prefixes.forget(entry.key)
        with self._wake:
            if self.registry.retired and not (self._running or self._waiting or self._calls or self._closing):
                self._wake.wait(0.05)  # somebody holds one and has not asked yet


def _put(events: queue.SimpleQueue[tuple[int, Event]], number: int, event: Event) -> None:
    events.put((number, event))
