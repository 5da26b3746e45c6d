"""What a client gets: OpenAI's objects, whole or in pieces, made of what the engine says."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.inference.answers import Generation
from tunesmith.inference.batch import Ask, Said, Told
from tunesmith.serve.registry import Entry

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
Json = dict[str, Any]


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> Json:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass
class Text:
    """An answer so far."""

    parts: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    result: Generation | None = None


@dataclass
class Reply:
    """The reply to one request, of `count` answers; `chat`: in the form of /v1/chat/completions.

    `logprobs`: tokens are told. `fingerprint` names the base.
    """

    entry: Entry
    chat: bool
    count: int
    prompt_tokens: int
    logprobs: bool = False
    fingerprint: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = [Text() for _ in range(self.count)]
        self._form = CHAT if self.chat else COMPLETION
        self._known: dict[Ask, int] = {}

    def take(self, index: int, said: Said) -> None:
        """Note what answer `index` gained."""
        text = self.texts[index]
        text.parts.append(said.text)
        text.told += said.tokens
        text.result = said.result or text.result
        self._known[said.ask] = said.known

    @property
    def open(self) -> int:
        """How many answers have not ended."""
        return sum(text.result is None for text in self.texts)

    def whole(self) -> Json:
        """The reply in one piece."""
        choices = []
        for index, text in enumerate(self.texts):
            ended = REASONS[text.result.finish_reason] if text.result is not None else None
            shown = self._form.logprobs(text.told, self.entry, 0) if self.logprobs else None
            choices.append({"index": index, **self._form.whole("".join(text.parts)), "logprobs": shown,
                            "finish_reason": ended})  # fmt: skip
        return {**self._head(self._form.object), "choices": choices, "usage": self.usage()}

    def opening(self) -> list[Json]:
        """What a stream begins with."""
        return [self._piece(index, self._form.first, None, None) for index in range(self.count) if self._form.first]

    def piece(self, index: int, said: Said) -> Json | None:
        """What a stream says of this; None where there is nothing to say yet."""
        if not (said.text or said.tokens or said.result is not None):
            return None
        shown = None
        if self.logprobs:
            before = sum(map(len, self.texts[index].parts)) - len(said.text)
            shown = self._form.logprobs(said.tokens, self.entry, before)
        ended = REASONS[said.result.finish_reason] if said.result is not None else None
        return self._piece(index, self._form.delta(said.text), shown, ended)

    def last(self) -> Json:
        """The usage, for a stream that is to end with it."""
        return {**self._head(self._form.piece), "choices": [], "usage": self.usage()}

    def usage(self) -> Json:
        """Tokens read and generated; those of ended answers."""
        generated = sum(len(text.result.ids) for text in self.texts if text.result is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._known.values())},
        }

    def _head(self, kind: str) -> Json:
        return {
            "id": f"{self._form.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.entry.name,
            "system_fingerprint": f"{self.fingerprint}-{self.entry.version}",
        }

    def _piece(self, index: int, delta: Json, shown: Json | None, ended: str | None) -> Json:
        choice = {"index": index, **delta, "logprobs": shown, "finish_reason": ended}
        return {**self._head(self._form.piece), "choices": [choice]}


@dataclass(frozen=True)
class Form:
    """How one of the two routes writes it."""

    prefix: str
    object: str
    piece: str
    first: Json
    whole: Callable[[str], Json]
    delta: Callable[[str], Json]
    logprobs: Callable[[Sequence[Told], Entry, int], Json]


def _chat_logprobs(told: Sequence[Told], entry: Entry, before: int) -> Json:
    content = [
        {**_token(entry, each.token, each.logprob), "top_logprobs": [_token(entry, *one) for one in each.likeliest]}
        for each in told
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(told: Sequence[Told], entry: Entry, before: int) -> Json:
    tokens = [entry.tokenizer.decode([each.token], skip_special=False) for each in told]
    offsets = [before]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    top = [{entry.tokenizer.decode([t], skip_special=False): _finite(p) for t, p in each.likeliest} for each in told]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in told],
        "top_logprobs": top,
        "text_offset": offsets[:-1],
    }


def _token(entry: Entry, token: int, logprob: float) -> Json:
    """A token by itself; its bytes are not known where they are no whole character."""
    text = entry.tokenizer.decode([token], skip_special=False)
    whole = "\ufffd" not in text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this."""
    return max(logprob, -9999.0)


CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text} if text else {}},
    _chat_logprobs,
)
COMPLETION = Form(
    "cmpl",
    "text_completion",
    "text_completion",
    {},
    lambda text: {"text": text},
    lambda text: {"text": text},
    _completion_logprobs,
)
