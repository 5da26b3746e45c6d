"""Tokenizers built from GGUF metadata give llama.cpp's own ids; unknown or broken vocabularies are refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.errors import TokenizerError
from tunesmith.model.load import load_config
from tunesmith.tokenizer import Tokenizer, check_fits, load_tokenizer
from tunesmith.tokenizer.gguf_vocabulary import tokenizer_from_gguf


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vocabularies, llama_cpp = _load("vocabularies"), _load("llama_cpp")
KINDS = ["smollm", "gpt-2", "llama-bpe", "qwen2", "sentencepiece"]
Pair = tuple[Tokenizer, Any]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Our tokenizer and llama.cpp's, from the same small file."""
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    if request.param == "sentencepiece":
        fields = vocabularies.sentencepiece_fields(vocabularies.sentencepiece_model())
    else:
        fields = vocabularies.byte_level_fields(vocabularies.byte_level(), request.param)
    vocabularies.write_gguf(path, fields)
    theirs = llama_cpp.LlamaCpp(path)
    yield load_tokenizer(path), theirs
    theirs.close()


def _assert_equal(pair: Pair, text: str) -> None:
    ours, theirs = pair
    for special in (False, True):
        ids = ours.encode(text, special=special)
        assert ids == theirs.tokens(text, special=special), (text, special)
    # sentencepiece writes a space as U+2581 and cannot tell the two apart afterwards
    assert ours.decode(ours.encode(text)) in (text, text.replace("\u2581", " "))


@pytest.mark.parametrize("text", vocabularies.CORPUS)
def test_ids_equal_llama_cpps(pair: Pair, text: str) -> None:
    _assert_equal(pair, text)


# No NUL: the C++ side ends a text there. Nothing newer than both libraries' tables of Unicode.
_letters = st.text(
    st.one_of(
        st.characters(min_codepoint=1, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn")),
        st.characters(min_codepoint=0x1F300, max_codepoint=0x1F64F, exclude_categories=("Cn",)),
        st.sampled_from("  \n\t\r'<>|0123456789你好한\u0301"),
    ),
    max_size=20,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(_letters, st.sampled_from(vocabularies.CORPUS[:19])), max_size=3))
def test_random_text_equals_llama_cpps(pair: Pair, parts: list[str]) -> None:
    _assert_equal(pair, "".join(parts))


def test_what_the_models_tokenizer_adds(pair: Pair) -> None:
    ours, theirs = pair
    assert theirs.tokens("Hello", bos=True) == [ours.bos_id] * ours.add_bos + ours.encode("Hello")


def test_users_text_never_becomes_a_special_token(pair: Pair) -> None:
    ours, _ = pair
    assert ours.special_tokens
    for token, index in ours.special_tokens.items():
        for text in (token, f"a{token}b", f" {token} ", token * 2):
            assert index not in ours.encode(text) and index not in ours.encode(text, continuation=True)
            assert index in ours.encode(text, special=True)
        assert ours.encode(token, special=True) == [index] and ours.token(index) == token and ours.id(token) == index
        assert ours.decode([index]) == "" and ours.decode([index], skip_special=False) == token


def test_pieces_of_a_text_join_at_special_tokens(pair: Pair) -> None:
    """continuation=True adds no space, so text cut into segments decodes to the whole."""
    ours, _ = pair
    ids = (
        ours.encode("Review: good")
        + ours.encode(" and cheap", continuation=True)
        + ours.encode("er", continuation=True)
    )
    assert ours.decode(ids) == "Review: good and cheaper"


def test_save_and_load_again(pair: Pair, tmp_path: Path) -> None:
    ours, _ = pair
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == ours.fingerprint()
    assert (again.bos_id, again.eos_ids, again.pad_id, again.add_bos) == (
        ours.bos_id,
        ours.eos_ids,
        ours.pad_id,
        ours.add_bos,
    )
    for text in vocabularies.CORPUS:
        for special in (False, True):
            assert again.encode(text, special=special) == ours.encode(text, special=special)
            assert again.encode(text, continuation=True) == ours.encode(text, continuation=True)


def test_transformers_reads_what_is_saved(pair: Pair, tmp_path: Path) -> None:
    import transformers

    ours, _ = pair
    ours.save(tmp_path)
    if (tmp_path / "tokenizer.model").exists():
        pytest.importorskip("google.protobuf")  # transformers reads sentencepiece models with it
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    # Its LlamaTokenizer no longer doubles a leading space, as sentencepiece and llama.cpp do.
    texts = [t for t in vocabularies.CORPUS if "<|im_end|>" in ours.special_tokens or t[:1] not in (" ", "<", "\u2581")]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, special=True), text


def test_stream_is_the_text(pair: Pair) -> None:
    ours, _ = pair
    for text in vocabularies.CORPUS:
        ids = ours.encode(text, special=True)
        stream = ours.streamer()
        pieces = [stream.push(index) for index in ids]
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
        assert "".join(pieces) + stream.flush() == ours.decode(ids)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 600), max_size=25))
def test_stream_of_any_ids_is_their_text(pair: Pair, ids: list[int]) -> None:
    ours, _ = pair
    stream = ours.streamer()
    assert "".join(stream.push(index) for index in ids) + stream.flush() == ours.decode(ids)


def test_lone_surrogates_are_replaced(pair: Pair) -> None:
    ours, _ = pair
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")
    assert ours.encode("\ud83d\ude42") == ours.encode("🙂")


def test_sentencepiece_out_of_gguf_equals_the_original_model(tmp_path: Path) -> None:
    model = vocabularies.sentencepiece_model()
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizer_from_gguf(vocabularies.sentencepiece_fields(model), "x.gguf")
    for text in vocabularies.CORPUS:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    without = vocabularies.sentencepiece_fields(model) | {"tokenizer.ggml.add_space_prefix": False}
    bare = tokenizer_from_gguf(without, "x.gguf")
    assert bare.encode("Hello") == ours.encode("Hello", continuation=True) != ours.encode("Hello")
    assert bare.decode(bare.encode(" Hello")) == " Hello"


def test_user_defined_tokens_are_matched_in_any_text(tmp_path: Path) -> None:
    fields = vocabularies.byte_level_fields(vocabularies.byte_level(), "smollm")
    fields["tokenizer.ggml.token_type"][3] = 4  # <|im_start|>
    path = vocabularies.write_gguf(tmp_path / "m.gguf", fields)
    ours, theirs = load_tokenizer(path), llama_cpp.LlamaCpp(path)
    text = "a <|im_start|>b<|im_end|>"
    try:
        assert ours.encode(text) == theirs.tokens(text) and 3 in ours.encode(text)
    finally:
        theirs.close()
    assert "<|im_start|>" not in ours.special_tokens


def _fields(**changes: Any) -> dict[str, Any]:
    fields = vocabularies.byte_level_fields(vocabularies.byte_level(300), "smollm")
    return {k: v for k, v in (fields | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}).items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"model": "llama"}, "scores"),
        ({"pre": None}, "tokenizer.ggml.pre is 'None'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'.*known: gpt-2, smollm"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a"] * 300}, "token_type|twice"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b c"]}, "every merge is two tokens"),
        ({"merges": ["zzz yyy"]}, "not a tokenizer that can be used"),
        ({"token_type": [1, 2]}, "a type"),
        ({"token_type": [99] * 300}, "a type"),
        ({"eos_token_id": 300}, "eos_token_id 300 is not one of"),
        ({"bos_token_id": "x"}, "bos_token_id x"),
    ],
)
def test_broken_vocabularies_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf(_fields(**changes), "x.gguf")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("x.gguf")


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Pair]:
    theirs = llama_cpp.LlamaCpp(smollm2_gguf)
    yield load_tokenizer(smollm2_gguf), theirs
    theirs.close()


@pytest.mark.smollm2
def test_smollm2_ids_equal_llama_cpps(smollm2: Pair) -> None:
    for text in vocabularies.CORPUS:
        _assert_equal(smollm2, text)
    ours, _ = smollm2
    assert ours.encode("2024") == ours.encode("2") + ours.encode("0") + ours.encode("2") + ours.encode("4")


@pytest.mark.smollm2
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=_letters)
def test_smollm2_random_text_equals_llama_cpps(smollm2: Pair, text: str) -> None:
    # Its vocabulary has no token for some control characters. Both drop them; tokenizers, and so the original
    # tokenizer.json, then merges across the gap, llama.cpp does not.
    ours, _ = smollm2
    _assert_equal(smollm2, "".join(c for c in text if ours.encode(c)))


@pytest.mark.smollm2
def test_smollm2_roles(smollm2: Pair, smollm2_gguf: Path) -> None:
    ours, _ = smollm2
    assert (ours.bos_id, ours.eos_ids, ours.pad_id, ours.add_bos, ours.vocab_size) == (1, (2,), 2, False, 49152)
    assert ours.token(2) == "<|im_end|>" and "add_generation_prompt" in ours.chat_template
    check_fits(ours, load_config(smollm2_gguf))
