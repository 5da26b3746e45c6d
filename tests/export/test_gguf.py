"""Our GGUF files are those of llama.cpp's converter, tensor by tensor, and llama.cpp computes from them what we do."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.model import checkpoints
from tests.tokenizer import vocabularies
from tests.tokenizer.llama_cpp import LlamaCpp

from tunesmith.errors import ConfigError, DiskError, ModelError
from tunesmith.export.gguf import (
    TYPES,
    GgufModel,
    check_type,
    metadata_of,
    read_back,
    rounded,
    stored_as,
    write_gguf,
)
from tunesmith.export.gguf_lora import write_lora
from tunesmith.export.gguf_tokenizer import tokenizer_fields
from tunesmith.export.readback import forced
from tunesmith.model.config import ModelConfig
from tunesmith.model.load import load_model
from tunesmith.tokenizer.gguf_vocabulary import tokenizer_from_gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="NOT TESTED: what llama.cpp computes; install xllamacpp (in the extra test)",
)
FIELDS = vocabularies.byte_level_fields(vocabularies.byte_level(), "smollm")
TOKENIZER = tokenizer_from_gguf(FIELDS, "x.gguf")
PROMPTS = [[10, 20, 30, 40], list(range(100, 140)), [7]]
# llama.cpp has no window on qwen2, and no such biases on qwen3: test_what_llama_cpp_cannot_compute_is_refused.
FAMILIES = [name for name in checkpoints.FAMILIES if name not in ("qwen2-window", "qwen3-bias", "mistral-window")]


def subject(family: str, **changes: Any) -> tuple[Any, GgufModel]:
    """transformers' model of a family, and the same as we export it."""
    reference = checkpoints.reference(family, vocab_size=TOKENIZER.vocab_size, **changes)
    config = ModelConfig.from_hf(reference.config.to_dict())
    state = reference.state_dict()
    tensors = {name: state[name] for name in config.weight_shapes()}
    fields, notes = tokenizer_fields(TOKENIZER, config.vocab_size, None)
    assert notes == []
    return reference, GgufModel(config, tensors, fields, "tiny")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys, and tensors with their types, as the gguf library reads them."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_sizes_are_the_converters(family: str, tmp_path: Path) -> None:
    reference, model = subject(family)
    checkpoints.write_gguf(tmp_path / "theirs.gguf", reference, extra=FIELDS)
    write_gguf(tmp_path / "ours.gguf", model, "F32")
    (keys, tensors), (wanted_keys, wanted) = contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf")
    assert tensors.keys() == wanted.keys()
    for name, (kind, data) in wanted.items():
        assert tensors[name][0] == kind
        assert (
            np.allclose(tensors[name][1], data, rtol=1e-6, atol=0)
            if "rope" in name
            else (np.array_equal(tensors[name][1], data))
        ), name
    for key, value in wanted_keys.items():
        assert keys[key] == value, key


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    """The same greedy tokens, and log-probabilities to 1e-3: a wrong order of rows or scale is off by whole units."""
    _, model = subject(family)
    write_gguf(tmp_path / "m.gguf", model, "F32")
    ours, server = load_model(tmp_path / "m.gguf"), LlamaCpp(tmp_path / "m.gguf")
    try:
        found = [server.greedy(prompt, 12) for prompt in PROMPTS]
    finally:
        server.close()
    logits = forced(ours, PROMPTS, [tokens for tokens, _ in found], ()).log_softmax(-1)
    assert logits.argmax(-1).tolist() == [token for tokens, _ in found for token in tokens]
    start = 0
    for tokens, likeliest in found:
        best = logits[start : start + len(tokens)].topk(2).values
        if len(likeliest) == len(tokens):  # the server leaves out tokens that end within a character
            assert torch.allclose(best, torch.tensor(likeliest, dtype=torch.float64), atol=1e-3)
        start += len(tokens)


@pytest.mark.parametrize("kind", TYPES)
def test_types_are_the_gguf_librarys_and_load_as_such(kind: str, tmp_path: Path) -> None:
    reference, model = subject("llama")
    assert write_gguf(tmp_path / "m.gguf", model, kind) == []
    assert read_back(tmp_path / "m.gguf", model, kind).endswith(f"{len(model.tensors)} tensors, each as written")
    keys, tensors = contents(tmp_path / "m.gguf")
    assert keys["general.file_type"] == TYPES[kind][0]
    stored = {name: found.name for name, (found, _) in tensors.items()}
    assert stored["blk.0.attn_q.weight"] == kind and stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["token_embd.weight"] == TYPES[kind][1]
    loaded = load_model(tmp_path / "m.gguf").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded[name].double(), rounded(name, tensor, kind)), name


def test_rows_that_are_no_whole_blocks_stay_in_f16(tmp_path: Path) -> None:
    _, model = subject("llama", intermediate_size=80)
    odd = write_gguf(tmp_path / "m.gguf", model, "Q4_0")
    assert odd == [f"blk.{i}.ffn_down.weight" for i in range(3)]
    assert stored_as("blk.0.ffn_down.weight", (64, 80), "Q4_0") == "F16"
    assert contents(tmp_path / "m.gguf")[1]["blk.0.ffn_down.weight"][0].name == "F16"


def test_a_window_of_mistrals_is_the_length_up_to_which_llama_cpp_agrees(tmp_path: Path) -> None:
    _, model = subject("mistral-window")
    assert metadata_of(model.config)["llama.context_length"] == 5
    write_gguf(tmp_path / "m.gguf", model, "F32")
    again = load_model(tmp_path / "m.gguf").config
    assert (again.model_type, again.sliding_window, again.window_layers) == ("mistral", 5, (0, 1, 2))


def test_what_llama_cpp_cannot_compute_is_refused() -> None:
    for family, line in (("qwen2-window", "qwen2 has no sliding window"), ("qwen3-bias", "qwen3 has no biases")):
        with pytest.raises(ModelError, match=line):
            metadata_of(subject(family)[1].config)
    scaled = replace(subject("qwen2")[1].config, rope_scaling=subject("llama3-rope")[1].config.rope_scaling)
    with pytest.raises(ModelError, match="does not read Llama 3's rotary scaling"):
        metadata_of(scaled)


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    _, model = subject("llama")
    tensors = {**model.tensors, "model.layers.1.mlp.up_proj.weight": torch.full((96, 64), 1e6)}
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight does not fit into F16.*--type F32"):
        write_gguf(tmp_path / "m.gguf", replace(model, tensors=tensors), "F16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = subject("llama")

    def full(self: Any, tensor: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(DiskError, match=r"m.gguf: could not be written \([\d,]+ bytes needed\): No space left"):
        write_gguf(tmp_path / "m.gguf", model, "F16")
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_told(tmp_path: Path) -> None:
    assert check_type("q8_0") == "Q8_0" and check_type(None) == "F16"
    with pytest.raises(ConfigError, match=r"'Q4_K_M' is not known.*llama-quantize"):
        check_type("Q4_K_M")


@pytest.mark.parametrize("damage", ["order", "value"])
def test_the_reading_back_bites(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose q is in Hugging Face's order, or that holds one wrong number, is not what was meant."""
    from tunesmith.export import gguf as ours

    _, model = subject("llama")
    if damage == "order":
        monkeypatch.setattr(ours, "in_pairs", lambda name, tensor, config: tensor)
        write_gguf(tmp_path / "m.gguf", model, "F32")
        monkeypatch.undo()
    else:
        write_gguf(tmp_path / "m.gguf", model, "F32")
        data = bytearray((tmp_path / "m.gguf").read_bytes())
        data[-1000] ^= 64
        (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="the gguf library reads other numbers for"):
        read_back(tmp_path / "m.gguf", model, "F32")


LORAS = {
    "plain": {"kind": "lora", "rank": 3},
    "ranks": {"kind": "lora", "rank": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3.0}},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True, "target_modules": ["q_proj", "k_proj"]},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa", "target_modules": ["q_proj", "down_proj"]},
    "adalora": {"kind": "adalora", "init_rank": 4, "target_rank": 2},
    "head and embedding": {"kind": "lora", "rank": 2, "target_modules": ["embed_tokens", "lm_head"]},
}


@needs_llama_cpp
@pytest.mark.parametrize("spec", LORAS)
def test_a_lora_beside_its_base_does_in_llama_cpp_what_it_does_here(spec: str, tmp_path: Path) -> None:
    from tests.export.small_run import train_like

    _, model = subject("llama")
    write_gguf(tmp_path / "m.gguf", model, "F32")
    ours = load_model(tmp_path / "m.gguf")
    adapter = train_like(ours, LORAS[spec], 0.2)
    write_lora(tmp_path / "lora.gguf", adapter, model.config, "F32", spec)
    server = LlamaCpp(tmp_path / "m.gguf", tmp_path / "lora.gguf")
    try:
        with_it = [server.greedy(prompt, 12, 1.0)[0] for prompt in PROMPTS]
        without = [server.greedy(prompt, 12, 0.0)[0] for prompt in PROMPTS]
    finally:
        server.close()
    assert with_it != without
    for tokens, names in ((with_it, ("default",)), (without, ())):
        chosen = forced(ours, PROMPTS, tokens, names).argmax(-1)
        assert chosen.tolist() == [token for row in tokens for token in row]
