"""What is read of cells' folders; whatever is wrong with one is named, and nothing of it is averaged."""

from __future__ import annotations

import json

import pytest
from tests.compare.made import BASE, INPUTS, fail_cell, grid_of, rights, write_cell

from tunesmith.compare.read import Found, Lost, read_cell
from tunesmith.compare.table import tabulate


@pytest.fixture
def grid(tmp_path):
    return grid_of(tmp_path, BASE + "seeds: [0, 1]\nmeasure: {metrics: [accuracy]}\nbaseline: false\n")


def test_a_finished_cell_with_its_costs(grid, tmp_path):
    cell = grid.cells[0]
    write_cell(cell, tmp_path, {"accuracy": rights(0.8)}, parameters=300, speed=400.0, peak=1.5)
    found = read_cell(cell, tmp_path, INPUTS)
    assert isinstance(found, Found)
    costs = found.costs
    assert (costs.steps, costs.examples, costs.tokens, costs.parameters, costs.peak_gib) == (8, 64, 640, 300, 1.5)
    assert costs.seconds == pytest.approx(8 * 80 / 400) and costs.tokens_per_second == pytest.approx(400)
    assert found.loss[0] == (1, pytest.approx(3 + 1 / 300)) and len(found.loss) == 8
    assert [step for step, _ in found.held_out] == [4, 8]
    assert found.result.figures["accuracy"].value == pytest.approx(0.8)


def test_missing_begun_and_failed(grid, tmp_path):
    one, two = grid.cells
    missing = read_cell(one, tmp_path, INPUTS)
    assert isinstance(missing, Lost) and (missing.kind, missing.why) == ("missing", "not run yet")
    missing.folder.mkdir(parents=True)
    assert read_cell(one, tmp_path, INPUTS).why == "begun, and not finished"
    fail_cell(two, tmp_path, "diverged", "the loss is nan")
    failed = read_cell(two, tmp_path, INPUTS)
    assert (failed.kind, failed.why) == ("failed", "diverged: the loss is nan")


def edit(name, change):
    def damage(folder):
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return damage


def edit_json(name, change):
    def of(text):
        found = json.loads(text)
        change(found)
        return json.dumps(found)

    return edit(name, of)


def edit_unsealed(change):
    """Change a result of an earlier version, which held no hash of its own."""

    def of(found):
        del found["sha256"]
        change(found)

    return edit_json("result.json", of)


def to_nan(found):
    found["figures"]["accuracy"]["value"] = float("nan")


def of_adapter(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")


OWN = "result.json: its SHA-256 differs"
DAMAGE = {
    "metrics cut": (edit("metrics.jsonl", lambda text: text[:-40]), "metrics.jsonl: its SHA-256 differs"),
    "metrics gone": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl: is missing"),
    "another configuration": (edit("config.yaml", lambda text: text + "\n"), "config.yaml: its SHA-256 differs"),
    "result torn": (edit("result.json", lambda text: text[: len(text) // 2]), "result.json: not readable"),
    "result is a list": (edit("result.json", lambda text: "[]"), "result.json: not readable"),
    "result of another cell": (edit_json("result.json", lambda f: f.update(key="0")), "belongs to other settings"),
    "another format": (edit_json("result.json", lambda f: f.update(format=9)), "another format"),
    "a key is missing": (edit_unsealed(lambda f: f.pop("figures")), "keys are missing"),
    "a figure is text": (edit_unsealed(lambda f: f["figures"]["accuracy"].update(value="x")), "wrong type"),
    "a figure is nan": (edit_unsealed(to_nan), "wrong type"),
    "a figure was raised": (
        edit_unsealed(lambda f: f["figures"]["accuracy"].update(value=0.99)),
        "the rows of accuracy do not make its figure",
    ),
    "a figure without rows": (edit_json("result.json", lambda f: f["figures"]["perplexity"].update(value=2.0)), OWN),
    "fewer examples": (edit_json("result.json", lambda f: f["used"].update(examples=3)), OWN),
    "a validation measure": (edit_json("result.json", lambda f: f["valid"].update(eval_loss=0.1)), OWN),
    "a hash that is none": (edit_json("result.json", lambda f: f.update(sha256=None)), OWN),
    "rows changed": (edit("outcomes.json", lambda text: text.replace("0.0", "1.0", 1)), "outcomes.json: its SHA-256"),
    "a path of its own": (edit_unsealed(lambda f: f["files"].update({"../../x": "0"})), "no cell has"),
    "verify.json gone": (lambda folder: (folder / "verify.json").unlink(), "verify.json: is missing"),
    "adapter half there": (of_adapter, "adapter: "),
    "too deep": (edit("result.json", lambda text: "[" * 100_000), "result.json: not readable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_named_and_not_averaged(grid, tmp_path, kind):
    whole, hurt = grid.cells
    write_cell(whole, tmp_path, {"accuracy": rights(0.8)})
    folder = write_cell(hurt, tmp_path, {"accuracy": rights(0.2)}, whole={"perplexity": 21.0}, valid={"eval_loss": 2.0})
    change, said = DAMAGE[kind]
    change(folder)
    found = read_cell(hurt, tmp_path, INPUTS)
    assert isinstance(found, Lost) and found.kind == "damaged" and said in found.why
    assert str(folder) in found.why and "\n" not in found.why
    table = tabulate(grid, tmp_path, INPUTS)
    assert table.lines[0].figures["accuracy"].mean == pytest.approx(0.8)
    assert [lost.cell for lost in table.lost] == [hurt]


KEPT = {
    "an earlier version's": edit_unsealed(lambda found: None),
    "written in another layout": edit("result.json", lambda text: json.dumps(json.loads(text), sort_keys=True)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_result_is_valid_without_its_own_hash_and_in_any_layout(grid, tmp_path, kind):
    samples = ({"prompt": "Où?", "answer": "\u96ea"},)
    folder = write_cell(grid.cells[0], tmp_path, {"accuracy": rights(1 / 3)}, samples=samples)
    before = read_cell(grid.cells[0], tmp_path, INPUTS)
    KEPT[kind](folder)
    after = read_cell(grid.cells[0], tmp_path, INPUTS)
    assert isinstance(after, Found) and after.result == before.result and after.result.samples == list(samples)


def test_folders_of_other_settings_are_strangers(grid, tmp_path):
    write_cell(grid.cells[0], tmp_path, {"accuracy": rights(0.8)})
    (tmp_path / "cells" / "lora_seed=0-00000000").mkdir()
    table = tabulate(grid, tmp_path, INPUTS)
    assert table.strangers == ["lora_seed=0-00000000"]
