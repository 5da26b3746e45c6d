"""Tokenizers of Hugging Face folders: ids equal transformers' and sentencepiece's; wrong settings are named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tunesmith.errors import TokenizerError
from tunesmith.model.config import ModelConfig
from tunesmith.tokenizer import check_fits, load_tokenizer
from tunesmith.tokenizer.fast import _PREFIXING, FastEngine, _without_prefix

_spec = importlib.util.spec_from_file_location("vocabularies", Path(__file__).with_name("vocabularies.py"))
vocabularies: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vocabularies)

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def _config(vocab: int = 700, **changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ModelConfig.from_hf({"model_type": "llama", "vocab_size": vocab} | sizes | changes)


@pytest.fixture
def byte_folder(tmp_path: Path) -> Path:
    """A Llama-3-like folder: byte-level, BOS put first by the file's post-processor."""
    tokenizer = vocabularies.byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES})
    return tmp_path


@pytest.fixture
def spm_folder(tmp_path: Path) -> Path:
    """A LLaMA-1-like folder: tokenizer.model and little else."""
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model())
    _write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    return tmp_path


def _metaspace_folder(folder: Path, legacy: bool) -> Path:
    """A Llama-2-like tokenizer.json: the dummy prefix as a normalizer (legacy) or in the pre-tokenizer."""
    letters = {chr(c) for c in range(33, 127)} | {"\u2581"}
    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *sorted(letters)])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "tokenizer_config.json", ROLES)
    return folder


def test_tokenizer_json_equals_transformers(byte_folder: Path) -> None:
    import transformers

    ours = load_tokenizer(byte_folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(byte_folder)
    for text in vocabularies.CORPUS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert [1] * ours.add_bos + ids == theirs.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (1, 2, None, True)
    check_fits(ours, _config())


def test_tokenizer_model_equals_sentencepiece(spm_folder: Path) -> None:
    ours = load_tokenizer(spm_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    for text in vocabularies.CORPUS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
        assert ours.encode(text) == ours.encode(text, special=True) or "<" in text
    assert (ours.bos_id, ours.eos_ids, ours.pad_id, ours.add_bos) == (1, (2,), None, True)
    check_fits(ours, _config())


def test_space_after_special_tokens_follows_legacy(spm_folder: Path) -> None:
    """transformers: legacy puts the dummy space after every special token, otherwise only before the text."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    ours = load_tokenizer(spm_folder)
    assert ours.encode("a</s>b", special=True) == [*theirs.encode("a"), 2, *theirs.encode("b")]
    _write(spm_folder, "tokenizer_config.json", {"legacy": False})
    ours = load_tokenizer(spm_folder)
    bare = ours.encode("b", continuation=True)
    assert ours.encode("a</s>b", special=True) == [*theirs.encode("a"), 2, *bare] and bare != theirs.encode("b")


@pytest.mark.parametrize("legacy", [True, False])
def test_every_setting_is_the_file_that_says_so(tmp_path: Path, legacy: bool) -> None:
    """Settings share one vocabulary; each is what reading a tokenizer.json with that setting would give."""
    folder = _metaspace_folder(tmp_path, legacy)
    engine = FastEngine.parse((folder / "tokenizer.json").read_text(), "here")
    text = json.loads(engine.files()["tokenizer.json"])
    for continuation in (False, True):
        spec = text | ({k: _without_prefix(text.get(k)) for k in _PREFIXING} if continuation else {})
        expected = tokenizers.Tokenizer.from_str(json.dumps(spec)).to_str()
        for special in (False, True):
            assert engine._build(special, continuation).to_str() == expected
    assert expected != engine.files()["tokenizer.json"].decode()


@pytest.mark.parametrize("legacy", [True, False])
def test_continuation_leaves_out_the_dummy_prefix_of_tokenizer_json(tmp_path: Path, legacy: bool) -> None:
    ours = load_tokenizer(_metaspace_folder(tmp_path, legacy))
    assert [ours.token(i) for i in ours.encode("ab c")] == ["\u2581", "a", "b", "\u2581", "c"]
    assert [ours.token(i) for i in ours.encode("ab c", continuation=True)] == ["a", "b", "\u2581", "c"]
    assert [ours.token(i) for i in ours.encode("</s>é", special=True, continuation=True)] == [
        "</s>",
        "<0xC3>",
        "<0xA9>",
    ]
    assert 2 not in ours.encode("</s>") and 2 not in ours.encode("</s>", continuation=True)
    stream = ours.streamer()
    ids = ours.encode("say é 🙂 now")
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) == "say é 🙂 now" and "🙂" in "".join(pieces) and "\ufffd" not in "".join(pieces)


def test_added_tokens_of_a_sentencepiece_folder(spm_folder: Path) -> None:
    added = {"700": {"content": "<pad>", "special": True}, "701": {"content": "[TOOL]", "special": False}}
    _write(spm_folder, "tokenizer_config.json", {"added_tokens_decoder": added, "pad_token": "<pad>", "legacy": False})
    ours = load_tokenizer(spm_folder)
    assert (ours.pad_id, ours.vocab_size, ours.id("[TOOL]"), ours.token(701)) == (700, 702, 701, "[TOOL]")
    assert 701 in ours.encode("use [TOOL] now") and 700 not in ours.encode("<pad>")
    assert ours.decode(ours.encode("use [TOOL] now")) == "use [TOOL] now"
    ours.save(spm_folder / "saved")
    assert load_tokenizer(spm_folder / "saved").fingerprint() == ours.fingerprint()
    with pytest.raises(TokenizerError, match="has 702 tokens, the model embeds 700"):
        check_fits(ours, _config(700))
    _write(spm_folder, "tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<pad>"}}})
    with pytest.raises(TokenizerError, match="id 5 is .* do they fit"):
        load_tokenizer(spm_folder)


def test_all_eos_tokens_are_found(byte_folder: Path) -> None:
    _write(byte_folder, "generation_config.json", {"eos_token_id": [4, 2]})
    assert load_tokenizer(byte_folder).eos_ids == (2, 4)
    (byte_folder / "generation_config.json").unlink()
    _write(byte_folder, "config.json", {"eos_token_id": [4, 3], "pad_token_id": 4})
    ours = load_tokenizer(byte_folder)
    assert (ours.eos_ids, ours.pad_id) == ((2, 4, 3), 4)
    ours.save(byte_folder / "saved")
    assert load_tokenizer(byte_folder / "saved").eos_ids == (2, 4, 3)


def test_padding_may_be_eos(byte_folder: Path) -> None:
    _write(byte_folder, "tokenizer_config.json", ROLES | {"pad_token": "</s>"})
    ours = load_tokenizer(byte_folder)
    assert ours.pad_id == ours.eos_id == 2
    check_fits(ours, _config())


def test_chat_template_of_each_place(byte_folder: Path) -> None:
    _write(byte_folder, "tokenizer_config.json", ROLES | {"chat_template": "A"})
    assert load_tokenizer(byte_folder).chat_template == "A"
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    _write(byte_folder, "tokenizer_config.json", ROLES | {"chat_template": named})
    assert load_tokenizer(byte_folder).chat_template == "C"
    (byte_folder / "chat_template.jinja").write_text("D")
    assert load_tokenizer(byte_folder).chat_template == "D"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": None}, "no EOS token is named.*eos_token"),
        ({"eos_token": "<|end|>"}, r"eos_token '<\|end\|>' is not in the vocabulary"),
        ({"bos_token": {"content": "<begin>"}}, "bos_token '<begin>' is not in the vocabulary"),
        ({"added_tokens_decoder": {"x": {"content": "<y>"}}}, "added token '<y>' has the id 'x'"),
        ({"added_tokens_decoder": {"9000": {"content": "<y>"}}}, "'<y>' has id 700, added_tokens_decoder says 9000"),
        ({"eos_token_ids": [-3]}, "eos_token_ids"),
    ],
)
def test_wrong_settings_are_named(byte_folder: Path, settings: dict[str, Any], message: str) -> None:
    _write(byte_folder, "tokenizer_config.json", ROLES | settings)
    with pytest.raises(Exception, match=message) as caught:
        check_fits(load_tokenizer(byte_folder), _config())
    assert type(caught.value).__module__ == "tunesmith.errors" and "\n" not in str(caught.value)


def test_eos_without_a_token_is_found(byte_folder: Path) -> None:
    _write(byte_folder, "generation_config.json", {"eos_token_id": 5000})
    with pytest.raises(TokenizerError, match=r"eos id 5000 is not in the vocabulary \(700\)"):
        check_fits(load_tokenizer(byte_folder), _config(10000))


def test_eos_that_is_an_ordinary_token_is_made_special_or_found(byte_folder: Path) -> None:
    """ "the" as EOS by id: every "the" in a text would end it."""
    ordinary = load_tokenizer(byte_folder).encode("e")[0]
    _write(byte_folder, "generation_config.json", {"eos_token_id": [2, ordinary]})
    with pytest.raises(TokenizerError, match="is not a special token"):
        check_fits(load_tokenizer(byte_folder), _config())


def test_swapped_bos_and_eos_of_early_llama_conversions(spm_folder: Path) -> None:
    config = {"bos_token_id": 0, "eos_token_id": 1}
    _write(spm_folder, "config.json", config)
    ours = load_tokenizer(spm_folder)
    assert ours.eos_ids == (2,)
    with pytest.raises(TokenizerError, match="set eos_token_id to 2 in config.json"):
        check_fits(ours, _config(**config))


def test_missing_and_damaged_files(tmp_path: Path, byte_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="no tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    whole = (byte_folder / "tokenizer.json").read_bytes()
    for damaged in (b"", b"{}", whole[:1000], b"[" * 100000, b'{"model": {"type": "BPE", "vocab": {"a": -1}}}'):
        (byte_folder / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(TokenizerError, match="tokenizer.json") as caught:
            load_tokenizer(byte_folder)
        assert "\n" not in str(caught.value)
    (byte_folder / "tokenizer.json").unlink()
    for damaged in (b"", b"garbage", vocabularies.sentencepiece_model()[:3000]):
        (byte_folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(TokenizerError, match="tokenizer.model"):
            load_tokenizer(byte_folder)
    (byte_folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match="tokenizer_config.json: holds a list"):
        load_tokenizer(byte_folder)


def test_fingerprint_tells_tokenizers_apart(byte_folder: Path) -> None:
    first = load_tokenizer(byte_folder).fingerprint()
    assert load_tokenizer(byte_folder).fingerprint() == first == json.loads(json.dumps(first))
    _write(byte_folder, "tokenizer_config.json", ROLES | {"eos_token": "<|im_end|>"})
    other = load_tokenizer(byte_folder).fingerprint()
    assert other["sha256"] != first["sha256"] and other["golden"] == first["golden"]
