"""Tokenizers out of GGUF metadata: byte-level BPE (`gpt2`) and sentencepiece (`llama`).

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it. Getting it wrong changes ids
silently (SmolLM splits every digit off), so a name that is not in the table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tunesmith.errors import TokenizerError
from tunesmith.tokenizer.base import Engine, Roles, Tokenizer
from tunesmith.tokenizer.fast import FastEngine, add_token, guarded
from tunesmith.tokenizer.sentencepiece_file import BYTE, CONTROL, UNKNOWN, USER_DEFINED, write_model
from tunesmith.tokenizer.spm import SentencePieceEngine

# The published tokenizer.json files' patterns; GPT-2's own is built into ByteLevel.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + _WORDS % r"\p{N}"


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# name -> (pre-tokenizer, whether a whole pre-token that is in the vocabulary is taken without merging, BOS by default)
_PRE = {
    "gpt-2": (_gpt2, False, False),
    "smollm": (_digits_then_gpt2, False, False),
    "llama-bpe": (lambda: _split(_LLAMA3), True, True),
    "llama3": (lambda: _split(_LLAMA3), True, True),
    "llama-v3": (lambda: _split(_LLAMA3), True, True),
    "qwen2": (lambda: _split(_QWEN2), False, False),
}
_MOST_TOKENS = 1 << 22


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer that GGUF metadata describes; TokenizerError names what is missing or unknown."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise TokenizerError(
            f"{where}: the GGUF file has no tokenizer; convert the model again, tokenizer files included"
        )
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{where}: tokenizer.ggml.model {str(kind)[:60]!r} is not supported; known: gpt2, llama")
    tokens = _strings(metadata, "tokens", where)
    types = _types(metadata, len(tokens), where)
    engine: Engine
    if kind == "gpt2":
        engine, add_bos = _byte_level(metadata, tokens, types, where)
    else:
        engine, add_bos = _sentencepiece(metadata, tokens, types, where), True
    said = metadata.get("tokenizer.ggml.add_bos_token")
    eos = (_role(metadata, name, len(tokens), where) for name in ("eos", "eot"))
    roles = Roles(
        bos_id=_role(metadata, "bos", len(tokens), where),
        eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
        pad_id=_role(metadata, "padding", len(tokens), where),
        unk_id=_role(metadata, "unknown", len(tokens), where) if kind == "gpt2" else types.index(UNKNOWN),
        add_bos=bool(add_bos if said is None else said),
    )
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(engine, roles, where=where, chat_template=template if isinstance(template, str) else None)


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> tuple[FastEngine, bool]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        known = ", ".join(_PRE)
        raise TokenizerError(
            f"{where}: tokenizer.ggml.pre is {str(pre)[:60]!r}, which decides how text is cut; known: {known}; use the "
            "model's Hugging Face folder, with its tokenizer.json"
        )
    build, whole_words, add_bos = _PRE[pre]
    halves = [merge.partition(" ") for merge in _strings(metadata, "merges", where)]
    merges = [(left, right) for left, _, right in halves]
    if not all(left and right and " " not in right for left, right in merges):
        raise TokenizerError(f"{where}: tokenizer.ggml.merges: every merge is two tokens; convert the model again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens holds a token twice; convert the model again")

    def make() -> FastEngine:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
        tokenizer.pre_tokenizer = build()
        tokenizer.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, types, strict=True):
            if kind in (CONTROL, UNKNOWN, USER_DEFINED):
                add_token(tokenizer, token, kind != USER_DEFINED)
        return FastEngine(tokenizer, where)

    return guarded(where, make), add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> SentencePieceEngine:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(isinstance(s, float) for s in scores):
        raise TokenizerError(
            f"{where}: tokenizer.ggml.scores: a score for each token is needed; convert the model again"
        )
    if UNKNOWN not in types:
        raise TokenizerError(f"{where}: tokenizer.ggml.token_type marks no unknown token; convert the model again")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return SentencePieceEngine(write_model(tokens, scores, types, prefix=prefix), where)


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_TOKENS or not isinstance(values[0], str):
        raise TokenizerError(f"{where}: tokenizer.ggml.{key} is missing or no list of strings; convert the model again")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.start + 20]
        raise TokenizerError(f"{where}: tokenizer.ggml.{key}: {bad!a} is not UTF-8; convert the model again") from None
    return values


def _types(metadata: Mapping[str, Any], count: int, where: str) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != count or not all(t in range(1, BYTE + 1) for t in types):
        raise TokenizerError(
            f"{where}: tokenizer.ggml.token_type: a type (1-6) for each token; convert the model again"
        )
    return types


def _role(metadata: Mapping[str, Any], name: str, count: int, where: str) -> int | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise TokenizerError(f"{where}: tokenizer.ggml.{name}_token_id {str(index)[:40]} is not one of {count} tokens")
    return index
