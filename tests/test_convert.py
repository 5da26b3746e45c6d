"""tools/convert_adapter.py: other tools' checkpoints, written by hand in their layouts, compute what they did there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.laws.small import TINY, VOCAB, build
from tests.lit_reference import NAMES, NORMS, Lit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tunesmith.adapters.peft_format import load_adapter
from tunesmith.errors import AdapterError
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama

SCRIPT = Path(__file__).parents[1] / "tools" / "convert_adapter.py"
MHA = replace(TINY, num_key_value_heads=4, tie_word_embeddings=False, num_hidden_layers=3)  # as Lit-LLaMA's are
GQA = replace(TINY, tie_word_embeddings=False, num_hidden_layers=3)
RANK, LENGTH = 2, 5
TOKENS = torch.tensor([3, 41, 7, 7, 52, 19, 0, 33, 8])
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script as a module, with its neighbours."""
    sys.path.insert(0, os.fspath(SCRIPT.parent))
    yield importlib.import_module("convert_adapter")
    sys.path.remove(os.fspath(SCRIPT.parent))


@pytest.fixture
def convert(script, capsys) -> Callable[..., str]:
    """Run the script here, without a child: these tests' own pickles are harmless. Returns the last line it says."""

    def run(*words: object, code: int = 0) -> str:
        here = lambda source, keep: ((name, script.open_pickle(path)) for name, path in source.files.items())  # noqa: E731
        assert script.main(list(map(str, words)), here) == code
        out, err = capsys.readouterr()
        assert (out == "") is bool(code)
        return (err if code else out).strip().splitlines()[-1]

    return run


def alone(*words: object, code: int = 0) -> str:
    """Run the script as a user does; returns its last line: the folder, or what it says against it."""
    done = subprocess.run(
        [sys.executable, os.fspath(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return (done.stderr if code else done.stdout).strip().splitlines()[-1]


def numbers(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    """Random float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def logits(model: Llama, tokens: Tensor = TOKENS, layout: Layout | None = None) -> Tensor:
    """Ours."""
    with torch.no_grad():
        ctx = model.context(layout or Layout.single(len(tokens)))
        return model.logits(model.run(tokens, ctx), ctx)


def checkpoint(
    kind: str, layout: str, config: ModelConfig, enabled: str, everywhere: bool = False
) -> dict[str, Tensor]:
    """An adapter's tensors under the names and in the shapes of that layout."""
    names, norms = NAMES[layout], NORMS.get(layout, NORMS["litgpt-0.4"])
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = config.num_key_value_heads * config.head_dim
    rows = {"qkv": d + 2 * keys, "o": d, "gate": f, "up": f, "down": d}
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, start: float = 0.0) -> None:
        state[name] = start + numbers(*shape, seed=len(state))

    for i in range(config.num_hidden_layers):
        here = f"transformer.h.{i}."
        if kind == "lora":
            add(f"{here}{names['qkv']}.lora_A", RANK * len(enabled), d)
            add(f"{here}{names['qkv']}.lora_B", sum({"q": d, "k": keys, "v": keys}[part] for part in enabled), RANK)
            for part in ("o", "gate", "up", "down") if everywhere else ():
                add(f"{here}{names[part]}.lora_A", RANK, f if part == "down" else d)
                add(f"{here}{names[part]}.lora_B", rows[part], RANK)
        elif i >= 1:
            add(f"{here}attn.adapter_wte.weight", LENGTH, d)
            add(f"{here}attn.gating_factor", *((1, heads, 1, 1) if layout == "lit-llama" else (1, 1, heads, 1)))
        if kind == "adapter_v2":
            for part, name in names.items():
                add(f"{here}{name}.adapter_scale", rows[part], start=1.0)
                add(f"{here}{name}.adapter_bias", rows[part])
            add(here + norms[0], d, start=1.0)
            add(here + norms[1], d, start=1.0)
    if kind == "adapter_v2" or everywhere:
        parts = ("lora_A", "lora_B") if kind == "lora" else ("adapter_scale", "adapter_bias")
        shapes = ((RANK, d), (VOCAB, RANK)) if kind == "lora" else ((VOCAB,), (VOCAB,))
        for part, shape in zip(parts, shapes, strict=True):
            add(f"lm_head.{part}", *shape, start=float(part == "adapter_scale"))
    if kind == "adapter_v2":
        add(norms[2], d, start=1.0)
    return state


def save(folder: Path, layout: str, state: dict[str, Tensor], config: ModelConfig, enabled: str = "qv") -> Path:
    """Write the checkpoint as the tool does, with what it leaves beside it."""
    folder.mkdir()
    if layout == "lit-llama":
        torch.save(state, folder / "lit-llama-finetuned.pth")
        return folder / "lit-llama-finetuned.pth"
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    model = {
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "head_size": config.head_dim,
        "hf_config": "\n  name: x\n  org: y",
        **({"norm_qk": "false"} if layout == "litgpt-0.5.5" else {}),
    }
    (folder / "model_config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in model.items()))
    run = {"lora_r": RANK, "lora_alpha": 16, "lora_dropout": 0.05}
    run |= {f"lora_{name}": str(name[0] in enabled).lower() for name in ("query", "key", "value")}
    (folder / "hyperparameters.yaml").write_text("".join(f"{key}: {value}\n" for key, value in run.items()))
    return folder


def expect(layout: str, config: ModelConfig, state: dict[str, Tensor], enabled: str = "qv") -> tuple[Llama, Tensor]:
    """A model, and what the other tool computes with it and the adapter."""
    model = build(config)
    w = {name: p.detach() for name, p in model.named_parameters()}
    lit = Lit(layout, config, w, {name: t.double() for name, t in state.items()}, enabled=enabled)
    bare = Lit(layout, config, w, {}).logits(TOKENS)
    assert torch.allclose(bare, logits(model), rtol=0, atol=1e-9)  # the layout without an adapter is the same model
    return model, lit.logits(TOKENS)


def same(model: Llama, folder: Path, expected: Tensor) -> None:
    """The converted folder computes what is expected, and not what the base does."""
    before = logits(model)
    load_adapter(folder, model)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-9)
    assert (expected - before).abs().max() > 0.05


# layout, kind, base, which of q, k, v have a LoRA, whether all other linears have one, options
CASES = [
    ("lit-llama", "adapter", MHA, "qv", False, []),
    ("lit-llama", "adapter_v2", MHA, "qv", False, []),
    ("lit-llama", "lora", MHA, "qv", False, ["--alpha", "16", "--heads", "4"]),
    ("litgpt-0.4", "adapter", GQA, "qv", False, []),
    ("litgpt-0.4", "adapter_v2", GQA, "qv", False, []),
    ("litgpt-0.4", "adapter_v2", MHA, "qv", False, []),
    ("litgpt-0.4", "lora", GQA, "qv", False, []),
    ("litgpt-0.4", "lora", GQA, "qk", True, []),
    ("litgpt-0.4", "lora", GQA, "qkv", True, []),
    ("litgpt-0.4", "lora", GQA, "qkv", False, []),
    ("litgpt-0.4", "lora", MHA, "v", False, []),
    ("litgpt-2023", "lora", MHA, "qv", True, ["--lit-gpt-2023"]),
    ("litgpt-2023", "lora", GQA, "qkv", False, ["--lit-gpt-2023"]),
    ("litgpt-0.5.5", "lora", GQA, "qv", True, []),
    ("litgpt-0.5.5", "lora", MHA, "qkv", False, []),
]


@pytest.mark.parametrize(
    ("layout", "kind", "config", "enabled", "everywhere", "words"),
    CASES,
    ids=["-".join([*case[:2], case[3], "grouped" if case[2] is GQA else "", "all" * case[4]]) for case in CASES],
)
def test_lit_checkpoints(layout, kind, config, enabled, everywhere, words, convert, tmp_path) -> None:
    state = checkpoint(kind, layout, config, enabled, everywhere)
    model, expected = expect(layout, config, state, enabled)
    source = save(tmp_path / "in", layout, state, config, enabled)
    assert convert(source, "--out", tmp_path / "out", "--base", "b", *words) == str(tmp_path / "out")
    same(model, tmp_path / "out", expected)


def test_rows_in_another_order_would_be_seen(script, convert, monkeypatch, tmp_path) -> None:
    lit = sys.modules["convert_lit"]
    monkeypatch.setattr(lit, "_in_halves", lambda rows, sizes: rows)
    state = checkpoint("lora", "lit-llama", MHA, "qv")
    model, expected = expect("lit-llama", MHA, state)
    source = save(tmp_path / "in", "lit-llama", state, MHA)
    load_adapter(Path(convert(source, "--out", tmp_path / "out", "--alpha", "16", "--heads", "4")), model)
    assert (logits(model) - expected).abs().max() > 1e-3
    # And a file of before LitGPT's pull request 900 taken for one of after it.
    state = checkpoint("lora", "litgpt-2023", GQA, "qv")
    model, expected = expect("litgpt-2023", GQA, state)
    source = save(tmp_path / "in2", "litgpt-2023", state, GQA)
    load_adapter(Path(convert(source, "--out", tmp_path / "out2")), model)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_a_gate_for_each_layer(convert, tmp_path) -> None:
    state = checkpoint("adapter", "lit-llama", MHA, "qv")
    state = {name: t.mean() if name.endswith("gating_factor") else t for name, t in state.items()}
    state = {name: t.reshape(1) if t.ndim == 0 else t for name, t in state.items()}
    model, expected = expect("lit-llama", MHA, state)
    same(model, Path(convert(save(tmp_path / "in", "lit-llama", state, MHA), "--out", tmp_path / "out")), expected)


REFUSED: list[tuple[str, str, str, dict[str, Any], list[str], str]] = [
    ("litgpt-0.5.5", "adapter", "qv", {}, [], "takes the adapter's keys and values from other rows"),
    ("litgpt-0.5.5", "adapter_v2", "qv", {}, ["--before-0.5.5"], "takes the adapter's keys and values from other rows"),
    ("litgpt-0.4", "adapter", "qv", {"model_config.yaml": None}, [], "say so with --before-0.5.5"),
    ("litgpt-0.4", "adapter_v2", "qv", {"model_config.yaml": None}, [], "give --heads, --kv-heads, --head-dim"),
    ("litgpt-0.4", "lora", "qv", {"model_config.yaml": None}, [], "give --heads and --kv-heads"),
    ("litgpt-0.4", "lora", "qv", {"hyperparameters.yaml": None}, [], "give --alpha"),
    ("litgpt-0.4", "lora", "qv", {"hyperparameters.yaml": None}, ["--alpha", "16"], "give --qkv"),
    ("litgpt-0.4", "lora", "qv", {}, ["--qkv", "q,k,v"], "a LoRA on q, k, v of 2 parts"),
    ("litgpt-0.4", "lora", "qv", {}, ["--heads", "2"], "does not fit 2 heads"),
    ("litgpt-0.4", "lora", "qv", {}, ["--heads", "5", "--kv-heads", "2"], "cannot be those of the base"),
    ("litgpt-0.4", "lora", "qv", {"lm_head.lora_A": torch.ones(2, 24)}, [], "lm_head: there should be LoRA's A and B"),
    ("litgpt-0.4", "lora", "qv", {"transformer.h.0.mlp.fc.lora_A": torch.ones(2, 24),
     "transformer.h.0.mlp.fc.lora_B": torch.ones(40, 2)}, [], "belongs to no LLaMA that is known"),
    ("litgpt-0.4", "adapter", "qv", {"transformer.h.0.norm_1.weight": torch.ones(24)}, [], "belongs to no adapter"),
    ("litgpt-0.4", "adapter", "qv", {"transformer.h.1.attn.gating_factor": torch.ones(1)}, [], "differ in shape"),
    ("litgpt-0.4", "adapter_v2", "qv", {"transformer.h.0.norm_1.bias": torch.ones(24)}, [], "belongs to no adapter"),
    ("lit-llama", "lora", "qv", {}, ["--alpha", "16"], "give --heads and --kv-heads"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "kind", "enabled", "changes", "words", "said"), REFUSED, ids=lambda value: None)
def test_what_is_not_exact_is_refused(layout, kind, enabled, changes, words, said, convert, tmp_path) -> None:
    state = checkpoint(kind, layout, GQA, enabled)
    state |= {name: value for name, value in changes.items() if value is not None}
    source = save(tmp_path / "in", layout, state, GQA, enabled)
    for name in [name for name, value in changes.items() if value is None]:
        (source / name).unlink()
    line = convert(source, "--out", tmp_path / "out", *words, code=2)
    assert line.startswith("error: ") and said in line and not (tmp_path / "out").exists()


def test_lit_files_without_what_lies_beside_them(convert, tmp_path) -> None:
    for i, (kind, words) in enumerate([("adapter", []), ("adapter_v2", ["--kv-heads", "2"])]):
        state = checkpoint(kind, "litgpt-0.4", GQA, "qv")
        model, expected = expect("litgpt-0.4", GQA, state)
        source = save(tmp_path / str(i), "litgpt-0.4", state, GQA)
        (source / "model_config.yaml").unlink()
        (source / "hyperparameters.yaml").unlink()
        out = convert(source / "lit_model.pth.lora", "--out", tmp_path / f"out{i}", "--before-0.5.5", *words)
        same(model, Path(out), expected)


# alpaca-lora's configuration, as it was written in 2023
ALPACA = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
    "modules_to_save": None, "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def test_alpaca_lora_folders(convert, tmp_path) -> None:
    model = build(GQA)
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, source = {}, tmp_path / "in"
    for i in range(GQA.num_hidden_layers):
        for part in ("q_proj", "o_proj"):
            A, B = numbers(2, 24, seed=len(state)), numbers(24, 2, seed=len(state) + 1)
            path = f"model.layers.{i}.self_attn.{part}"
            state |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
            w[f"{path}.weight"] += 16 / 2 * (B.double() @ A.double())
    source.mkdir()
    torch.save(state, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text(json.dumps(ALPACA))
    out = Path(convert(source, "--out", tmp_path / "out"))
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)
    assert json.loads((out / "adapter_config.json").read_text()) == ALPACA
    same(model, out, Lit("litgpt-0.5.5", GQA, w, {}).logits(TOKENS))
    (source / "adapter_config.json").unlink()
    assert "adapter_config.json: not readable" in convert(source, "--out", tmp_path / "out2", code=2)


HIDDEN = GQA.hidden_size


def reft_file(kind: str, seed: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """What pyreft saves of one intervention, and what that computes."""
    W, b = numbers(RANK, HIDDEN, seed=seed), numbers(RANK, seed=seed + 1)
    V, c = numbers(RANK, HIDDEN, seed=seed + 2), numbers(RANK, seed=seed + 3)
    rotation = nn.Module()
    rotation.weight = nn.Parameter(torch.linalg.qr(V.T)[0].contiguous())
    parametrizations.orthogonal(rotation)
    with torch.no_grad():  # as training would
        rotation.parametrizations.weight.original.add_(numbers(HIDDEN, RANK, seed=seed + 4))
    R = rotation.weight.detach()
    own = {"embed_dim": torch.tensor(HIDDEN), "interchange_dim": torch.tensor(HIDDEN)}
    linear = {"learned_source.weight": W, "learned_source.bias": b, **own}
    d = torch.Tensor.double
    table: dict[str, tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]] = {
        "Loreft": (
            {"weight": W, "bias": b, "rotate_layer": R},
            lambda h: h + (h @ d(W).T + d(b) - h @ d(R)) @ d(R).T,
        ),
        "Noreft": (
            {**linear, "proj_layer.weight": V, "proj_layer.bias": c},
            lambda h: h + (h @ d(W).T + d(b) - (h @ d(V).T + d(c))) @ d(V),
        ),
        "Direft": (
            {**linear, **{f"rotate_layer.{name}": t for name, t in rotation.state_dict().items()}},
            lambda h: h + (h @ d(W).T + d(b)) @ d(R).T,
        ),
        "Nodireft": ({**linear, "proj_layer.weight": V}, lambda h: h + (h @ d(W).T + d(b)) @ d(V)),
    }
    return table[kind]


def reft_folder(folder: Path, kind: str, keys: list[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """A folder as pyreft saves it; returns what each of its interventions computes."""
    folder.mkdir(parents=True)
    edits = {}
    for i, key in enumerate(keys):
        state, edits[key] = reft_file(kind, 10 * i)
        torch.save(state, folder / f"intkey_{key}.bin")
    config = {
        "sorted_keys": keys,
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(keys),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return edits


def key(layer: int, number: int = 0, dots: bool = False) -> str:
    """pyreft's name of an intervention; older versions had dots."""
    text = f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{number}"
    return text.replace("_", ".").replace("block.output", "block_output") if dots else text


PROMPT, FIRST, LAST = 7, [0, 1], [4, 5, 6]  # of TOKENS: the prompt, and what f2+l3 edits in it


@pytest.mark.parametrize(
    ("kind", "keys", "words", "where"),
    [
        ("Loreft", [key(0), key(1), key(0, 1), key(1, 1)], ["f2+l3"], [FIRST, FIRST, LAST, LAST]),
        ("Loreft", [key(0), key(2), key(0, 1), key(2, 1)], ["f2+l3"], [FIRST, [], LAST, LAST]),
        ("Loreft", [key(0), key(2)], ["f2+l3", "--share-weights"], [FIRST + LAST] * 2),
        ("Noreft", [key(1, dots=True)], ["l3"], [LAST]),
        ("Direft", ["comp_model_layers[1]_output_unit_pos_nunit_1#0"], ["f2"], [FIRST]),
        ("Nodireft", [key(0), key(1)], ["f2+l3", "--share-weights"], [FIRST + LAST] * 2),
    ],
)
def test_pyreft_folders(kind, keys, words, where, convert, tmp_path) -> None:
    model = build(GQA)
    edits = reft_folder(tmp_path / "in" / "intervenable_model", kind, keys)
    layers = {name: int(re.search(r"layers?[_.[](\d+)", name)[1]) for name in keys}

    def edit(layer: int, x: Tensor) -> Tensor:
        out = x.clone()
        for name, rows in zip(keys, where, strict=True):
            if layers[name] == layer:
                out[rows] = edits[name](x)[rows]
        return out

    w = {name: p.detach() for name, p in model.named_parameters()}
    expected = Lit("litgpt-0.5.5", GQA, w, {}, edit=edit).logits(TOKENS)
    out = Path(convert(tmp_path / "in", "--out", tmp_path / "out", "--layers", "3", "--positions", *words))
    load_adapter(out, model)
    ends = np.array([*range(PROMPT, 0, -1), *[-1] * (len(TOKENS) - PROMPT)], np.int32)
    found = logits(model, layout=Layout.of([len(TOKENS)], answer_ends=ends))
    # An edit of first tokens in the last layer is left out: it changes their own logits alone, which nothing samples.
    answer = slice(PROMPT - 1, None)
    assert torch.allclose(found[answer], expected[answer], rtol=0, atol=1e-6)
    assert (expected - logits(build(GQA))).abs()[answer].max() > 0.05


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, [], "give --positions as in training"),
        ({}, ["--positions", "f1+x"], "give --positions as in training"),
        ({}, ["--positions", "f1+l1"], "give --layers"),
        ({}, ["--positions", "f1+l1", "--layers", "1"], "there are 1, from 0 on"),
        ({"sorted_keys": [key(0)]}, ["--positions", "l1"], "sorted_keys does not list"),
        (
            {"intervention_types": ["<class 'os.LobireftIntervention'>"] * 2},
            ["--positions", "l1"],
            "one of these is read",
        ),
        ({"intervention_types": None}, ["--positions", "l1"], "intervention_types missing"),
    ],
)
def test_pyreft_folders_that_do_not_say_enough(change, words, said, convert, tmp_path) -> None:
    reft_folder(tmp_path / "in", "Loreft", [key(0), key(1)])
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | change
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert said in convert(tmp_path / "in", "--out", tmp_path / "out", *words, code=2)


def test_two_edits_of_one_place_are_refused(convert, tmp_path) -> None:
    reft_folder(tmp_path / "in", "Loreft", [key(1), key(1, 1)])
    said = convert(tmp_path / "in", "--out", tmp_path / "out", "--positions", "l1", code=2)
    assert "two edits of the last tokens in layer 1" in said


def test_what_is_no_adapter(convert, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    for source, said in [
        (tmp_path / "none", "no such file"),
        (tmp_path / "empty", "give the checkpoint itself"),
        (tmp_path / "other.pth", "no adapter of Lit-LLaMA or LitGPT in it"),
    ]:
        assert said in convert(source, "--out", tmp_path / "out", code=2)
    assert "is there already" in convert(tmp_path / "other.pth", "--out", tmp_path / "empty", code=2)


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['PLANTED']}",)


def test_a_child_opens_pickles_and_nothing_in_them_runs(tmp_path, monkeypatch) -> None:
    planted = tmp_path / "planted"
    monkeypatch.setenv("PLANTED", str(planted))
    torch.save({"a": Hostile()}, tmp_path / "hostile.pth")
    said = alone("--child", tmp_path / "hostile.pth", tmp_path / "out", code=2)
    assert "holds more than tensors (posix.system), so it is not opened" in said and not planted.exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert planted.exists()  # it would have run


def test_a_child_has_a_limit_on_its_memory(tmp_path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**10)}, tmp_path / "bomb.pth")  # 40 GB from a file of a kilobyte
    assert "needs more memory" in alone("--child", tmp_path / "bomb.pth", tmp_path / "out", code=2)


def test_an_adapter_file_that_was_filtered_twice(convert, tmp_path, script) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ALPACA))
    with pytest.raises(script.Refused, match=r"an empty adapter of \d+ bytes: its state dict was filtered twice"):
        script.open_pickle(tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    assert "not a file of tensors that torch saved" in alone(tmp_path, "--out", tmp_path / "out", code=2)


def test_the_script_runs_by_itself(tmp_path) -> None:
    state = checkpoint("lora", "lit-llama", MHA, "qv")
    model, expected = expect("lit-llama", MHA, state)
    source = save(tmp_path / "in", "lit-llama", state, MHA)
    with pytest.raises(AdapterError, match=r"python tools/convert_adapter\.py"):
        load_adapter(source.parent, model)
    same(model, Path(alone(source, "--out", tmp_path / "out", "--alpha", "16", "--heads", "4")), expected)


def test_the_script_needs_nothing_of_the_package() -> None:
    for path in SCRIPT.parent.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
        heads = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert heads <= {"torch", "safetensors", "convert_lit", "convert_pyreft", "convert_result"}, path.name
        assert len(path.read_text().splitlines()) < 400
