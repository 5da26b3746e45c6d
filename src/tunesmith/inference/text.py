"""From tokens to the text a user sees: complete characters only, stop strings found across tokens and cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Streamer(Protocol):
    """Decodes token by token."""

    def push(self, token: int, /) -> str:
        """The text that this token completes, possibly none."""

    def flush(self) -> str:
        """What is left at the end."""


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer: `tunesmith.tokenizer.Tokenizer` has it."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of these tokens."""

    def streamer(self) -> Streamer:
        """A fresh decoder of one answer."""


class StopMatcher:
    """Lets text through up to the first stop string, holding back only what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now; sets `found` where a stop string is complete, which is dropped."""
        if self.found:
            return ""
        text = self._held + text
        cut = min((at for at in map(text.find, self.stop) if at >= 0), default=-1)
        if cut >= 0:
            self.found, self._held = True, ""
            return text[:cut]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        return shown

    def flush(self) -> str:
        """The held text: no more comes, so it was not a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
