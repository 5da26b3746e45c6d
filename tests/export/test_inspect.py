"""inspect_path says what a folder holds from headers alone, and names damage."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from tests.export.small_run import make_base, make_run, train_like

from tunesmith.errors import TunesmithError
from tunesmith.export.inspect import inspect_path
from tunesmith.model.load import load_model


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


def test_an_adapter_of_ours_says_what_it_needs_and_how_far_it_moved_each_layer(tmp_path):
    base = make_base(tmp_path / "base")
    run = make_run(
        tmp_path / "run", base, alpha=3, alpha_pattern={"q_proj": 5}, rslora=True, target_modules=["q_proj", "up_proj"]
    )
    report = inspect_path(run / "adapter")
    assert (report["method"], report["settings"]["rank"], report["tensors"]) == ("lora", 4, 8)
    assert report["needs"].keys() == {"base", "base_sha256", "template", "tokenizer_sha256"}
    adapter = train_like(load_model(base), {"kind": "lora", "rank": 4, **report["settings"]})
    squares = {0: 0.0, 1: 0.0}
    for place, delta in adapter.deltas.items():  # the full matrices
        squares[int(place.split(".")[2])] += float((delta.scale * (delta.B @ delta.A)).norm()) ** 2
    assert report["delta_norms"] == pytest.approx(
        {f"layer {i}": square**0.5 for i, square in squares.items()}, rel=1e-4
    )
    assert inspect_path(run)["saved_adapter"] == report


def test_full_fine_tuning_is_an_adapter_folder_too(tmp_path):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"), kind="full", by=0.01)
    report = inspect_path(run / "adapter")
    assert (report["kind"], report["method"], report["tensors"]) == ("adapter", "full", 21)
    assert "delta_norms" not in report


@pytest.mark.parametrize("values", [{"lora_alpha": "x"}, {"alpha_pattern": {"(a+)+": 1}}, {"alpha_pattern": [1]}])
def test_a_hostile_adapter_config_is_named(tmp_path, values):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"))
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(TunesmithError, match=f"adapter_config.json: {next(iter(values))}"):
        inspect_path(run / "adapter")
