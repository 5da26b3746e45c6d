"""A tokenizer out of a folder becomes GGUF's fields, and llama.cpp numbers every text as the original does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.data.conftest import write_folder
from tests.tokenizer import vocabularies
from tests.tokenizer.llama_cpp import LlamaCpp
from tokenizers import decoders, normalizers, pre_tokenizers

from tunesmith.errors import TokenizerError
from tunesmith.export.gguf_tokenizer import tokenizer_fields
from tunesmith.tokenizer import Tokenizer, load_tokenizer
from tunesmith.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from tunesmith.tokenizer.sentencepiece_file import CONTROL, UNUSED, USER_DEFINED

KINDS = ["smollm", "gpt-2", "llama-bpe", "qwen2", "sentencepiece", "sentencepiece.json"]


def folder_of(kind: str, folder: Path) -> Path:
    """A tokenizer folder as models are published with."""
    folder.mkdir(parents=True)
    if kind.startswith("sentencepiece"):
        model = vocabularies.sentencepiece_model()
        (folder / "tokenizer.model").write_bytes(model)
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True, "add_bos_token": True}))
        if kind == "sentencepiece.json":
            _as_json(folder, model)
        return folder
    tokenizer_from_gguf(vocabularies.byte_level_fields(vocabularies.byte_level(), kind), "x.gguf").save(folder)
    return folder


def _as_json(folder: Path, model: bytes) -> None:
    """As transformers converts a sentencepiece model: merges in the order of the scores of what they give."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = {token: processor.get_score(i) for i, token in enumerate(tokens)}
    pairs = [
        (token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores and not token.startswith("<")
    ]  # fmt: skip
    pairs.sort(key=lambda pair: -scores["".join(pair)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="NOT TESTED: what ids llama.cpp gives; install xllamacpp (in the extra test)",
)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_the_folder(kind: str, tmp_path: Path) -> None:
    ours = load_tokenizer(folder_of(kind, tmp_path / "tokenizer"))
    fields, notes = tokenizer_fields(ours, ours.vocab_size, None)
    assert notes == []
    assert fields["tokenizer.ggml.model"] == ("llama" if "sentence" in kind else "gpt2")
    vocabularies.write_gguf(tmp_path / "m.gguf", fields)
    server = LlamaCpp(tmp_path / "m.gguf")
    try:
        for text in vocabularies.CORPUS:
            for special in (False, True):
                assert server.tokens(text, special=special) == ours.encode(text, special=special), (text, special)
        assert server.tokens("a", bos=True) == [ours.bos_id] * ours.add_bos + ours.encode("a")
    finally:
        server.close()


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_reader_has_the_same_tokenizer_again(kind: str, tmp_path: Path) -> None:
    ours = load_tokenizer(folder_of(kind, tmp_path / "tokenizer"))
    fields, _ = tokenizer_fields(ours, ours.vocab_size, "{{ messages }}")
    again = tokenizer_from_gguf(fields, "x.gguf")
    roles = ("bos_id", "eos_id", "pad_id", "add_bos", "vocab_size")
    assert [getattr(again, role) for role in roles] == [getattr(ours, role) for role in roles]
    assert again.chat_template == "{{ messages }}" and again.special_tokens.keys() >= ours.special_tokens.keys()


def changed(folder: Path, **parts: Any) -> Tokenizer:
    """The tokenizer of a folder with parts of tokenizer.json replaced."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **parts}))
    return load_tokenizer(folder)


def test_a_way_of_cutting_without_a_name_is_refused(tmp_path: Path) -> None:
    """Digits in groups of two: no model does, and no merge of the vocabulary would show it on most texts."""
    folder = write_folder(tmp_path / "t")
    odd = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = odd
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no name for the way this tokenizer cuts text \(tried smollm, llama-bpe"):
        tokenizer_fields(load_tokenizer(folder), 700, None)


def test_composing_accents_is_noted(tmp_path: Path) -> None:
    """Qwen's tokenizers do, and llama.cpp does not."""
    ours = changed(write_folder(tmp_path / "t"), normalizer={"type": "NFC"})
    _, notes = tokenizer_fields(ours, ours.vocab_size, None)
    assert len(notes) == 1 and "NFC" in notes[0]
    with pytest.raises(TokenizerError, match="no name for the way"):
        tokenizer_fields(changed(write_folder(tmp_path / "u"), normalizer={"type": "Lowercase"}), 700, None)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(TokenizerError, match="llama.cpp has no form of a WordLevel tokenizer"):
        tokenizer_fields(load_tokenizer(folder), 3, None)


def test_an_extended_vocabulary_and_a_padded_embedding(tmp_path: Path) -> None:
    """Tokens that were added keep what they are; rows of the embedding beyond them are unused."""
    folder = write_folder(tmp_path / "t")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([tokenizers.AddedToken("<|tool|>", special=True, normalized=False)])
    made.add_tokens([tokenizers.AddedToken("zebra", special=False, normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    fields, _ = tokenizer_fields(ours, 720, None)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 720
    assert types[tokens.index("<|tool|>")] == CONTROL and types[tokens.index("zebra")] == USER_DEFINED
    assert set(types[ours.vocab_size :]) == {UNUSED} and tokens[-1] == "[PAD719]"
    again = tokenizer_from_gguf(fields, "x.gguf")
    for text in ("a zebra <|tool|>", "[PAD719]", "<|tool|>"):
        for special in (False, True):
            assert again.encode(text, special=special) == ours.encode(text, special=special)
