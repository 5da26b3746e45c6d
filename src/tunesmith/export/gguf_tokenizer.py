"""A tokenizer as GGUF keeps it: `gpt2` (byte-level BPE, with the name of its pre-tokenizer) or `llama` (sentencepiece).

GGUF does not describe how text is cut before merging, it names it. The name is found by trial: a tokenizer is built
from the fields as a reader would, and it must cut and number every one of TEXTS as the original does. What no name
gives is refused: wrong ids show in no other way.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from tunesmith.errors import TokenizerError
from tunesmith.tokenizer import Tokenizer
from tunesmith.tokenizer.base import GOLDEN
from tunesmith.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from tunesmith.tokenizer.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

Fields = dict[str, Any]

PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2")
# What pre-tokenizers disagree on: digits, contractions, white space, marks, scripts, special tokens and their spaces.
TEXTS = (
    *GOLDEN,
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 v1.2.3",
    "it's don't we'll I'M THEY'RE 'sup isn’t",
    " leading  two   three\ttab\t\ttabs \n newline\n\n two\r\nand\r trailing ",
    "snake_case CamelCase x+=1; a->b /* c */ // d\n\n\n    indented\n\tif x != 0: pass",
    "...!!!???---((([[[{{{ @user #tag $5 €6 100% 2^10 <html> &amp; \\n",
    "日本語のテキスト 한국어 문장 שלום ١٢٣ ४२ ½ ² ﬁ 🙂👩‍🚀🏳️‍🌈",
    "\u200bzero\u200dwidth\u00a0nbsp\u2003em\u3000wide \u2581 meta\u2581space \u0120 \ufeffbom",
)
_COMPOSED = ("e\u0301 a\u0308o\u0302\u0323",)  # only for a tokenizer that leaves them apart
_MOST_LISTED = 3
Vocabulary = tuple[list[str], list[int]]


def tokenizer_fields(tokenizer: Tokenizer, rows: int, chat_template: str | None) -> tuple[Fields, list[str]]:
    """Return the tokenizer's keys of a GGUF file, and notes of what a reader will do otherwise.

    `rows` is how many the embedding has: tokens beyond the vocabulary are written as unused. Raises TokenizerError for
    a tokenizer that GGUF's readers would not reproduce.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-tokenizer-") as name:
        tokenizer.save(Path(name))
        spec = _json(Path(name) / "tokenizer.json")
        kind = "BPE" if spec is None else spec["model"].get("type")
        if kind != "BPE":
            raise TokenizerError(
                f"{tokenizer.where}: llama.cpp has no form of a {kind} tokenizer; export to hf instead"
            )
        model = Path(name) / "tokenizer.model"
        fields = _from_json(spec, tokenizer) if spec is not None else _from_model(model.read_bytes(), tokenizer)
        notes = [_NFC] if spec is not None and _composes(spec) else []
        found = _matching(fields, tokenizer, spec)
    found = _padded(found, rows)
    found |= _roles(tokenizer)
    if chat_template is not None:
        found["tokenizer.chat_template"] = chat_template
    return found, notes


_NFC = (
    "this tokenizer composes accents (NFC) before it cuts, llama.cpp does not: text that writes them apart gets other "
    "ids there"
)


def _matching(candidates: Iterator[Fields], tokenizer: Tokenizer, spec: dict[str, Any] | None) -> Fields:
    """The first of the fields that give the same ids, and the same pieces, for every text."""
    texts = (*TEXTS, *_specials(tokenizer), *(() if spec is not None and _composes(spec) else _COMPOSED))
    wanted = [(tokenizer.encode(text), tokenizer.encode(text, special=True)) for text in texts]
    cuts = _cutter(spec)
    tried, worst = [], ""
    for fields in candidates:
        again = tokenizer_from_gguf({**fields, **_roles(tokenizer)}, tokenizer.where)
        got = [(again.encode(text), again.encode(text, special=True)) for text in texts]
        differ = [text for text, a, b in zip(texts, wanted, got, strict=True) if a != b]
        if not differ and cuts(again, texts):
            return fields
        tried.append(str(fields.get("tokenizer.ggml.pre", fields["tokenizer.ggml.model"])))
        worst = differ[0] if differ else "its pieces"
    raise TokenizerError(
        f"{tokenizer.where}: GGUF has no name for the way this tokenizer cuts text (tried {', '.join(tried)}; differs "
        f"at {worst[:40]!r}): llama.cpp would give other ids; export to hf, and try llama.cpp's own converter"
    )


def _cutter(spec: dict[str, Any] | None) -> Any:
    """A test whether a tokenizer built from GGUF cuts texts as this tokenizer.json does, whatever its merges hide."""
    if spec is None or spec.get("pre_tokenizer") is None:
        return lambda again, texts: True
    ours = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer

    def cuts(again: Tokenizer, texts: Sequence[str]) -> bool:
        with tempfile.TemporaryDirectory(prefix="tunesmith-tokenizer-") as name:
            again.save(Path(name))
            file = Path(name) / "tokenizer.json"
            if not file.is_file():
                return True  # sentencepiece: its ids were compared
            theirs = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
            merges = json.loads(theirs.to_str())["model"]
        same = bool(merges.get("ignore_merges")) == bool(spec["model"].get("ignore_merges"))
        return same and all(ours.pre_tokenize_str(t) == theirs.pre_tokenizer.pre_tokenize_str(t) for t in texts)

    return cuts


def _from_json(spec: dict[str, Any], tokenizer: Tokenizer) -> Iterator[Fields]:
    """Candidates for a tokenizer.json: byte-level BPE by every name, or sentencepiece's with its merges as scores."""
    model = spec["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    tokens, types = _vocabulary(model["vocab"], spec, tokenizer)
    if model.get("byte_fallback"):
        yield _as_sentencepiece(tokens, types, merges, model.get("unk_token"), tokenizer)
        return
    for name in PRE_TOKENIZERS:
        yield {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        }


def _vocabulary(vocab: Mapping[str, int], spec: dict[str, Any], tokenizer: Tokenizer) -> Vocabulary:
    """Tokens and types in order of their ids; a hole becomes an unused token."""
    added = {token["id"]: (token["content"], bool(token.get("special"))) for token in spec.get("added_tokens") or []}
    names = {index: token for token, index in vocab.items()} | {index: text for index, (text, _) in added.items()}
    tokens, types = [], []
    for index in range(tokenizer.vocab_size):
        tokens.append(names.get(index, f"[UNUSED{index}]"))
        kind = (CONTROL if added[index][1] else USER_DEFINED) if index in added else NORMAL
        types.append(kind if index in names else UNUSED)
    return tokens, types


def _as_sentencepiece(
    tokens: list[str], types: list[int], merges: list[str], unknown: Any, tokenizer: Tokenizer
) -> Fields:
    """Scores whose order is the merges': sentencepiece joins the pair of the highest score first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    scores = [-float(rank[token]) if token in rank else 0.0 for token in tokens]
    last = -float(len(merges))
    scores = [
        score if token in rank or kind != NORMAL or _is_byte(token) else last - index
        for index, (token, kind, score) in enumerate(zip(tokens, types, scores, strict=True))
    ]
    kinds = [
        UNKNOWN if token == unknown else BYTE if _is_byte(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    if UNKNOWN not in kinds:
        raise TokenizerError(f"{tokenizer.where}: names no unknown token, which llama.cpp's llama tokenizer needs")
    return _sentencepiece_fields(tokens, scores, kinds, tokenizer)


def _from_model(data: bytes, tokenizer: Tokenizer) -> Iterator[Fields]:
    """The one candidate for a tokenizer.model: its own pieces, scores and types, and the tokens added to them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokens, scores, types = [], [], []
    special = set(tokenizer.special_tokens.values())
    for index in range(tokenizer.vocab_size):
        if index >= processor.vocab_size():
            tokens.append(tokenizer.token(index))
            scores.append(-1000.0)
            types.append(CONTROL if index in special else USER_DEFINED)
            continue
        tokens.append(processor.id_to_piece(index))
        scores.append(float(processor.get_score(index)))
        types.append(_kind(processor, index, special))
    yield _sentencepiece_fields(tokens, scores, types, tokenizer)


def _kind(processor: Any, index: int, special: set[int]) -> int:
    if processor.is_unknown(index):
        return UNKNOWN
    if processor.is_control(index) or index in special:
        return CONTROL
    if processor.is_byte(index):
        return BYTE
    return UNUSED if processor.is_unused(index) else NORMAL


def _sentencepiece_fields(tokens: list[str], scores: list[float], types: list[int], tokenizer: Tokenizer) -> Fields:
    begins = tokenizer.encode("a") != tokenizer.encode("a", continuation=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": begins,
    }


def _padded(fields: Fields, rows: int) -> Fields:
    """The embedding's further rows as unused tokens, as llama.cpp needs a token for every row."""
    tokens = fields["tokenizer.ggml.tokens"]
    missing = range(len(tokens), rows)
    more: Fields = {
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{index}]" for index in missing)],
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], *(UNUSED for _ in missing)],
    }
    if "tokenizer.ggml.scores" in fields:
        more["tokenizer.ggml.scores"] = [*fields["tokenizer.ggml.scores"], *(-1000.0 for _ in missing)]
    return {**fields, **more}


def _roles(tokenizer: Tokenizer) -> Fields:
    """Which tokens begin and end a text. llama.cpp knows two that end: the tokenizer's EOS, and the end of a turn."""
    ends = tokenizer.eos_ids
    named = {
        "bos": tokenizer.bos_id,
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,
        "padding": tokenizer.pad_id,
    }
    fields: Fields = {f"tokenizer.ggml.{role}_token_id": i for role, i in named.items() if i is not None}
    return {**fields, "tokenizer.ggml.add_bos_token": tokenizer.add_bos, "tokenizer.ggml.add_eos_token": False}


def _specials(tokenizer: Tokenizer) -> list[str]:
    """Special tokens with and without spaces around them."""
    named = list(tokenizer.special_tokens)[:8]
    return [form for token in named for form in (token, f"a{token}b", f"a {token} b", f"{token}\n x")]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _composes(spec: dict[str, Any]) -> bool:
    normalizer = spec.get("normalizer")
    return isinstance(normalizer, dict) and normalizer.get("type") == "NFC"


def _json(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
