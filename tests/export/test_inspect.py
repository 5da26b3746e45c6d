"""inspect_path says what a folder holds from headers alone, and names damage."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from tunesmith.errors import TunesmithError
from tunesmith.export.inspect import inspect_path


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "runs" / "a" / "adapter"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "rank_pattern": {}, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"a.lora_A.weight": torch.zeros(4, 8), "a.lora_B.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_is_counted(adapter):
    report = inspect_path(adapter)
    assert (report["kind"], report["tensors"], report["parameters"]) == ("adapter", 2, 4 * 8 + 6 * 4)
    assert report["dtypes"] == ["BF16", "F32"]
    assert report["config"] == {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    assert inspect_path(adapter / "adapter_model.safetensors")["tensors"] == 2


def test_a_run_shows_its_settings_checkpoints_and_proof(adapter):
    run = adapter.parent
    (run / "config.yaml").write_text("model: {path: m}\ndata: {train: d}\nadapter: {kind: lora}\n")
    (run / "checkpoint-000002").mkdir()
    (run / "verify.json").write_text('{"ok": true}')
    report = inspect_path(run)
    assert (report["kind"], report["checkpoints"], report["verified"]) == ("run", ["checkpoint-000002"], True)
    assert report["model"] == {"path": "m"}
    assert report["saved_adapter"]["parameters"] == 56


def test_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    report = inspect_path(tmp_path)
    assert (report["kind"], report["parameters"], report["config"]) == ("model", 3, {"model_type": "llama"})


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 0), struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 9) + b'{"a": {}}', struct.pack("<Q", 6) + b'{"a":1',
     struct.pack("<Q", 20) + b'{"a": {"shape": 3}}  '],
)  # fmt: skip
def test_a_damaged_header_is_named(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(TunesmithError, match=r"a\.safetensors: "):
        inspect_path(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(TunesmithError, match=r"adapter_config\.json: "):
        inspect_path(tmp_path)
