"""The Tokenizer: what the rest of Tunesmith knows of tokens, whatever library does the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith.errors import TokenizerError
from tunesmith.files import atomic_write_bytes, atomic_write_json

# Texts whose ids travel with an adapter: digits, runs of white space, accents, scripts, code, and special-token strings
# as a user may type them.
GOLDEN = (
    "Hello world 1234567890 3.14",
    "  two spaces\tand a tab\n\n  new lines  ",
    "naïve café Ünïcode 你好 مرحبا 🙂👩‍🚀",
    "def f(x):\n    return x**2  # https://example.org/?q=1",
    "<s></s><|im_start|>user<|im_end|><|eot_id|>",
)


class Engine(Protocol):
    """What a tokenizer library must do. `specials` are the tokens that text from a user can never become."""

    specials: dict[str, int]

    def encode(self, text: str, special: bool, continuation: bool) -> list[int]:
        """Text to ids; no BOS or EOS is added."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Ids to text."""

    def token(self, index: int) -> str | None:
        """The token of an id, as the vocabulary writes it."""

    def id(self, token: str) -> int | None:
        """The id of a token."""

    def size(self) -> int:
        """One more than the highest id."""

    def files(self) -> dict[str, bytes]:
        """The files, by name, that `load_tokenizer` would read it from again."""

    def settings(self) -> dict[str, Any]:
        """The keys of tokenizer_config.json that it needs beside its files."""

    def content(self) -> bytes:
        """Everything that decides its ids, in an order of its own: what the fingerprint is taken of."""


@dataclass(frozen=True)
class Roles:
    """What some tokens are for. `eos_ids` begins with the tokenizer's own EOS; `unk_id` may come out of any text."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False


class Tokenizer:
    """Token ids of text, and text of token ids.

    `encode` never adds BOS or EOS; `add_bos` says whether the model's own tokenizer would. `pad_id` may equal an EOS
    (SmolLM2), so nothing may be masked by it.
    """

    def __init__(self, engine: Engine, roles: Roles, *, where: str, chat_template: str | None = None) -> None:
        self._engine = engine
        self._roles = roles
        self.where = where
        self.chat_template = chat_template
        self._never = frozenset(engine.specials.values()) - {roles.unk_id}

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self._engine.size()

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._roles.bos_id

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end-of-text token."""
        return self._roles.eos_ids[0] if self._roles.eos_ids else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, the tokenizer's own EOS first."""
        return self._roles.eos_ids

    @property
    def pad_id(self) -> int | None:
        """The padding token; often one of `eos_ids`."""
        return self._roles.pad_id

    @property
    def add_bos(self) -> bool:
        """Whether the model's own tokenizer puts BOS before every text."""
        return self._roles.add_bos

    @property
    def special_tokens(self) -> dict[str, int]:
        """Token -> id of the tokens that a user's text never becomes."""
        return dict(self._engine.specials)

    def encode(self, text: str, *, special: bool = False, continuation: bool = False) -> list[int]:
        """Return the ids of `text`, without BOS or EOS.

        special=True: strings of special tokens become their ids (only for text that is trusted, such as a template's).
        special=False: they are ordinary text. continuation=True: the text goes on from an earlier piece, so no space is
        put before it, where a sentencepiece model would. Lone surrogates become U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._engine.encode(text, special, continuation)
        if not special and not self._never.isdisjoint(ids):
            found = next(self.token(i) for i in ids if i in self._never)
            raise TokenizerError(
                f"{self.where}: plain text became the special token {found!r}; the tokenizer is damaged"
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids out of the vocabulary are left out."""
        return self._engine.decode(ids, skip_special)

    def token(self, index: int) -> str:
        """Return the token of an id, as the vocabulary writes it; TokenizerError for an id that is not there."""
        found = self._engine.token(index)
        if found is None:
            raise TokenizerError(
                f"{self.where}: no token has the id {index}; the vocabulary ends at {self.vocab_size - 1}"
            )
        return found

    def id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._engine.id(token)

    def streamer(self) -> Streamer:
        """Return an object that turns ids into text one at a time."""
        return Streamer(self)

    def fingerprint(self) -> dict[str, Any]:
        """Return {"sha256": of all that decides ids, "golden": {text: ids}}, to recognise this tokenizer elsewhere."""
        digest = hashlib.sha256(self._engine.content())
        roles = [self.bos_id, self.eos_ids, self.pad_id, self.add_bos, sorted(self.special_tokens.items())]
        digest.update(json.dumps(roles).encode())
        return {"sha256": digest.hexdigest(), "golden": {text: self.encode(text) for text in GOLDEN}}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json or tokenizer.model, and tokenizer_config.json, as transformers reads them."""
        folder = Path(folder)
        for name, data in self._engine.files().items():
            atomic_write_bytes(folder / name, data)
        names = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "pad_token": self.pad_id,
            "unk_token": self._roles.unk_id,
        }
        config: dict[str, Any] = {role: None if index is None else self.token(index) for role, index in names.items()}
        config |= {
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "eos_token_ids": list(self.eos_ids),
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
                for token, index in sorted(self.special_tokens.items(), key=lambda item: item[1])
            },
        }
        config |= self._engine.settings()
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        atomic_write_json(folder / "tokenizer_config.json", config)


class Streamer:
    """Text of a growing sequence of ids, handed out as soon as it is complete UTF-8.

    The texts of all `push` calls and of `flush`, joined, are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window: ids whose text is decoded again, so that white space keeps its context
        self._shown = 0  # ids before this one have been handed out

    def push(self, index: int) -> str:
        """Add an id; return the text that became complete."""
        self._ids.append(index)
        return self._take(final=False)

    def flush(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd") and not final:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
