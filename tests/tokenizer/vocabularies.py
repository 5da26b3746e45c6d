"""Small tokenizers trained on the spot, and .gguf models (with random weights) that carry them."""

from __future__ import annotations

import importlib.util
import io
import json as json_module
import textwrap
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

_spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).parents[1] / "model" / "checkpoints.py")
checkpoints: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checkpoints)

# What tokenizers stumble over.
CORPUS = [
    "",
    " ",
    "   ",
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   three\t\ttabs \t mixed",
    "line\nbreaks\n\n\nand\r\nothers\r",
    "12 345 6789 1234567890 3.14159 1,000,000 ½ ² ٣٤ ४२ 100%",
    "it's don't we'll I'M THEY'RE 'sup",
    "naïve café Ünïcode ß ﬁ",
    "e\u0301 combining a\u0308o\u0302\u0323 marks",
    "你好，世界。日本語のテキスト 한국어 문장",
    "مرحبا بالعالم ١٢٣ שלום",
    "🙂👩‍🚀🏳️‍🌈 🇩🇪 emoji",
    "def f(x: int) -> int:\n    return x**2  # square\n\tif x != 0: pass",
    "https://example.org/a?b=1&c=%20#frag user@example.com",
    "<s></s><unk><|im_start|>user\nhi<|im_end|> <|im_end|>\n",
    "\u200bzero\u200dwidth\u00a0nbsp\u2003em\u3000wide\u0085next",
    "\u2581 meta\u2581space \u0120 \ufeffbom \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!??? ...---... ((([[[{{{",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _text() -> list[str]:
    """Some hundred kilobytes of ordinary text that every machine has: the standard library's own."""
    source = "".join(Path(module.__file__).read_text("utf-8") for module in (textwrap, json_module, io, importlib.util))
    return source.splitlines() + [line for line in CORPUS for _ in range(3) if line]


def byte_level(size: int = 700) -> tokenizers.Tokenizer:
    """A byte-level BPE whose first ids are SPECIALS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def byte_level_fields(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes for it."""
    spec = json_module.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.padding_token_id": 4,
    }


def sentencepiece_model(byte_fallback: bool = True) -> bytes:
    """A LLaMA-like sentencepiece BPE: identity normalizer, digits split, dummy prefix, all white space kept."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_text()),
        model_writer=out,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return out.getvalue()


def sentencepiece_fields(model: bytes) -> dict[str, Any]:
    """What llama.cpp's converter writes for it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())

    def kind(i: int) -> int:
        flags = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6)]
        return next((number for check, number in flags if check(i)), 1)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A model of random weights with this vocabulary, which llama.cpp can load."""
    reference = checkpoints.reference("llama", vocab_size=len(fields["tokenizer.ggml.tokens"]))
    checkpoints.write_gguf(path, reference, extra=fields)
    return path
