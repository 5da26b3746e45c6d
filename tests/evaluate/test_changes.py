"""What an adapter changed, held against what its linears compute; two adapters against each other; the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.small_run import make_run
from tests.laws.small import build, disturb

from tunesmith.adapters import attach, kinds
from tunesmith.errors import AdapterError
from tunesmith.evaluate.changes import changes, compared, directions, spectra
from tunesmith.evaluate.spectrum import Product
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.spectra import spectrum

CHANGE_NOTHING = {"prefix", "prompt", "bottleneck", "reft", "bitfit", "norms", "llama_adapter"}
SPECS = {
    "lora": {"rank": 3, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "pissa": {"kind": "lora", "rank": 3, "init": "pissa", "target_modules": ["v_proj"]},
    "dora": {"rank": 3, "target_modules": ["o_proj"]},
    "adalora": {"init_rank": 4, "target_rank": 2, "target_modules": ["k_proj"]},
    "ia3": {},
    "llama_adapter_v2": {"layers": 1},
    "mixed": {"parts": [{"kind": "ia3"}, {"kind": "lora", "rank": 2, "target_modules": ["down_proj", "q_proj"]}]},
    "full": {},
    "last_layers": {"layers": 1},
}


def moved(kind: str, **spec):
    """A model with an adapter moved away from its start, and its weights before."""
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    adapter = attach(model, {"kind": kind, **spec})
    disturb(adapter, seed=1, std=0.1)
    return model, adapter, before


def by_probing(model, path: str, before: torch.Tensor) -> np.ndarray:
    """D by what the module computes of unit vectors, without its bias; columns of the embedding by its tokens."""
    host = model.get_submodule(path)
    if not isinstance(host, Linear):
        tokens = torch.arange(len(before))
        with torch.no_grad():
            ctx = model.context(Layout.of([1] * len(tokens)))
            return (model.model.embed(host(tokens), model.model, ctx, tokens) - before).numpy()
    eye = torch.cat([torch.eye(host.in_features, dtype=torch.float64), torch.zeros(1, host.in_features)])
    with torch.no_grad():
        y = host(eye.double(), model.context(Layout.single(len(eye))))
    return ((y[:-1] - y[-1]).T - before).numpy()


@pytest.mark.parametrize("name", SPECS)
def test_the_spectrum_is_that_of_what_the_linears_compute(name):
    spec = dict(SPECS[name])
    model, adapter, before = moved(spec.pop("kind", name), **spec)
    found = list(changes(model, adapter, before.__getitem__))
    assert found
    for one in found:
        expected = by_probing(model, one.name.removesuffix(".weight"), before[one.name])
        U, S, V = one.change.svd()
        assert one.change.shape == expected.shape
        assert (U * S @ V.T).numpy() == pytest.approx(expected, abs=1e-7 * np.abs(expected).max() + 1e-7), one.name
        values = one.change.values().numpy()
        assert values == pytest.approx(np.linalg.svd(expected, compute_uv=False)[: len(values)], abs=1e-6)
    report = spectra(model, adapter, before.__getitem__)
    most = {"lora": 3, "pissa": 6}.get(name)
    if most is not None:
        assert all(isinstance(one.change, Product) for one in found)
        assert all(row["rank90"] <= row["rank"] <= most for row in report["weights"])
    if name == "full":
        shapes = [tuple(row["shape"]) for row in report["weights"]]
        assert all(row["rank"] == min(shape) for row, shape in zip(report["weights"], shapes, strict=True))
        assert sum(row["rank90"] for row in report["weights"]) > 0.4 * sum(min(shape) for shape in shapes)


@pytest.mark.parametrize("kind", sorted(CHANGE_NOTHING))
def test_a_method_that_changes_no_weight_says_so(kind):
    model, adapter, before = moved(kind, **({"layers": 1} if kind == "llama_adapter" else {}))
    with pytest.raises(AdapterError, match=f"spectrum: {kind} changes no weight matrix"):
        list(changes(model, adapter, before.__getitem__))


def test_every_method_is_in_this_file():
    seen = {"llama_adapter_image", "llama_adapter_v2_image", "image_projection"}  # LLaMA-Adapter's, with images
    assert set(kinds()) - seen == CHANGE_NOTHING | {spec.get("kind", name) for name, spec in SPECS.items()}


def test_means_over_layers_and_modules_by_hand():
    model, adapter, before = moved("lora", rank=2, target_modules=["q_proj", "down_proj"])
    report = spectra(model, adapter, before.__getitem__, against_weights=True)
    assert [(entry["layer"], entry["weights"]) for entry in report["layers"]] == [(0, 2), (1, 2)]
    assert [(entry["module"], entry["weights"]) for entry in report["modules"]] == [("q_proj", 2), ("down_proj", 2)]
    for key in ("rank90", "effective_rank", "relative", "shift"):
        rows = [row[key] for row in report["weights"] if row["module"] == "q_proj"]
        assert report["modules"][0][key] == pytest.approx(np.mean(rows))
    row = report["weights"][0]
    W = before[row["name"]].numpy()
    D = by_probing(model, row["name"].removesuffix(".weight"), before[row["name"]])
    assert row["relative"] == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), rel=1e-6)
    U, _, Vh = np.linalg.svd(D)
    inside = np.linalg.norm(U[:, :2].T @ W @ Vh[:2].T)
    assert row["amplification"]["factor"] == pytest.approx(np.linalg.norm(D) / inside, rel=1e-5)
    moved_by = np.abs(np.linalg.svd(W + D, compute_uv=False) - np.linalg.svd(W, compute_uv=False)).mean()
    assert row["shift"] == pytest.approx(moved_by, rel=1e-5)


def test_two_adapters_of_different_rank():
    model, adapter, before = moved("lora", rank=2, target_modules=["q_proj", "v_proj"])
    first = directions(model, adapter, before.__getitem__)
    other, second, _ = moved("lora", rank=5, target_modules=["v_proj", "k_proj"])
    with torch.no_grad():  # the small one's A lies within the large one's
        for place, delta in second.deltas.items():
            if "v_proj" in place:
                delta.A[:2] = adapter.deltas[place].A
    found = compared(first, directions(other, second, before.__getitem__))
    assert found["directions_of"] == "A"
    assert sorted(found["weights"]) == [f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)]
    assert list(found["mean"]["phi"]) == ["1,1", "1,2", "1,4", "1,5", "2,1", "2,2", "2,4", "2,5"]
    assert found["mean"]["phi"]["2,5"] == pytest.approx(1)
    assert found["mean"]["at_random"]["2,5"] == pytest.approx(5 / 24)
    itself = compared(first, first)["mean"]["phi"]
    assert [itself[key] for key in ("1,1", "2,2", "1,2")] == pytest.approx([1, 1, 1])


def test_a_lora_against_a_full_fine_tuning_is_compared_by_D():
    model, adapter, before = moved("lora", rank=2, target_modules=["q_proj"])
    other, full, weights = moved("full")
    found = compared(directions(model, adapter, before.__getitem__), directions(other, full, weights.__getitem__))
    assert found["directions_of"] == "D" and len(found["weights"]) == 2


def test_adapters_with_nothing_in_common_are_refused():
    first, second = (
        directions(model, adapter, before.__getitem__)
        for model, adapter, before in (moved("lora", rank=2, target_modules=[name]) for name in ("q_proj", "v_proj"))
    )
    with pytest.raises(AdapterError, match="no weight is changed by both"):
        compared(first, second)


def run_of(folder: Path, base: Path, **spec) -> Path:
    """A run folder whose configuration is whole."""
    run = make_run(folder, base, **spec)
    (run / "config.yaml").write_text(f"model: {{path: {base}, dtype: float32}}\ndata: {{train: none.jsonl}}\n")
    return run


def test_a_run_of_full_fine_tuning_is_held_against_its_base(tiny_base, tmp_path):
    report = spectrum(run_of(tmp_path / "run", tiny_base, kind="full", by=0.01))
    row = next(row for row in report["weights"] if row["name"].endswith("layers.0.mlp.down_proj.weight"))
    assert row["shape"] == [24, 40] and row["rank"] == 24 and row["rank90"] > 10
    assert row["norm"] == pytest.approx(0.01 * (24 * 40) ** 0.5, rel=0.1)  # Gaussian of 0.01
    assert {entry["layer"] for entry in report["layers"]} == {None, 0, 1}


def test_the_command(tiny_base, tmp_path, command):
    for rank in (2, 4):
        run_of(tmp_path / f"r{rank}", tiny_base, rank=rank)
    code, out, err = command("spectrum", tmp_path / "r2", "--against", tmp_path / "r4", "--weights")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "weights", "|D|/|W|", "rank", "rank90", "eff.", "rank", "amplif.", "shift"]
    assert [line.split()[:2] for line in lines[1:3]] == [["0", "7"], ["1", "7"]]
    assert "phi(i, j) of the directions of A, mean of 14 weights (at random)" in lines
    assert re.search(r"^2( +\d\.\d{3} \(\d\.\d{3}\)){3}$", out, re.MULTILINE)
    code, out, _ = command("spectrum", tmp_path / "r2", "--json")
    report = json.loads(out)
    assert code == 0 and all(row["rank"] == 2 and len(row["singular_values"]) == 2 for row in report["weights"])


@pytest.mark.parametrize("where", ["nowhere", "base"])
def test_what_holds_no_adapter_is_refused(where, tiny_base, tmp_path, command):
    code, out, err = command("spectrum", tiny_base if where == "base" else tmp_path / where)
    assert (code, out) == (2, "") and "holds no adapter; give a run folder or an adapter folder" in err
