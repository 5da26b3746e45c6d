"""What Prometheus reads of a server. Models are labels only by the names that the server itself gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tunesmith.serve.engine import Engine
from tunesmith.serve.guard import App, Message, Receive, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# name, what it is, how it is read off an engine
READ: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("waiting_prompts", "Prompts that wait to be read.", lambda e: e.waiting),
    ("running_answers", "Answers being generated.", lambda e: len(e.batch.rows)),
    ("cache_bytes", "Memory of running answers' keys and values.", lambda e: e.batch.cache.bytes),
    ("prefix_cache_bytes", "Memory of kept prompts' keys and values.", lambda e: e.batch.prefixes.bytes),
    ("models", "Models that can be asked, the base among them.", lambda e: len(e.registry.entries)),
    ("retired_models", "Replaced or removed versions still in use.", lambda e: e.registry.retired),
)


class Metrics:
    """The counters of one server; `watch` an engine to have its state among them. See engine.Meter."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        model, ending = ["model"], ["model", "outcome"]
        self.responses = Counter("tunesmith_responses", "HTTP responses.", ["route", "status"], registry=own)
        self.prompts = Counter("tunesmith_prompts", "Prompts by how they ended.", ending, registry=own)
        self.read = Counter("tunesmith_prompt_tokens", "Tokens of prompts.", model, registry=own)
        self.known = Counter("tunesmith_prompt_tokens_known", "Those that were kept from before.", model, registry=own)
        self.generated = Counter("tunesmith_generated_tokens", "Tokens generated.", model, registry=own)
        self.first = _seconds("first_token", "From a request to its first token.", own)
        self.whole = _seconds("prompt", "From a request to its end.", own)
        self.step = _seconds("step", "One token for every running answer.", own)
        self.together = Gauge("tunesmith_last_step_answers", "Answers in the latest step.", registry=own)

    def watch(self, engine: Engine) -> None:
        """Let the engine's own state be read with the counters."""
        self.registry.register(_State(engine))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def stepped(self, rows: int, seconds: float) -> None:
        """See engine.Meter."""
        self.step.observe(seconds)
        self.together.set(rows)

    def began(self, model: str, seconds: float) -> None:
        """See engine.Meter."""
        self.first.observe(seconds)

    def ended(self, model: str, outcome: str, prompt: int, known: int, generated: int, seconds: float) -> None:
        """See engine.Meter."""
        self.prompts.labels(model, outcome).inc()
        self.read.labels(model).inc(prompt)
        self.known.labels(model).inc(known)
        self.generated.labels(model).inc(generated)
        self.whole.observe(seconds)


def _seconds(name: str, about: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"tunesmith_{name}_seconds", about, buckets=SECONDS, registry=registry)


class _State(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What the engine says of itself now."""
        for name, about, read in READ:
            yield GaugeMetricFamily(f"tunesmith_{name}", about, value=read(self.engine))


def counted(app: App, metrics: Metrics, paths: frozenset[str]) -> App:
    """The application with its responses counted; `paths`: the routes that are told apart."""

    async def counting(scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        route = path if path in paths else "other"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.responses.labels(route, message["status"]).inc()
            await send(message)

        await app(scope, receive, sending)

    return counting
