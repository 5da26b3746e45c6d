"""Training from scratch: random weights as Hugging Face draws them, alike in every process; a result that stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny import words

from tunesmith import api
from tunesmith.config import ModelSection
from tunesmith.errors import CatalogError, ConfigError, ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.load import load_model, model_identity
from tunesmith.model.random_weights import write_random
from tunesmith.model.shapes import shape
from tunesmith.scratch import describe

pytestmark = pytest.mark.usefixtures("single_thread")
SIZES = {
    "model_type": "llama", "vocab_size": 768, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def sizes(tmp_path) -> Path:
    """A configuration without weights."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SIZES), encoding="utf-8")
    return path


def given(sizes: Path, tokenizer: Path, reviews: Path, out: Path, **settings) -> list[str]:
    chosen = {
        "adapter__kind": "full", "adapter__rank": None, "model__init": "random", "model__tokenizer": str(tokenizer),
        "train__learning_rate": 3e-3, "train__epochs": 3, **settings,
    }  # fmt: skip
    return words(sizes, reviews, out, **chosen)


def test_weights_are_drawn_as_transformers_draws_them(tmp_path) -> None:
    """The same spread tensor by tensor; the seed alone decides the numbers."""
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True)).state_dict()
    config = ModelConfig.from_hf({**SIZES, "attention_bias": True})
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write_random(tmp_path / name, config, seed)
    ours, again, other = (load_model(tmp_path / name).state_dict() for name in ("a", "again", "b"))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], again[name])
        if expected.ndim == 1:
            assert torch.equal(ours[name], expected), name  # norms 1, biases 0
            continue
        assert not torch.equal(ours[name], other[name])
        error = 4 * 0.02 / (2 * expected.numel()) ** 0.5  # four standard errors of a standard deviation
        assert abs(float(ours[name].std()) - 0.02) < error > abs(float(expected.std()) - 0.02)
        assert abs(float(ours[name].mean())) < 4 * 0.02 / expected.numel() ** 0.5
    names = [name for name in ours if ours[name].ndim == 2]
    assert not torch.equal(ours[names[1]].flatten()[:64], ours[names[2]].flatten()[:64])
    hashes = [model_identity(tmp_path / name)["sha256"] for name in ("a", "again", "b")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_from_scratch_is_saved_verified_and_used(
    command, sizes, tiny_base, tiny_reviews, tmp_path, monkeypatch
) -> None:
    """The whole way; verify loads it in a fresh process. The run may move: its base lies in it."""
    code, out, err = command("train", *given(sizes, tiny_base, tiny_reviews, tmp_path / "runs"))
    assert code == 0, err
    run = Path(out.strip())
    report = json.loads((run / "verify.json").read_text())
    assert report["ok"] and "live logits" in {check["name"] for check in report["checks"]}
    before = json.loads((run / "before.json").read_text())["measured"]["eval_loss"]
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert before == pytest.approx(torch.tensor(768.0).log().item(), abs=0.1)  # uniform, as random weights answer
    assert min(row["eval_loss"] for row in after if "eval_loss" in row) < before - 1
    settings = (run / "config.yaml").read_text()
    assert "init: random" in settings and str(sizes) in settings
    moved = run.rename(tmp_path / "moved")
    sizes.unlink()
    assert command("verify", moved)[0] == 0
    assert command("generate", moved, "--prompt", "A joy.", "--max-new-tokens", 2)[0] == 0
    code, _, err = command("merge", moved, "--out", tmp_path / "model", "--dtype", "float32")
    assert code == 0, err
    loaded, alone = api.load(moved), api.load(tmp_path / "model", dtype="float32")
    for (name, ours), theirs in zip(loaded.model.state_dict().items(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_resumed_run_has_the_base_it_began_with(
    command, in_process, sizes, tiny_base, tiny_reviews, tmp_path
) -> None:
    chosen = given(sizes, tiny_base, tiny_reviews, tmp_path / "runs")
    whole = Path(command("train", *chosen, "train.save_steps=3")[1].strip())
    code, out, err = command("train", *chosen, "--name", "cut", "train.save_steps=3")
    cut = Path(out.strip())
    last = sorted(cut.glob("checkpoint-*"))[-1]
    for path in (last, cut / "adapter"):
        shutil.rmtree(path)
    marker = (cut / "base" / "random_init.json").stat().st_mtime_ns
    code, _, err = command("train", "--resume", cut)
    assert code == 0 and "resumed from" in err, err
    assert (cut / "base" / "random_init.json").stat().st_mtime_ns == marker
    files = [(run / "adapter" / "adapter.safetensors").read_bytes() for run in (whole, cut)]
    assert files[0] == files[1]


def test_the_plan_knows_the_sizes(command, sizes, tiny_base, tiny_reviews, tmp_path) -> None:
    chosen = given(sizes, tiny_base, tiny_reviews, tmp_path)
    code, out, err = command("plan", *[w for w in chosen if "=" in w], "-m", sizes, "-d", tiny_reviews, "--json")
    assert code == 0, err
    counted = json.loads(out)
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert counted["trainable_parameters"] == sum(p.numel() for p in theirs.parameters())
    assert list(tmp_path.iterdir()) == [sizes], "a plan writes nothing"
    assert command("data", "preview", *[w for w in chosen if "=" in w], "-m", sizes, "-d", tiny_reviews)[0] == 0


@pytest.mark.parametrize("adapter", [{"adapter__kind": "lora"}, {"adapter__kind": "norms"}])
def test_only_what_trains_everything_starts_from_random_weights(
    command, in_process, sizes, tiny_base, tiny_reviews, tmp_path, adapter
) -> None:
    code, _, err = command("train", *given(sizes, tiny_base, tiny_reviews, tmp_path, **adapter))
    assert code == 2 and "random weights are noise" in err and "set adapter.kind=full" in err


def test_sizes_come_from_a_name_a_file_a_folder_or_a_model(tiny_base, tmp_path) -> None:
    def read(path: object, tokenizer: object = tiny_base) -> ModelConfig:
        return describe(ModelSection(path=str(path), init="random", tokenizer=tokenizer and str(tokenizer)))[0]

    named = read("smollm2-135m")
    assert named.hidden_size == shape("smollm2-135m").hidden_size and named.eos_token_ids == (2,)  # the tokenizer's
    assert read(tiny_base, None).weight_shapes() == read(tiny_base / "config.json").weight_shapes()
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES), encoding="utf-8")
    assert read(folder).hidden_size == 48
    with pytest.raises(ModelError, match="'smollm2-135'; did you mean 'smollm2-135m'"):
        read("smollm2-135")
    with pytest.raises(ConfigError, match="model.tokenizer: smollm2-135m is a configuration and has none"):
        read("smollm2-135m", None)
    with pytest.raises(CatalogError, match="no such file or folder"):
        read(tmp_path / "gone.json")


def test_a_tokenizer_belongs_to_random_weights_alone(command, tiny_base, tiny_reviews, tmp_path) -> None:
    chosen = given(tiny_base, tiny_base, tiny_reviews, tmp_path, model__init=None)
    code, _, err = command("train", *chosen)
    assert code == 2 and "goes with init: random alone" in err


@pytest.mark.parametrize("said", ['{"seed": -1, "std": 0.02}', '{"seed": 0}', '{"seed": 0, "std": 1}', "[]", "x"])
def test_a_damaged_description_is_refused_in_one_line(tmp_path, said: str) -> None:
    write_random(tmp_path, ModelConfig.from_hf(SIZES), 0)
    (tmp_path / "random_init.json").write_text(said, encoding="utf-8")
    with pytest.raises(ModelError, match=r"random_init\.json"):
        load_model(tmp_path)


def test_real_weights_come_first(tiny_base, tmp_path) -> None:
    """A description beside weights never takes their place."""
    folder = shutil.copytree(tiny_base, tmp_path / "both")
    (folder / "random_init.json").write_text('{"seed": 0, "std": 0.02}')
    assert model_identity(folder) == model_identity(tiny_base)
