"""The engine over sentencepiece: tokenizer.model, and GGUF vocabularies of the `llama` kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import sentencepiece

from tunesmith.errors import TokenizerError
from tunesmith.tokenizer.fast import guarded
from tunesmith.tokenizer.sentencepiece_file import WITHOUT_PREFIX

_SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class SentencePieceEngine:
    """Two processors over one model, with and without the space before a text; added tokens are split off beforehand.

    `legacy`: that space is also put after every special token, as LLaMA 1 and 2 and llama.cpp do.
    `extra`: tokens (id, content, special) beyond the model's own pieces, or special ones among them.
    """

    def __init__(
        self, model: bytes, where: str, extra: Sequence[tuple[int, str, bool]] = (), legacy: bool = True
    ) -> None:
        self.where = where
        self._model = model
        self._legacy = legacy
        self._with = guarded(where, lambda: sentencepiece.SentencePieceProcessor(model_proto=model))
        self._without = guarded(where, lambda: sentencepiece.SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX))
        self._pieces: int = self._with.vocab_size()
        if not self._pieces:
            raise TokenizerError(f"{where}: an empty sentencepiece model; download it again")
        self._strips = bool(self._with.encode("a") != self._without.encode("a"))
        controls = [i for i in range(self._pieces) if self._with.is_control(i) or self._with.is_unknown(i)]
        self.specials = {self._with.id_to_piece(i): i for i in controls}
        self._added: dict[str, int] = {}
        for index, content, special in sorted(extra):
            own = self._with.id_to_piece(index) if 0 <= index < self._pieces else None
            if own is not None and own != content:
                raise TokenizerError(
                    f"{where}: id {index} is {own!r}, but added tokens call it {content!r}; do they fit?"
                )
            if own is None:
                self._added[content] = index
            if special:
                self.specials[content] = index
        self._names = {index: content for content, index in self._added.items()}
        ordinary = {content: i for content, i in self._added.items() if content not in self.specials}
        self._split = {True: _splitter(self.specials | self._added), False: _splitter(ordinary)}

    def encode(self, text: str, special: bool, continuation: bool) -> list[int]:
        """Text to ids."""
        ids: list[int] = []
        prefix = not continuation
        for piece, is_token in self._parts(text, special):
            if is_token:
                ids.append(self.specials.get(piece, self._added.get(piece, -1)))
                prefix = self._legacy
            else:
                ids += (self._with if prefix else self._without).encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Ids to text; the space that sentencepiece puts before a text is taken off again."""
        special = set(self.specials.values())
        out = b""
        for index in map(int, ids):
            name = self._names.get(index)
            if index in special:
                out += b"" if skip_special else (self.token(index) or "").encode()
            elif name is not None:
                out += name.encode()
            elif 0 <= index < self._pieces:
                out += self._bytes(index)
        text = out.decode("utf-8", "replace")
        shown = (self.token(int(i)) or "" for i in ids if not (skip_special and i in special))
        return text.removeprefix(" ") if self._strips and next(shown, "").startswith(_SPACE) else text

    def token(self, index: int) -> str | None:
        """The token of an id."""
        if index in self._names:
            return self._names[index]
        return str(self._with.id_to_piece(index)) if 0 <= index < self._pieces else None

    def id(self, token: str) -> int | None:
        """The id of a token."""
        if token in self._added:
            return self._added[token]
        index: int = self._with.piece_to_id(token)
        return index if self._with.id_to_piece(index) == token else None

    def size(self) -> int:
        """One more than the highest id."""
        return max([self._pieces - 1, *self._added.values()]) + 1

    def files(self) -> dict[str, bytes]:
        """tokenizer.model, and added_tokens.json for the tokens that it has not."""
        files = {"tokenizer.model": self._model}
        if self._added:
            files["added_tokens.json"] = json.dumps(self._added, indent=2, sort_keys=True).encode()
        return files

    def settings(self) -> dict[str, Any]:
        """transformers' class for sentencepiece models, and the rule for spaces."""
        return {"tokenizer_class": "LlamaTokenizer", "legacy": self._legacy}

    def content(self) -> bytes:
        """The model's hash, the added tokens and the rule for spaces."""
        return json.dumps([hashlib.sha256(self._model).hexdigest(), sorted(self._added.items()), self._legacy]).encode()

    @property
    def own_roles(self) -> tuple[int, int, int, int]:
        """(BOS, EOS, PAD, UNK) that the model file names; -1 where it names none."""
        model = self._with
        return model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id()

    def _bytes(self, index: int) -> bytes:
        piece: str = self._with.id_to_piece(index)
        byte = _BYTE.fullmatch(piece) if self._with.is_byte(index) else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()

    def _parts(self, text: str, special: bool) -> Iterator[tuple[str, bool]]:
        """(piece, whether it is one whole token), in order."""
        splitter = self._split[special]
        pieces = splitter.split(text) if splitter else [text]
        for i, piece in enumerate(pieces):
            if piece:
                yield piece, i % 2 == 1


def _splitter(tokens: dict[str, int]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
