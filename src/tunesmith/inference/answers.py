"""One answer in the making: its tokens, its text, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.text import StopMatcher, TextTokenizer
from tunesmith.model.llama import Llama

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    `ids` leave out the EOS token and the tokens from a stop string on; `text` ("" without a tokenizer) ends before the
    stop string. `finish_reason`: "eos", "stop" (a stop string) or "length" (max_new_tokens, or the end of the model's
    context). `logprobs`, where asked for: each token's log-probability under the unprocessed distribution.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of the text of answer `index`; the answer's last piece carries its `result`."""

    index: int
    text: str
    result: Generation | None = None


@dataclass(frozen=True)
class Job:
    """What all answers of one call share."""

    model: Llama
    settings: GenerationSettings
    eos: frozenset[int]
    tokenizer: TextTokenizer | None = None
    adapters: tuple[str, ...] | None = None
    logprobs: bool = False
    share_prefix: bool = True
    routes: Sequence[tuple[str, ...]] | None = None  # instead of `adapters`: those of each prompt

    def acting(self, prompt: int) -> tuple[str, ...] | None:
        """The adapters that answer a prompt, by its number."""
        return self.adapters if self.routes is None else self.routes[prompt]


@dataclass
class Answer:
    """The state of one sequence being generated; at most `limit` tokens are produced."""

    index: int
    job: Job
    prompt: Sequence[int]
    limit: int
    generator: torch.Generator
    adapters: tuple[str, ...] | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._streamer = self.job.tokenizer.streamer() if self.job.tokenizer is not None else None
        self._matcher = StopMatcher(self.job.settings.stop)
        self._text: list[str] = []  # what the matcher let through
        self._decoded: list[int] = []  # characters decoded after each token

    def push(self, token: int, logprob: float | None) -> str:
        """Take the next token; returns the text that may be shown now, and sets `reason` where the answer ends."""
        if token in self.job.eos:
            return self._end("eos")
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        fresh = self._streamer.push(token) if self._streamer is not None else ""
        self._decoded.append((self._decoded[-1] if self._decoded else 0) + len(fresh))
        shown = self._show(fresh)
        if self.reason is None and len(self.ids) >= self.limit:
            shown += self._end("length")
        return shown

    @property
    def settled(self) -> int:
        """How many tokens' text has been shown whole, so that no stop string can take them back."""
        shown = sum(map(len, self._text))
        ends = [i for i, end in enumerate(self._decoded) if end <= shown and end > (self._decoded[i - 1] if i else 0)]
        return ends[-1] + 1 if ends else 0

    def result(self) -> Generation:
        """The finished answer."""
        logprobs = tuple(self.logprobs) if self.job.logprobs else None
        return Generation(tuple(self.ids), "".join(self._text), self.reason or "length", logprobs)

    def _show(self, fresh: str) -> str:
        shown = self._matcher.push(fresh)
        self._text.append(shown)
        if self._matcher.found:
            self.reason = "stop"
            self._cut()
        return shown

    def _end(self, reason: FinishReason) -> str:
        """No more tokens: let go of what was held back, unless that completes a stop string."""
        self.reason = reason
        shown = self._show(self._streamer.flush()) if self._streamer is not None else ""
        if self.reason == "stop":
            return shown
        held = self._matcher.flush()
        self._text.append(held)
        return shown + held

    def _cut(self) -> None:
        """Drop the tokens from the one in which the stop string begins."""
        end = sum(map(len, self._text))
        keep = next((i for i, decoded in enumerate(self._decoded) if decoded > end), len(self.ids))
        while keep and keep < len(self.ids) and self._decoded[keep - 1] == (self._decoded[keep - 2] if keep > 1 else 0):
            keep -= 1  # a token that completed no character began the one that was cut
        del self.ids[keep:], self.logprobs[keep:]
