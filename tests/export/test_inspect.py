"""inspect_path says what a folder holds from headers alone, and names damage."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.small_run import make_base, make_run, train_like
from tests.laws.small import build, disturb
from tests.laws.variants import VARIANTS

from tunesmith.adapters import attach, kinds
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.cli import main
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


@pytest.mark.parametrize("kind", kinds())
def test_an_adapter_of_every_kind_tells_what_it_is(kind, tmp_path, capsys):
    for i, settings in enumerate([{}, *VARIANTS.get(kind, [])]):
        adapter = attach(build(dtype=torch.float32), {**settings, "kind": kind})
        disturb(adapter)
        folder = tmp_path / str(i)
        folder.mkdir()
        save_adapter(folder, adapter, base="tiny", identity={"sha256": "ab"})
        report = inspect_path(folder)
        assert (report["kind"], report["method"], report["needs"]["base"]) == ("adapter", kind, "tiny")
        assert report["mergeable"] is adapter.method.mergeable(adapter.settings)
        tensors = load_file(next(folder.glob("*.safetensors")))
        assert (report["tensors"], report["parameters"]) == (len(tensors), sum(t.numel() for t in tensors.values()))
        told = sum(value**2 for part in report.get("norms", {}).values() for value in part.values())
        held = {key: t for key, t in tensors.items() if t.is_floating_point()}
        if "delta_norms" in report:
            assert kind == "lora" and set(report["delta_norms"]) <= {
                "layer 0",
                "layer 1",
                "lm_head",
                "model.embed_tokens",
            }
            held = {key: t for key, t in held.items() if ".lora_" not in key}
        assert told == pytest.approx(sum(float(t.double().square().sum()) for t in held.values()), rel=1e-4)
        assert main(["inspect", str(folder)]) == 0
        assert f"method                       {kind}\n" in capsys.readouterr().out


def test_norms_stand_by_layer(tmp_path):
    adapter = attach(build(dtype=torch.float32), {"kind": "prefix", "virtual_tokens": 3})
    disturb(adapter)
    save_adapter(tmp_path, adapter, base="tiny", identity={})
    (prompts,) = load_file(tmp_path / "adapter_model.safetensors").values()
    first, second = prompts.double().chunk(2, dim=1)  # of two layers, keys and values in turn
    assert inspect_path(tmp_path)["norms"] == {
        "layer 0": {"prompt_embeddings": pytest.approx(float(first.norm()), rel=1e-5)},
        "layer 1": {"prompt_embeddings": pytest.approx(float(second.norm()), rel=1e-5)},
    }


def test_a_method_of_another_version_is_told(tmp_path):
    adapter = attach(build(dtype=torch.float32), {"kind": "bitfit"})
    save_adapter(tmp_path, adapter, base="tiny", identity={})
    own = json.loads((tmp_path / "tunesmith.json").read_text())
    (tmp_path / "tunesmith.json").write_text(json.dumps({**own, "kind": "bitfitt"}))
    report = inspect_path(tmp_path)
    assert "did you mean 'bitfit'" in report["not_understood"] and report["parameters"] == own["parameters"]


def test_a_lora_on_the_embedding_is_measured_too(tmp_path):
    adapter = attach(
        build(dtype=torch.float32), {"kind": "lora", "rank": 2, "target_modules": ["embed_tokens", "q_proj"]}
    )
    disturb(adapter)
    save_adapter(tmp_path, adapter, base="tiny", identity={})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{letter}"].double() for letter in "AB")
    found = inspect_path(tmp_path)
    assert found["delta_norms"]["model.embed_tokens"] == pytest.approx(float(2 * (B @ A).norm()), rel=1e-5)
    assert "norms" not in found
