"""What the chat pages say, without any page: questions to the engine, answers as they grow, errors as one line."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import RequestError, TunesmithError
from tunesmith.inference.history import Message, Turns
from tunesmith.inference.sample import GenerationSettings
from tunesmith.serve.engine import Engine
from tunesmith.serve.registry import Entry

T = TypeVar("T")
SHOWN_EVERY = 0.05  # seconds between two states of the page
LOADING_SECONDS = 120.0
PREVIEW_SIDE = 160  # pixels


@dataclass(frozen=True)
class Ask:
    """What the page's form holds beside the question; texts and numbers as a browser sends them."""

    system: str = ""
    max_new_tokens: float = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: float = 0
    repetition_penalty: float = 1.0
    seed: str = ""

    @classmethod
    def names(cls) -> list[str]:
        """The fields in their order."""
        return [field.name for field in fields(cls)]

    def settings(self, most: int) -> GenerationSettings:
        """For the model; `most` new tokens at most. Raises RequestError, GenerationError."""
        seed = str(self.seed).strip()
        if seed and not seed.isdecimal():
            raise RequestError(f"seed: give a whole number, or nothing for a new draw each time, not {seed[:40]!r}")
        narrowed: dict[str, Any] = {}
        if self.temperature > 0:  # greedy answers are not narrowed, and say so where they are asked to be
            narrowed = {
                "top_p": self.top_p if self.top_p < 1 else None,
                "top_k": int(self.top_k) or None,
                "seed": int(seed) if seed else None,
            }
        return GenerationSettings(
            max_new_tokens=min(int(self.max_new_tokens), most),
            temperature=float(self.temperature),
            repetition_penalty=float(self.repetition_penalty),
            **narrowed,
        )


def answers(
    engine: Engine,
    models: Sequence[str],
    history: Sequence[Message],
    text: str,
    ask: Ask,
    most: int,
    image: Path | None = None,
) -> Generator[tuple[list[str], str]]:
    """The answers of several models to a question, as they grow: (a text each, a line about them).

    `image`: what the conversation is about, for models that look at images. Closing the generator stops them. Raises
    TunesmithError.
    """
    if not text.strip():
        raise RequestError("there is no question yet: write one")
    notices: dict[str, None] = {}
    settings = ask.settings(most)
    system = ask.system.strip() or None

    def prompt(entry: Entry) -> list[int]:
        picture = None if image is None else engine.registry.see(entry, image, "the image")
        ids, told = entry.turn(Turns(system, history, text, picture), settings.max_new_tokens)
        notices.update(dict.fromkeys(told))
        return ids

    for model in models:
        ready(engine, model)
    texts, tokens, began, shown = ["" for _ in models], 0, time.perf_counter(), 0.0
    cut: set[int] = set()
    with closing(engine.each(models, prompt, settings)) as pieces:
        for number, said in pieces:
            texts[number] += said.text
            tokens += 1
            if said.result is not None and said.result.finish_reason == "length":
                cut.add(number)
            now = time.perf_counter()
            if now - shown >= SHOWN_EVERY:
                shown = now
                yield list(texts), ". ".join(notices)
    seconds = time.perf_counter() - began
    lines = [f"{tokens:,} tokens in {seconds:.1f} s", *notices]
    if cut:
        lines.append(f"cut at {settings.max_new_tokens} tokens: {', '.join(models[i] for i in sorted(cut))}")
    yield list(texts), ". ".join(lines)


def ready(engine: Engine, model: str) -> None:
    """Load the adapter if it is only found in the folder yet. Raises TunesmithError."""
    registry = engine.registry
    known = {entry.name for entry in registry.entries}
    if model not in known and model in registry.loadable():
        engine.call(lambda: registry.add(model)).result(LOADING_SECONDS)


def choices(engine: Engine) -> list[str]:
    """The models that can be asked: the base, what is loaded, and what the folder holds."""
    registry = engine.registry
    known = [entry.name for entry in registry.entries]
    return [*known, *(name for name in registry.loadable() if name not in known)]


def guarded(work: Callable[[], Iterable[T]], failed: Callable[[str], T]) -> Generator[T]:
    """What `work` gives; a TunesmithError ends it with `failed(line)` instead."""
    try:
        yield from work()
    except TunesmithError as error:
        yield failed(" ".join(str(error).split()))


def preview(image: Path) -> str:
    """A small picture of an image, as a data URL of our own making. Raises DataError for what is no image."""
    from tunesmith.vision.images import decode, read_bytes

    small = decode(read_bytes(image, "the image"), "the image", image).convert("RGB")
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    held = BytesIO()
    small.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
