"""Verification passes on what is whole, in a fresh process, and names every planted fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.data.conftest import write_folder
from tests.export.small_run import make_base, make_model, make_run, train_like

from tunesmith.errors import AdapterError, VerificationError
from tunesmith.export.probe import make_probe, read_probe, write_probe
from tunesmith.export.verify import verify_adapter, verify_path, verify_run
from tunesmith.files import MARKER, sha256_file
from tunesmith.model.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "r", base)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run folder of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "r"))


def failures(report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


def reseal(run: Path) -> None:
    """Write the marker's hashes anew, so that the fault itself has to be found."""
    marker = run / "adapter" / MARKER
    listed = json.loads(marker.read_text())
    for name, entry in listed["files"].items():
        file = run / "adapter" / name
        entry.update(bytes=file.stat().st_size, sha256=sha256_file(file))
    marker.write_text(json.dumps(listed))


def edit_weights(run: Path, change) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    reseal(run)


def edit_json(run: Path, change) -> None:
    path = run / "adapter" / "tunesmith.json"
    own = json.loads(path.read_text())
    change(own)
    path.write_text(json.dumps(own))
    reseal(run)


@pytest.mark.parametrize(
    ("rows", "taken"),
    [([40] * 10, [40] * 8), ([300] * 4, [256, 256]), ([0, 200, 200, 112, 1], [200, 200, 112]), ([3, 0], [3])],
)
def test_a_probe_is_a_few_hundred_tokens(rows: list[int], taken: list[int]) -> None:
    probe = make_probe([[1] * size for size in rows])
    assert list(probe.lengths) == taken and len(probe.tokens) == sum(taken)


def test_a_whole_run_passes_in_a_fresh_process(run):
    report = verify_run(run)
    assert report.passed, report.first_failure()
    assert [check.name for check in report.checks] == [
        "files", "tensors", "keys", "base", "reload", "dtype", "base logits", "live logits", "differs from base",
        "tokenizer", "template",
    ]  # fmt: skip
    details = {check.name: check.detail for check in report.checks}
    assert "a fresh process" in details["reload"] and not any(check.cure for check in report.checks)
    assert "equal bit for bit" in details["live logits"] and "KL" in details["differs from base"]
    written = json.loads((run / "verify.json").read_text())
    assert written == report.to_dict() and written["ok"] and written["versions"]["torch"] == torch.__version__
    report.raise_if_failed()


@pytest.mark.parametrize("spec", [{"init": "pissa"}, {"kind": "full"}], ids=["pissa", "full"])
def test_other_methods_pass(spec, base, tmp_path):
    report = verify_run(make_run(tmp_path / "r", base, **spec), fresh=False)
    assert report.passed, report.first_failure()


def test_bfloat16_is_replayed_in_bfloat16(base, tmp_path):
    report = verify_run(make_run(tmp_path / "r", base, torch.bfloat16), fresh=False)
    assert report.passed, report.first_failure()
    assert "bfloat16 throughout" in {check.detail for check in report.checks}


WEIGHTS = {
    "empty adapter": (lambda t: {}, {"tensors": "filtered twice", "reload": "filtered twice"}),
    "unmatched keys": (
        lambda t: {f"x.{k}": v for k, v in t.items()},
        {"keys": "no key that PEFT would find", "reload": "none of its 28 keys belongs"},
    ),
    "half of the keys": (lambda t: dict(list(t.items())[:9]), {"reload": "is missing"}),
    "zeroed B": (
        lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()},
        {"tensors": "every lora_B is zero", "live logits": "more than", "differs from base": "are equal"},
    ),
    "NaN": (
        lambda t: {k: v * float("nan") if i == 3 else v for i, (k, v) in enumerate(t.items())},
        {"tensors": "holds NaN", "reload": "holds NaN"},
    ),
    "rank": (
        lambda t: {k: v[:2].contiguous() if "lora_A" in k else v[:, :2].contiguous() for k, v in t.items()},
        {"reload": r"has shape [2, 32], expected [4, 32]"},
    ),
    "A and B of two modules swapped": (
        lambda t: swapped(t, "layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"),
        {"live logits": "more than 1e-05"},
    ),
    "one number changed": (
        lambda t: {k: v + (torch.arange(v.numel()).view_as(v) == 5) * 0.5 if i == 0 else v for i, (k, v) in
                   enumerate(t.items())},
        {"live logits": "more than 1e-05"},
    ),
}  # fmt: skip


def swapped(tensors, one: str, other: str):
    names = {key: key.replace(one, "\0").replace(other, one).replace("\0", other) for key in tensors}
    return {names[key]: value for key, value in tensors.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_fault_in_the_weights_is_named(name, run):
    change, expected = WEIGHTS[name]
    edit_weights(run, change)
    found = failures(verify_run(run, fresh=False))
    assert found.keys() == expected.keys()
    assert all(text in found[check] for check, text in expected.items()), found


def test_the_childs_own_error_comes_back(run):
    edit_weights(run, lambda t: dict(list(t.items())[:9]))
    report = verify_run(run)
    assert "a fresh process" in failures(report)["reload"] and "is missing" in failures(report)["reload"]
    with pytest.raises(VerificationError, match="reload: a fresh process: .*is missing"):
        report.raise_if_failed()
    assert VerificationError.exit_code == 4 and not json.loads((run / "verify.json").read_text())["ok"]


def test_one_flipped_byte(run):
    path = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    found = failures(verify_run(run, fresh=False))
    assert "adapter_model.safetensors: its SHA-256 differs" in found["files"]


def test_a_missing_file(run):
    (run / "adapter" / "tunesmith.json").unlink()
    assert "tunesmith.json" in failures(verify_run(run, fresh=False))["files"]
    (run / "adapter" / "adapter_config.json").unlink()
    assert "no adapter_config.json" in failures(verify_run(run, fresh=False))["reload"]


def test_alpha_changed(run):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    reseal(run)
    assert list(failures(verify_run(run, fresh=False))) == ["live logits"]


def test_wrong_base(run, base, tmp_path):
    other = make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, tmp_path / "other")
    found = failures(verify_run(run, base=tmp_path / "other", fresh=False))
    assert "adapter is for another base" in found["base"]
    assert {"base logits", "live logits"} <= found.keys()
    make_model(num_key_value_heads=4).save_pretrained(tmp_path / "wide")
    found = failures(verify_run(run, base=tmp_path / "wide", fresh=False))
    assert "num_key_value_heads 2 there, 4 here" in found["base"] and "has shape" in found["reload"]


def test_tokenizer_changed(run, tmp_path):
    base = make_base(tmp_path / "base")
    made = json.loads((base / "tokenizer.json").read_text())
    made["model"]["merges"] = made["model"]["merges"][:-60]
    (base / "tokenizer.json").write_text(json.dumps(made))
    found = failures(verify_run(run, base=base, fresh=False))
    assert found.keys() == {"tokenizer"} and "not the tokenizer of training" in found["tokenizer"]
    write_folder(base, eos="<|endoftext|>")
    assert "its hash differs" in failures(verify_run(run, base=base, fresh=False))["tokenizer"]


def test_a_tokenizer_too_big_for_the_model(run, tmp_path):
    make_model(vocab_size=300).save_pretrained(tmp_path / "base")
    write_folder(tmp_path / "base")
    found = failures(verify_run(run, base=tmp_path / "base", fresh=False))
    assert "the model embeds 300" in found["tokenizer"]
    assert "another model" in found["reload"]


def test_template_changed(run):
    def change(own):
        own["template"]["source"]["layout"] = {
            key: value.replace("Response", "Answer") if isinstance(value, str) else value
            for key, value in own["template"]["source"]["layout"].items()
        }

    edit_json(run, change)
    found = failures(verify_run(run, fresh=False))
    assert found.keys() == {"template"} and "does not render as it did in training" in found["template"]


def test_a_probe_that_is_gone_or_of_another_dtype(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("float32", "bfloat16"))
    assert "trained in float32, config.yaml says bfloat16" in failures(verify_run(run, fresh=False))["dtype"]
    (run / "verify_probe.safetensors").write_bytes(b"x" * 99)
    assert "no usable probe" in failures(verify_run(run, fresh=False))["live logits"]
    (run / "verify_probe.safetensors").unlink()
    assert "no usable probe" in failures(verify_run(run, fresh=False))["live logits"]


def test_the_probe_is_taken_without_dropout(base, tmp_path):
    """A model left in training mode draws other dropout at each pass: the probe must not."""
    model = load_model(base)
    train_like(model, {"kind": "lora", "dropout": 0.5})
    model.train()
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_probe(folder, model, [[5, 6, 7, 8]])
    a, b = (read_probe(tmp_path / name / "verify_probe.safetensors") for name in "ab")
    assert torch.equal(a.live, b.live) and not torch.equal(a.live, a.base) and model.training


def test_a_folder_of_peft(base, tmp_path):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "untrained")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "a")
    report = verify_path(tmp_path / "a", base, fresh=False)
    assert report.passed, report.first_failure()
    assert "files" not in {check.name for check in report.checks}
    assert not (tmp_path / "a" / "verify.json").exists()
    found = failures(verify_adapter(tmp_path / "untrained", base, fresh=False))
    assert found.keys() == {"tensors", "differs from base"}
    with pytest.raises(AdapterError, match="does not name its base model"):
        verify_adapter(tmp_path / "a")


def test_what_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: m}\n")
    with pytest.raises(AdapterError, match="not a finished run"):
        verify_path(tmp_path)
    with pytest.raises(AdapterError, match="no such adapter folder"):
        verify_path(tmp_path / "none")


@pytest.mark.smollm2
def test_smollm2_from_gguf(smollm2_gguf, tmp_path):
    report = verify_run(make_run(tmp_path / "r", smollm2_gguf, torch.bfloat16, by=0.003))
    assert report.passed, report.first_failure()
    assert "equal bit for bit" in {check.name: check.detail for check in report.checks}["live logits"]
