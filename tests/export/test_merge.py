"""A merged folder loads in transformers with the logits of base + adapter; a lossy merge is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tests.export.small_run import VOCAB, logits, make_base, train_like

from tunesmith.adapters import Adapter
from tunesmith.adapters.base import Delta, Placement
from tunesmith.errors import CannotMerge, ConfigError, VerificationError
from tunesmith.export.merge import merge_adapter, merged_weights
from tunesmith.model.load import load_model
from tunesmith.tokenizer import load_tokenizer

TOKENS = torch.arange(5, 60) * 7 % VOCAB
SMALL = 2e-6  # far below what bfloat16 keeps beside weights of 0.2


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("tied"), torch.bfloat16, tie_word_embeddings=True)


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def agree(a: torch.Tensor, b: torch.Tensor, share: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= share * float(b.abs().max())


SPECS = {
    "all": {"rank": 4},
    "pissa": {"rank": 4, "init": "pissa", "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"rank": 8, "rslora": True, "rank_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("name", SPECS)
def test_transformers_loads_it_with_the_logits_of_base_and_adapter(name, base, tmp_path):
    model = load_model(base)
    adapter = train_like(model, {"kind": "lora", **SPECS[name]})
    live = logits(model, TOKENS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "out")
    assert report["dtype"] == "float32" and report["top1_agreement"] == 1 and report["kl"] < 1e-9 < report["kl_base"]
    assert report["least_survived"] == pytest.approx(1, abs=1e-3)
    assert agree(theirs(tmp_path / "out"), live) and not agree(theirs(base), live)
    assert torch.equal(logits(model, TOKENS), live)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_folder_is_complete(base, tmp_path):
    model = load_model(base)
    merge_adapter(model, train_like(model, {"kind": "lora"}), load_tokenizer(base), tmp_path / "out")
    text = "What is 2 + 2? <|im_end|>"
    wanted = transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == wanted
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == list(load_tokenizer(base).eos_ids)
    details = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert len(details["layers"]) == details["merged_layers"] == 14 and details["faults"] == []
    assert load_tokenizer(tmp_path / "out").fingerprint() == load_tokenizer(base).fingerprint()


def test_a_tied_head_that_was_adapted_is_untied(tied, tmp_path):
    model = load_model(tied)
    adapter = train_like(model, {"kind": "lora", "target_modules": ["lm_head"]}, by=0.2)
    live = logits(model, TOKENS)
    merge_adapter(model, adapter, load_tokenizer(tied), tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and agree(theirs(tmp_path / "out"), live)
    model = load_model(tied)
    adapter = train_like(model, {"kind": "lora", "target_modules": ["q_proj"]})
    live = logits(model, TOKENS)
    merge_adapter(model, adapter, load_tokenizer(tied), tmp_path / "still", dtype="float32")
    assert json.loads((tmp_path / "still" / "config.json").read_text())["tie_word_embeddings"] is True
    assert agree(theirs(tmp_path / "still"), live)


def test_auto_is_the_narrowest_that_holds_the_base(tied, base, tmp_path):
    for folder, expected in ((tied, "bfloat16"), (base, "float32")):
        model = load_model(folder)
        report = merge_adapter(
            model, train_like(model, {"kind": "lora"}, by=0.2), load_tokenizer(folder), tmp_path / expected, force=True
        )
        assert report["dtype"] == expected
        assert json.loads((tmp_path / expected / "config.json").read_text())["dtype"] == expected


def test_the_losses_follow_their_definition(tied):
    """Recomputed from the written weights, layer by layer."""
    model = load_model(tied)
    adapter = train_like(model, {"kind": "lora", "rank": 2})
    tensors, layers, _ = merged_weights(model, adapter, torch.bfloat16)
    assert len(layers) == 14
    for layer in layers:
        path = layer.name.removesuffix(".weight")
        delta = adapter.deltas[f"{path}.edit"]
        D = delta.scale * (delta.B.detach().double() @ delta.A.detach().double())
        W = model.get_submodule(path).weight.double()
        arrived = tensors[layer.name].double()
        assert layer.lost == pytest.approx(float((arrived - W - D).norm() / D.norm()), rel=1e-6)
        assert layer.survived == pytest.approx(float(((arrived - W) * D).sum() / D.norm() ** 2), rel=1e-6)
        assert layer.delta == pytest.approx(float(D.norm() / W.norm()), rel=1e-6)
        assert layer.changed == pytest.approx(float((arrived != W).double().mean()), rel=1e-6)


def test_a_delta_that_rounding_swallows_is_refused_by_layer(tied, tmp_path):
    model = load_model(tied)
    adapter = train_like(model, {"kind": "lora", "rank": 2})
    with torch.no_grad():
        for place, delta in adapter.deltas.items():
            if "layers.1.mlp.up_proj" in place:
                delta.B.mul_(SMALL)
    tokenizer = load_tokenizer(tied)
    with pytest.raises(
        VerificationError, match=r"lost 1 of 14 deltas: model.layers.1.mlp.up_proj.weight \(\d+% of"
    ) as e:
        merge_adapter(model, adapter, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert e.value.exit_code == 4 and not list(tmp_path.iterdir())
    report = merge_adapter(model, adapter, tokenizer, tmp_path / "out", dtype="bfloat16", force=True)
    assert report["least_survived_layer"] == "model.layers.1.mlp.up_proj.weight" and report["least_survived"] < 0.5
    assert "lost 1 of 14" in json.loads((tmp_path / "out" / "merge.json").read_text())["faults"][0]
    merge_adapter(model, adapter, tokenizer, tmp_path / "wide", dtype="float32")


def test_answers_that_moved_are_refused(base, tmp_path):
    """A base that bfloat16 cannot hold moves further than this weak adapter does, though each delta arrives."""
    model = load_model(base)
    adapter = train_like(model, {"kind": "lora", "rank": 2, "target_modules": ["v_proj"]}, by=0.004)
    with pytest.raises(VerificationError, match="its answers moved by KL"):
        merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "out", dtype="bfloat16")


def test_float16_overflow_is_named(base, tmp_path):
    model = load_model(base)
    adapter = train_like(model, {"kind": "lora", "rank": 2, "target_modules": ["v_proj"]})
    with torch.no_grad():
        next(iter(adapter.deltas.values())).B.mul_(1e8)
    with pytest.raises(CannotMerge, match=r"v_proj.weight is not finite .* float16 ends at 65504"):
        merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "out", dtype="float16")


def test_out_is_not_overwritten_unasked(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    model = load_model(base)
    adapter = train_like(model, {"kind": "lora"})
    with pytest.raises(ConfigError, match="is there already"):
        merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()
    with pytest.raises(ConfigError, match="'int3' is not known"):
        merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "new", dtype="int3")


class Stubborn:
    """A method whose delta cannot be folded."""

    kind, settings, learning_rate = "stubborn", dict, 1.0

    def place(self, model, settings) -> Iterator[Placement]:
        """One delta, on the first q_proj."""
        yield Placement("model.layers.0.self_attn.q_proj", "edit", Delta())

    def unfreeze(self, model, settings) -> Iterator[str]:
        """Nothing."""
        return iter(())


def test_what_cannot_be_folded_says_so(base, tmp_path):
    model = load_model(base)
    placed = {f"{p.path}.{p.seam}": p.delta for p in Stubborn().place(model, {})}
    with pytest.raises(CannotMerge, match="cannot be folded"):
        merge_adapter(model, Adapter("default", Stubborn(), {}, placed), load_tokenizer(base), tmp_path / "out")
    with pytest.raises(CannotMerge, match="acts where there is no weight"):
        placed = {"model.layers.0.self_attn.mix": Delta()}
        merge_adapter(model, Adapter("default", Stubborn(), {}, placed), load_tokenizer(base), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_full_fine_tuning_is_written_as_it_is(base, tmp_path):
    model = load_model(base)
    adapter = train_like(model, {"kind": "full"}, by=0.01)
    report = merge_adapter(model, adapter, load_tokenizer(base), tmp_path / "out")
    assert report["merged_layers"] == 0 and report["dtype"] == "float32"
    assert agree(theirs(tmp_path / "out"), logits(model, TOKENS))
