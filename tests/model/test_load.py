"""Loaded models equal transformers' on the same files; files that are not right are refused in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.errors import ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_weights import gguf_name, hf_name
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_config, load_model, model_identity

_spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("checkpoints.py"))
checkpoints: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checkpoints)

TOKENS = torch.tensor([1, 5, 90, 33, 7, 7, 64, 12, 80, 3, 41, 2, 19, 55])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.reference("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    layout = Layout.single(len(TOKENS))
    ctx = model.context(layout)
    return model.logits(model.run(TOKENS, ctx), ctx)


def assert_equal_logits(path: Path, reference: Any, dtype: torch.dtype) -> None:
    model = load_model(path, dtype=dtype)
    with torch.no_grad():
        wanted = reference(TOKENS[None]).logits[0]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    error = (logits(model) - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_logits_equal_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = checkpoints.reference(family, dtype)
    reference.save_pretrained(tmp_path)
    assert_equal_logits(tmp_path, reference, dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sharded_folder_loads_the_same(family: str, tmp_path: Path) -> None:
    reference = checkpoints.reference(family)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_logits(tmp_path, reference, torch.float32)


@pytest.mark.parametrize("family", [f for f in checkpoints.FAMILIES if f != "qwen2-window"])
def test_gguf_loads_the_identical_tensors(family: str, tmp_path: Path) -> None:
    reference = checkpoints.reference(family)
    extra = {"llama.attention.sliding_window": 5} if family == "mistral-window" else {}
    checkpoints.write_gguf(tmp_path / "model.gguf", reference, extra=extra)
    loaded = load_model(tmp_path / "model.gguf").state_dict()
    wanted = reference.state_dict()
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor), name
    assert_equal_logits(tmp_path / "model.gguf", reference, torch.float32)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_gguf_equals_the_gguf_library(quant: str, tmp_path: Path) -> None:
    reference = checkpoints.reference("llama-tied")
    worth = checkpoints.write_gguf(tmp_path / "model.gguf", reference, quant)
    loaded = load_model(tmp_path / "model.gguf").state_dict()
    for name, values in worth.items():
        assert np.array_equal(loaded[name].numpy(), values), name


@pytest.mark.parametrize("quant", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_equal_the_gguf_library(quant: str, tmp_path: Path) -> None:
    """gguf cannot write these: random finite blocks are; sizes beyond one piece of the reader are covered too."""
    kind = gguf.GGMLQuantizationType[quant]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    rows, columns = 1000, 1024
    raw = rng.integers(
        0, 60, (rows, columns // block * width), dtype=np.uint8
    )  # small bytes: float16 scales stay finite
    path = _tiny_gguf(tmp_path, {"token_embd.weight": (raw, kind)}, vocab=rows, hidden=columns)
    loaded = load_model(path).state_dict()["model.embed_tokens.weight"]
    assert np.array_equal(loaded.numpy(), gguf.dequantize(raw, kind))


def test_names_map_both_ways() -> None:
    config = ModelConfig("qwen3", 10, 8, 8, 12, 2, 1, 4, qk_norm=True, qkv_bias=True, o_bias=True)
    names = list(config.weight_shapes())
    assert [hf_name(gguf_name(name)) for name in names] == names
    assert hf_name("blk.0.ffn_gate_exps.weight") is None


def test_fp16_overflow_is_named(folder: Path) -> None:
    _change(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(1e5))
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*NaN or infinity.*bfloat16"):
        load_model(folder, dtype=torch.float16)


def test_missing_wrong_and_unexpected_tensors_are_all_listed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(3):
            del tensors[f"model.layers.{i}.self_attn.q_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(3)
        tensors["alien.weight"] = torch.ones(3)
        for i in range(8):
            tensors[f"bogus.{i}"] = torch.ones(1)

    _change(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "13 bad tensors" in text and "and 3 more" in text and "\n" not in text
    assert "layers.2.self_attn.q_proj.weight is missing" in text
    assert "model.norm.weight has shape [3], the config says [64]" in text
    assert "alien.weight is not part of a llama model" in text


def test_harmless_rotary_buffers_are_ignored(folder: Path) -> None:
    _change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load_model(folder).config.num_hidden_layers == 3


def test_more_layers_in_the_file_than_in_the_config(folder: Path) -> None:
    _change_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"layers\.2\..*not part of"):
        load_model(folder)


def test_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    checkpoints.reference("llama-tied").save_pretrained(tmp_path)
    _change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _change(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_model(tmp_path)
    _change_config(tmp_path, tie_word_embeddings=False)
    model = load_model(tmp_path)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    _change(folder, lambda t: t["model.layers.2.mlp.down_proj.weight"][3, 4].fill_(value))
    with pytest.raises(ModelError, match=r"1 bad tensors: model\.layers\.2\.mlp\.down_proj\.weight holds NaN"):
        load_model(folder)


def test_quantized_tensors_are_refused(folder: Path) -> None:
    _change(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I8"):
        load_model(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
            load_model(path)


def test_what_is_not_a_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="give the folder"):
        load_model(folder / "model.safetensors")
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "model-00001-of-00002.safetensors")
    weights.unlink()
    with pytest.raises(ModelError, match="index"):
        load_model(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="a model without weights"):
        load_model(folder)
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match="an adapter, not a model"):
        load_model(folder)
    (folder / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"give its own path: .*x\.gguf"):
        load_model(folder)


def test_shards_must_stay_in_the_folder_and_be_there(tmp_path: Path) -> None:
    checkpoints.reference("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shutil.copy(tmp_path / "m" / next(iter(whole["weight_map"].values())), tmp_path / "outside.safetensors")
    for bad, message in (("../outside.safetensors", "not the name"), ("gone.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"lm_head.weight": bad}}))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "m")
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelError, match="no weight_map"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8 + b"{}",
        (10).to_bytes(8, "little") + b"not json!!",
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (72).to_bytes(8, "little") + b'{"lm_head.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}    ',
        (72).to_bytes(8, "little") + b'{"lm_head.weight":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}   ',
        (72).to_bytes(8, "little") + b'{"lm_head.weight":{"dtype":"F32","shape":[1e9],"data_offsets":[0,3]}}   ',
        (36).to_bytes(8, "little") + b'{"lm_head.weight":{"dtype":"F32"}}  ',
        (20).to_bytes(8, "little") + b'{"lm_head.weight":1}',
    ],
)
def test_garbage_safetensors(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError, match=r"safetensors|download complete") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_identity_follows_the_content_not_the_path(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    sharded = tmp_path / "sharded"
    checkpoints.reference("llama").save_pretrained(sharded, max_shard_size="60KB")
    first = model_identity(folder)
    assert model_identity(copy) == first and model_identity(sharded) == first
    _change_config(copy, eos_token_id=5)
    assert model_identity(copy)["sha256"] == first["sha256"]
    _change_config(copy, rope_theta=20000.0, rope_parameters=None)
    assert model_identity(copy)["sha256"] != first["sha256"]
    _change(sharded.with_name("copy2"), lambda t: t["model.norm.weight"][0].add_(1), base=folder)
    assert model_identity(sharded.with_name("copy2"))["sha256"] != first["sha256"]
    assert json.loads(json.dumps(first)) == first


def test_load_config_reads_no_weights(folder: Path) -> None:
    assert load_config(folder) == load_model(folder).config


@pytest.mark.smollm2
def test_smollm2(smollm2_gguf: Path) -> None:
    model = load_model(smollm2_gguf, dtype=torch.bfloat16)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 1e5, True)
    assert (config.eos_token_ids, config.pad_token_id) == ((2,), 2)
    reader = gguf.GGUFReader(smollm2_gguf)
    stored = {t.name: t for t in reader.tensors}
    for name, tensor in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:
            continue  # permuted; test_gguf_loads_the_identical_tensors covers them
        theirs = stored[gguf_name(name) if name != "lm_head.weight" else "token_embd.weight"]
        values = gguf.dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
        assert torch.equal(tensor, torch.from_numpy(np.array(values)).bfloat16()), name


def _change(folder: Path, change: Any, base: Path | None = None) -> None:
    """Rewrite the folder's (or a copy of `base`'s) weights after `change(tensors)`."""
    if base is not None:
        shutil.copytree(base, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tiny_gguf(tmp_path: Path, tensors: dict[str, Any], vocab: int, hidden: int) -> Path:
    """A one-layer llama of zeros, but for `tensors`."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    config = ModelConfig("llama", vocab, hidden, 32, 1, 2, 2, hidden // 2, tie_word_embeddings=True)
    for name, shape in config.weight_shapes().items():
        theirs = gguf_name(name)
        if theirs in tensors:
            values, kind = tensors[theirs]
            writer.add_tensor(theirs, values, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
