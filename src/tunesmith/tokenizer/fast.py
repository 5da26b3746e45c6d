"""The engine over Hugging Face's `tokenizers`: tokenizer.json, and byte-level GGUF vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tokenizers

from tunesmith.errors import TokenizerError

_T = TypeVar("_T")
_PREFIXING = ("normalizer", "pre_tokenizer")  # the parts that may put a space before the text
_PARTS = (*_PREFIXING, "post_processor", "decoder")


def guarded(where: str, work: Callable[[], _T]) -> _T:
    """Return work(); whatever the library raises, a panic of its Rust code included, becomes a TokenizerError."""
    try:
        return work()
    except TokenizerError:
        raise
    except BaseException as error:  # PanicException is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            text = " ".join(str(error).split())[:160]
            raise TokenizerError(f"{where}: not a tokenizer that can be used ({text}); download it again") from None
        raise


class FastEngine:
    """One tokenizers.Tokenizer in up to four settings, built when first asked for.

    Whether special tokens are matched in text is a switch of the whole object, not of a call: changing it for one
    caller would change it for another thread. So each setting has an object of its own.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, where: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.where = where
        self._main = tokenizer
        self._main.encode_special_tokens = True
        self._main_text: str | None = None
        self._variants: dict[tuple[bool, bool], tokenizers.Tokenizer] = {(False, False): tokenizer}
        added = tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in added.items() if token.special}
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def parse(
        cls, text: str, where: str, extra: Sequence[tuple[int, str, bool]] = (), named: Sequence[str] = ()
    ) -> FastEngine:
        """Build from tokenizer.json's text; `extra` tokens (id, content, special) are added, `named` made special."""
        tokenizer = guarded(where, lambda: tokenizers.Tokenizer.from_str(text))
        for index, content, special in sorted(extra):
            if tokenizer.token_to_id(content) is None:
                add_token(tokenizer, content, special)
            if tokenizer.token_to_id(content) != index:
                found = tokenizer.token_to_id(content)
                raise TokenizerError(
                    f"{where}: {content!r} has id {found}, added_tokens_decoder says {index}; do they fit?"
                )
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for content in named:
            if content not in known and tokenizer.token_to_id(content) is not None:
                add_token(tokenizer, content, True)
        return cls(tokenizer, where)

    def encode(self, text: str, special: bool, continuation: bool) -> list[int]:
        """Text to ids."""
        variant = self._variants.get((special, continuation)) or self._build(special, continuation)
        return guarded(self.where, lambda: variant.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Ids to text."""
        return self._main.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str | None:
        """The token of an id."""
        return self._main.id_to_token(index) if index >= 0 else None

    def id(self, token: str) -> int | None:
        """The id of a token."""
        return self._main.token_to_id(token)

    def size(self) -> int:
        """One more than the highest id."""
        return self._size

    def files(self) -> dict[str, bytes]:
        """tokenizer.json."""
        return {"tokenizer.json": self._text().encode()}

    def settings(self) -> dict[str, Any]:
        """transformers' class for any tokenizer.json."""
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    def content(self) -> bytes:
        """tokenizer.json with sorted keys."""
        return json.dumps(json.loads(self._text()), sort_keys=True).encode()

    def begins_with(self, index: int | None) -> bool:
        """Whether the file's own post-processor puts this token before a text."""
        ids = guarded(self.where, lambda: self._main.encode("a", add_special_tokens=True).ids)
        return index is not None and ids[:1] == [index]

    def _text(self) -> str:
        if self._main_text is None:
            self._main_text = self._main.to_str()
        return self._main_text

    def _build(self, special: bool, continuation: bool) -> tokenizers.Tokenizer:
        """Another object on the same vocabulary, which is neither copied nor written and read again."""
        parts = {name: getattr(self._main, name) for name in _PARTS}
        changed = _without_prefixes(parts) if continuation else {}
        if not changed and not special:
            self._variants[special, continuation] = self._main
            return self._main
        built = tokenizers.Tokenizer(self._main.model)
        for name, part in (parts | changed).items():
            if part is not None:
                setattr(built, name, part)
        added = self._main.get_added_tokens_decoder()
        built.add_tokens([added[index] for index in sorted(added)])
        if built.get_added_tokens_decoder().keys() != added.keys():
            raise TokenizerError(f"{self.where}: the ids of its added tokens do not follow one another; save it again")
        built.encode_special_tokens = not special
        self._variants[special, continuation] = built
        return built


def add_token(tokenizer: tokenizers.Tokenizer, content: str, special: bool) -> None:
    """Let `content` be matched as a whole; a token that the vocabulary has keeps its id."""
    added = tokenizers.AddedToken(content, special=special, normalized=False)
    if special:
        tokenizer.add_special_tokens([added])
    else:
        tokenizer.add_tokens([added])


def _without_prefixes(parts: dict[str, Any]) -> dict[str, Any]:
    """Those of a tokenizer's parts that put a space before the text, made anew without it (None: nothing is left)."""
    before = {name: json.loads(parts[name].__getstate__()) for name in _PREFIXING if parts[name] is not None}
    changed = {name: new for name, part in before.items() if (new := _without_prefix(part)) != part}
    bare = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()) | changed
    made = tokenizers.Tokenizer.from_str(json.dumps(bare))
    return {name: getattr(made, name) for name in changed}


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before the text."""
    if not isinstance(part, dict):
        return part
    for inner in ("normalizers", "pretokenizers"):
        if isinstance(part.get(inner), list):
            kept = [_without_prefix(item) for item in part[inner] if item.get("type") != "Prepend"]
            return part | {inner: kept}
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part.get("type") == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part
