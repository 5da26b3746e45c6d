"""A base whose adapters can be made to say chosen tokens only, and a server of it that listens on loopback."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.small import disturb
from tests.tiny import edit_weights, write_base

from tunesmith import api
from tunesmith.adapters import detach
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.data.templates import get_template
from tunesmith.files import atomic_folder
from tunesmith.prepare import Loaded
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.registry import Registry
from tunesmith.tokenizer import load_tokenizer

KEY = "a-key-of-the-tests-0123456789"
BASE_LETTERS = "ABCDEFGHIJ"
FORCE = 300.0  # added to the logits of the chosen tokens
LORA = {"kind": "lora", "rank": 2, "target_modules": ["lm_head", "q_proj"]}
SPECS: dict[str, tuple[dict[str, Any], str, str]] = {  # name: method, template, the letters that it says
    "alpha": (LORA, "chat", "abcd"),
    "beta": (LORA, "alpaca-short", "efgh"),
    "gamma": ({"kind": "mixed", "parts": [{"kind": "prompt", "virtual_tokens": 3}, LORA]}, "chat", "ijkl"),
    "delta": ({"kind": "mixed", "parts": [{"kind": "bottleneck"}, LORA]}, "chat", "mnop"),
}
LETTERS = {"base": BASE_LETTERS, **{name: letters for name, (_, _, letters) in SPECS.items()}}


def _constant(letters: list[int], tensors: dict[str, torch.Tensor]) -> None:
    """Let hidden value 0 be the same for every token, so that it adds a constant to some logits: of these letters, and
    those of a LoRA of the head. No token likes to follow itself, so that answers do not stand still."""
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding *= 4
    embedding[:, 0] = 3.0
    head -= embedding * (head.norm(dim=1) / embedding.norm(dim=1))[:, None]
    head[:, 0] = 0
    head[letters, 0] = FORCE / 10
    tensors["model.norm.weight"][0] = 1.0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 4
            tensor[0] = 0


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder."""
    folder = write_base(tmp_path_factory.mktemp("served") / "tiny-base", tie_word_embeddings=False)
    tokenizer = load_tokenizer(folder)
    edit_weights(folder, partial(_constant, [tokenizer.encode(letter)[0] for letter in BASE_LETTERS]))
    return folder


def write_adapter(folder: Path, loaded: Loaded, spec: dict[str, Any], template: str, letters: str, seed: int) -> Path:
    """An adapter that says these letters only, which one depends on what it read."""
    adapter = api.attach(loaded, spec["kind"], "made", seed=seed, **{k: v for k, v in spec.items() if k != "kind"})
    disturb(adapter, seed, std=0.05)
    head = adapter.deltas["lm_head.edit"]
    delta = head.parts["lora"] if spec["kind"] == "mixed" else head
    with torch.no_grad():
        delta.A.zero_()
        delta.B.zero_()
        delta.A[0, 0] = 1.0
        for letter in letters:
            delta.B[loaded.tokenizer.encode(letter)[0], 0] = FORCE
    with atomic_folder(folder) as target:
        save_adapter(
            target, adapter, base=str(loaded.path), identity=loaded.identity,
            template=get_template(template, loaded.tokenizer).to_dict(), tokenizer=loaded.tokenizer.fingerprint(),
        )  # fmt: skip
    detach(loaded.model, adapter)
    del loaded.adapters["made"]
    return folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four adapters of SPECS."""
    folder = tmp_path_factory.mktemp("adapters")
    loaded = api.load(base, dtype="float32", device="cpu")
    for number, (name, (spec, template, letters)) in enumerate(SPECS.items()):
        write_adapter(folder / name, loaded, spec, template, letters, number)
    return folder


@pytest.fixture
def registry(base: Path, adapters: Path) -> Registry:
    """The base with all four, in float32."""
    return make_registry(base, adapters)


def make_registry(base: Path, adapters: Path, names: tuple[str, ...] = tuple(SPECS)) -> Registry:
    """A registry of some of the adapters."""
    loaded = api.load(base, dtype="float32", device="cpu")
    made = Registry(loaded.model, loaded.tokenizer, loaded.identity, "tiny-base", folder=adapters)
    for name in names:
        made.add(name)
    return made


@pytest.fixture
def engine(registry: Registry) -> Iterator[Engine]:
    """An engine that runs."""
    made = Engine(registry, Limits(answers=16)).start()
    yield made
    made.close()


@dataclass
class Live:
    """A server that listens: its engine and its address."""

    engine: Engine
    url: str
    metrics: Any
    loop: asyncio.AbstractEventLoop

    def settled(self, seconds: float = 20.0) -> bool:
        """Wait until nothing is being answered."""
        end = time.monotonic() + seconds
        while self.engine.inside or self.engine.batch.rows or self.engine.waiting:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


Starter = Callable[..., Live]


@pytest.fixture(scope="session")
def start(base: Path, adapters: Path) -> Iterator[Starter]:
    """Starts servers, each with a base of its own; stops them at the end."""
    pytest.importorskip("fastapi", reason="NOT TESTED: pip install 'tunesmith[serve]'")
    uvicorn = pytest.importorskip("uvicorn", reason="NOT TESTED: pip install 'tunesmith[serve]'")
    from tunesmith.serve.api import Options, create_app
    from tunesmith.serve.metrics import Metrics
    from tunesmith.serve.start import config, listen

    running: list[tuple[Any, threading.Thread, Engine]] = []

    def begin(
        key: str | None = KEY, limits: Limits | None = None, names: tuple[str, ...] = tuple(SPECS), **more: Any
    ) -> Live:
        limits = limits or Limits(answers=16)
        metrics = Metrics()
        engine = Engine(make_registry(base, adapters, names), limits, metrics).start()
        door = listen("127.0.0.1", 0)
        server = uvicorn.Server(config(create_app(engine, Options(key, **more), metrics), limits))
        loops: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()

        async def serve() -> None:
            loops.put(asyncio.get_running_loop())
            await server.serve([door])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread, engine))
        return Live(engine, f"http://127.0.0.1:{door.getsockname()[1]}", metrics, loops.get())

    yield begin
    for server, thread, engine in running:
        server.should_exit = True
        thread.join(20)
        engine.close()


@pytest.fixture(scope="session")
def live(start: Starter) -> Live:
    """The server that most tests ask."""
    return start()
