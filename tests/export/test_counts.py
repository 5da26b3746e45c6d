"""Counts without weights: every figure of docs/counts.md, the file that is then saved, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import counts
from tests.laws.small import TINY, build
from tests.laws.variants import VARIANTS

from tunesmith.adapters import attach, kinds
from tunesmith.adapters.peft_format import exported, save_adapter
from tunesmith.cli import main
from tunesmith.errors import AdapterError, ConfigError, ModelError
from tunesmith.export.counts import count, header_bytes
from tunesmith.export.inspect import inspect_path
from tunesmith.model.config import ModelConfig
from tunesmith.model.shapes import shape, shapes

ROWS = [*counts.ROWS, *counts.GPT3_ROWS]
# What the safetensors files of the published models hold, as their pages say.
TOTALS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def same(found: int, expected: int | str) -> bool:
    """Is it the figure, or does it round to the one that a paper prints in millions?"""
    return found == expected if isinstance(expected, int) else f"{found / 1e6:.1f}M" == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model} {row.method} {row.words}".strip())
def test_a_method_trains_what_is_known_of_it(row: counts.Row) -> None:
    found = row.count()
    # A flagged row's printed figure does not follow from the paper's own formula: should it fit, the flag is wrong.
    assert same(found["trainable_parameters"], row.expected) is not bool(row.note)
    assert found["trainable_parameters"] == sum(part["parameters"] for part in found["modules"].values())
    added = found["total_parameters"] - found["base_parameters"]
    trained_base = found["trainable_parameters"] - added
    assert 0 <= added <= found["trainable_parameters"] and trained_base <= found["base_parameters"]


def test_every_method_has_a_row_and_two_rows_are_flagged() -> None:
    assert {row.method for row in ROWS} == set(kinds())
    assert {row.method for row in ROWS if row.note} == {"prefix", "bitfit"}


def test_the_gpt3_rows_that_do_not_follow_from_their_formula() -> None:
    d, layers = 12288, 96
    assert shape("gpt3-shaped").hidden_size == d and shape("gpt3-shaped").num_hidden_layers == layers
    assert same(layers * d * (8 + 8), "18.9M")  # prefix-layer 8+8, printed 20.2M
    assert same(12 * d * layers, "14.2M") and not same(11 * d * layers, "14.2M")  # bias-only


def test_the_first_adapter_file_has_4_92_megabytes() -> None:
    found = count("llama-7b", "llama_adapter")
    assert found["file_bytes"] == 4 * 1_229_760 and f"{found['file_bytes'] / 1e6:.2f}" == "4.92"


def test_shapes_are_the_published_models() -> None:
    assert {name: counts.counted(name)["total_parameters"] for name in shapes() if name != "gpt3-shaped"} == TOTALS
    assert count("llama-7b")["linear_parameters"] == 6_476_005_376


@pytest.mark.parametrize("name", shapes())
def test_a_shape_is_a_config_json(name: str) -> None:
    config = shape(name)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("kind", kinds())
def test_the_file_has_the_bytes_that_were_counted(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(TINY.to_hf()))
    for i, settings in enumerate([{}, *VARIANTS.get(kind, [])]):
        found = count(str(tmp_path / "base"), kind, settings)
        adapter = attach(build(dtype=torch.float32), {**settings, "kind": kind})
        folder = tmp_path / str(i)
        folder.mkdir()
        save_adapter(folder, adapter, base="tiny", identity={})
        saved = inspect_path(folder)
        assert saved["bytes"] == found["file_bytes"] + found["header_bytes"], settings
        assert saved["tensors"] == found["tensors"] and saved["method"] == kind
        assert found["trainable_parameters"] == sum(p.numel() for p in adapter.trainable.values())


def test_the_header_is_counted_to_the_byte() -> None:
    tensors = exported(attach(build(dtype=torch.float32), {"kind": "lora", "rank": 3}))[1]
    from safetensors.torch import save

    assert header_bytes(tensors) == len(save(tensors, {"format": "pt"})) - sum(4 * t.numel() for t in tensors.values())


def test_counting_the_largest_model_allocates_nothing() -> None:
    code = (
        "import resource; from tunesmith.export.counts import count; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "found = count('llama-3.1-405b', 'lora', {'rank': 64}); "
        "print(found['file_bytes'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    size, grown = map(int, done.stdout.split())
    assert size > 9e9 and grown < 512 * 1024  # KiB


def test_the_page_is_what_its_command_prints() -> None:
    assert counts.PAGE.read_text(encoding="utf-8") == counts.page()


def test_the_command_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", "llama-7b", "--method", "llama_adapter", "adapter.gate=scalar", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["trainable_parameters"], report["total_parameters"]) == (1_228_830, 6_738_415_616 + 1_228_830)
    assert report["modules"] == {"self_attn.mix": {"places": 30, "parameters": 1_228_830}}
    assert main(["inspect", "--model", "llama-7b", "--method", "lora", "rank=8", "target_modules=[q_proj,v_proj]"]) == 0
    assert "trainable parameters         4194304\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "llama-8b", "--method", "lora"], "did you mean 'llama-3-8b'"),
        (["--model", "llama-7b", "--method", "lorra"], "did you mean 'lora'"),
        (["--model", "llama-7b", "--method", "lora", "rnk=8"], "did you mean 'rank'"),
        (["--model", "llama-7b", "--method", "lora", "rank=0"], "rank"),
        (["--model", "llama-7b", "--method", "lora", "rank=8", "rank=9"], "given twice"),
        (["--model", "llama-7b", "--method", "lora", "kind=ia3"], "belongs into --method"),
        (["--model", "llama-7b", "--method", "lora", "rank"], "is no setting"),
        (["--model", "llama-7b", "rank=8"], "needs --method"),
        (["--method", "lora"], "needs --model"),
        ([], "give one PATH"),
        (["a", "b"], "give one PATH"),
    ],
)
def test_what_cannot_be_counted_is_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_faults_have_their_kinds() -> None:
    with pytest.raises(ModelError, match=r"'gpt3-shape'; did you mean 'gpt3-shaped'"):
        count("gpt3-shape")
    with pytest.raises(ConfigError, match="unknown key"):
        count("smollm2-135m", "lora", {"rang": 8})
    with pytest.raises(AdapterError, match="names no module"):
        count("smollm2-135m", "lora", {"target_modules": ["c_attn"]})
