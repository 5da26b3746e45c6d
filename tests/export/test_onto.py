"""An adapter trained on a quantized base is merged onto the 16-bit model that this base was made from, and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.export.small_run import VOCAB, logits, make_base, train_like
from tests.export.test_formats import theirs
from tests.model import checkpoints
from tests.tiny import edit_json, edit_weights

from tunesmith.adapters.peft_format import load_adapter, read_info, save_adapter
from tunesmith.errors import CannotMerge, ConfigError, VerificationError
from tunesmith.export.onto import merge_subject, prepared
from tunesmith.export.quantize import quantize_model
from tunesmith.export.subject import Subject
from tunesmith.files import atomic_folder
from tunesmith.model.load import load_model, model_identity
from tunesmith.quant.storage import Spec
from tunesmith.tokenizer import load_tokenizer

TOKENS = torch.arange(5, 60) * 7 % VOCAB
NF4 = Spec("nf4", 16, False)
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("dense") / "dense", torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "nf4"
    quantize_model(dense, out, NF4)
    return out


def trained(base: Path, folder: Path, quant: Spec | None = None, by: float = 0.2) -> Subject:
    """An adapter on a base held in few bits, saved and loaded as a user's is."""
    tokenizer, identity = load_tokenizer(base), model_identity(base, quant)
    adapter = train_like(load_model(base, quant=quant), {"kind": "lora", "rank": 4}, by)
    with atomic_folder(folder) as staging:
        save_adapter(staging, adapter, base=str(base), identity=identity, tokenizer=tokenizer.fingerprint())
    model = load_model(base, quant=quant)
    return Subject(
        model, tokenizer, str(base), base, identity, load_adapter(folder, model, identity=identity), read_info(folder)
    )


def by_hand(dense: Path, subject: Subject) -> torch.Tensor:
    """Logits of the dense base with B A added to each weight, in float64."""
    model = load_model(dense, dtype=torch.float64)
    with torch.no_grad():
        for place, delta in subject.adapter.deltas.items():
            weight = model.get_submodule(place.removesuffix(".edit")).weight
            weight += delta.scale * (delta.B.double() @ delta.A.double())
    return logits(model, TOKENS)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_a_base_quantized_when_it_was_loaded(dense: Path, tmp_path: Path) -> None:
    """QLoRA's usual way: the file is the 16-bit base itself, and is known by its hash."""
    live = trained(dense, tmp_path / "adapter", NF4)
    report = merge_subject(live, tmp_path / "out", dtype="float32")
    assert near(theirs(tmp_path / "out").double(), by_hand(dense, live))
    assert report["base_name"] == str(dense) and report["base_sha256"] == model_identity(dense)["sha256"]
    assert report["base_checked"] == "the file that was quantized when it was loaded"
    assert 0 < report["kl_as_trained"] < 0.5 * report["kl_base"] and report["kl"] < 1e-9
    assert 0.5 < report["top1_as_trained"] <= 1 and report["top1_agreement"] == 1


def test_a_quantized_folder_says_what_it_was_made_from(quantized: Path, dense: Path, tmp_path: Path) -> None:
    live = trained(quantized, tmp_path / "adapter")
    report = merge_subject(live, tmp_path / "out", dtype="float32")
    assert near(theirs(tmp_path / "out").double(), by_hand(dense, live))
    assert report["base_name"] == str(dense) and report["base_checked"] == "the hash that nf4 was quantized from"


def test_into_what_the_bits_stand_for(quantized: Path, dense: Path, tmp_path: Path) -> None:
    """The model that was trained, exactly, as a dense one."""
    live = trained(quantized, tmp_path / "adapter")
    report = merge_subject(live, tmp_path / "out", onto="dequantized")
    assert report["dtype"] == "float32" and report["base_values"] == "nf4, dequantized"
    assert near(theirs(tmp_path / "out"), logits(live.model, TOKENS))
    assert not near(theirs(tmp_path / "out").double(), by_hand(dense, live))


def test_another_model_is_refused(quantized: Path, tmp_path: Path) -> None:
    live = trained(quantized, tmp_path / "adapter")
    other = make_base(tmp_path / "other", torch.bfloat16, **WIDE)
    edit_weights(other, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[0:1].add_(1))
    with pytest.raises(CannotMerge, match="is not the model that .*nf4 was quantized from"):
        merge_subject(live, tmp_path / "out", onto=str(other))
    assert not (tmp_path / "out").exists()


def unsaid(quantized: Path, folder: Path) -> Path:
    """The folder as another tool would have written it: it does not say what it was made from."""
    import shutil

    shutil.copytree(quantized, folder)
    edit_json(folder / "config.json", quantized_from=None)
    (folder / "COMPLETE").unlink()
    return folder


def test_without_a_hash_the_weights_are_compared(quantized: Path, dense: Path, tmp_path: Path) -> None:
    live = trained(unsaid(quantized, tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"its 16-bit original is not known; name it with --onto MODEL"):
        merge_subject(live, tmp_path / "out")
    report = merge_subject(live, tmp_path / "out", onto=str(dense), dtype="float32")
    assert report["base_checked"] == "7 weights equal, the quantized ones near"
    other = make_base(tmp_path / "other", torch.bfloat16, **WIDE)
    edit_weights(other, lambda tensors: tensors["model.norm.weight"][3:4].add_(1))
    with pytest.raises(CannotMerge, match="model.norm.weight of .* differs from that of"):
        merge_subject(live, tmp_path / "no", onto=str(other))
    edit_weights(other, lambda tensors: tensors["model.norm.weight"][3:4].sub_(1))
    edit_weights(other, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].normal_())
    with pytest.raises(CannotMerge, match="layers.1.mlp.up_proj.weight of .* is not what .* was quantized from"):
        merge_subject(live, tmp_path / "no", onto=str(other))
    small = make_base(tmp_path / "small", hidden_size=64, intermediate_size=64)
    with pytest.raises(CannotMerge, match="has other sizes"):
        merge_subject(live, tmp_path / "no", onto=str(small))


def test_a_recorded_name_is_never_fetched(quantized: Path, tmp_path: Path) -> None:
    folder = unsaid(quantized, tmp_path / "base")
    edit_json(folder / "config.json", quantized_from={"name": "evil/model", "sha256": "00"})
    with pytest.raises(ConfigError, match=r"not known \(evil/model, which is not there\)"):
        merge_subject(trained(folder, tmp_path / "adapter"), tmp_path / "out")


def test_a_gguf_base_onto_its_original(dense: Path, tmp_path: Path) -> None:
    """A Q8_0 file, expanded when it was loaded: by itself it is folded into as it is, with --onto into the original."""
    from tunesmith.export.gguf import GgufModel, write_gguf
    from tunesmith.export.gguf_tokenizer import tokenizer_fields

    model, tokenizer = load_model(dense), load_tokenizer(dense)
    fields, _ = tokenizer_fields(tokenizer, model.config.vocab_size, None)
    tensors = {name: p for name, p in model.state_dict().items() if name in model.config.weight_shapes()}
    write_gguf(tmp_path / "q8.gguf", GgufModel(model.config, tensors, fields), "Q8_0")
    live = trained(tmp_path / "q8.gguf", tmp_path / "adapter")
    merge_subject(live, tmp_path / "plain")
    assert near(theirs(tmp_path / "plain"), logits(live.model, TOKENS))
    report = merge_subject(live, tmp_path / "out", onto=str(dense), dtype="float32")
    assert near(theirs(tmp_path / "out").double(), by_hand(dense, live))
    assert report["base_checked"] == "5 weights equal, the quantized ones near"


def test_a_tokenizer_of_another_is_refused(dense: Path, tmp_path: Path) -> None:
    live = trained(dense, tmp_path / "adapter", NF4)
    foreign = checkpoints.reference("llama").config  # only that another tokenizer can be put there
    assert foreign
    changed = json.loads((dense / "tokenizer.json").read_text())
    changed["pre_tokenizer"] = {"type": "Whitespace"}
    copy = make_base(tmp_path / "copy", torch.bfloat16, **WIDE)
    (copy / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(CannotMerge, match="has another tokenizer"):
        merge_subject(live, tmp_path / "out", onto=str(copy))


def test_an_original_that_answers_otherwise_is_refused(dense: Path, tmp_path: Path) -> None:
    """The adapter is weak: what quantization changed weighs more than what it was trained to."""
    live = trained(dense, tmp_path / "adapter", NF4, by=0.03)
    with pytest.raises(VerificationError, match="from those on the quantized one that it was trained on"):
        merge_subject(live, tmp_path / "out", dtype="float32")
    merge_subject(live, tmp_path / "out", dtype="float32", force=True)


def test_what_full_training_lost_to_rounding_is_measured(tmp_path: Path) -> None:
    """Weights trained in place have a delta too: from the file they came from."""
    base = make_base(tmp_path / "base", torch.bfloat16)
    model = load_model(base)
    adapter = train_like(model, {"kind": "full"}, 2e-6)
    live = Subject(model, load_tokenizer(base), "base", base, model_identity(base), adapter)
    _, how = prepared(live, None)
    assert how.originals is not None
    with pytest.raises(VerificationError, match=r"rounding to bfloat16 lost \d+ of 21 deltas"):
        merge_subject(live, tmp_path / "out", dtype="bfloat16")
    report = merge_subject(replace(live), tmp_path / "out", dtype="float32")
    assert report["merged_layers"] == 21 and report["least_survived"] > 0.99
