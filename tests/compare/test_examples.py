"""The grids in examples/grids: each is read and expanded, and has the cells that its head says. None is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tunesmith.compare.grid import Grid, expand
from tunesmith.config.grid_file import read_grid

ROOT = Path(__file__).parents[2]
GRIDS = ROOT / "examples" / "grids"
CELLS = {
    "quick": 3,
    "sentiment": 3 * 3 + 3 * 3,
    "adapter-report": 2 * 5,
    "forgets-gsm8k": 3 + 4 + 1,
    "forgets-text": 3 + 4 + 1,
    "zero-init": 2 * 4,
    "weights-rank": 3 * 5 + 3 + 1,
    "seeds": 15 * 3,
    "images": 3 * 3,
    "bits": 5,
}
DATA = {"images"}  # these are given a data set by a word


def grid(name: str, *words: str) -> Grid:
    given = ("base.data.train=rows.jsonl",) if name in DATA else ()
    return expand(read_grid(GRIDS / f"{name}.yaml", (*given, *words)))


def values(found: Grid, key: str) -> set[str]:
    return {json.dumps(cell.point.get(key)) for cell in found.cells}


def test_every_grid_is_counted_here() -> None:
    assert {path.stem for path in GRIDS.glob("*.yaml")} == set(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_a_grid_expands_to_its_cells(name: str) -> None:
    found = grid(name)
    assert len(found.cells) == CELLS[name] and found.notes == ()
    assert len({cell.key({}) for cell in found.cells}) == CELLS[name]
    head = (GRIDS / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    assert f"tunesmith compare examples/grids/{name}.yaml" in head
    assert name == "quick" or "Cut" in head  # what was cut against the papers is said


def test_sentiment_crosses_rows_with_virtual_tokens_and_with_dropout() -> None:
    found = grid("sentiment")
    assert values(found, "adapter.virtual_tokens") == {"8", "25", "80", "null"}
    assert values(found, "adapter.dropout") == {"0.0", "0.05", "0.1", "null"} and len(values(found, "data.limit")) == 3
    words = (
        "folder=../imdb",
        "base.data.train=./",
        "base.data.valid_size=200",
        "measure.data=./",
        "measure.split=valid",
    )
    imdb = grid("sentiment", *words)
    assert {cell.run.data.train for cell in imdb.cells} == {"../imdb"}
    assert imdb.spec.measure.sets[0].data == "../imdb"


def test_adapter_report_crosses_versions_with_attention() -> None:
    found = grid("adapter-report")
    patterns = {(c.method, c.run.model.attention and c.run.model.attention.pattern) for c in found.cells}
    assert patterns == {(v, p) for v in ("v1", "v2") for p in (None, "local", "strided", "fixed", "s2")}


@pytest.mark.parametrize("name", ["forgets-gsm8k", "forgets-text"])
def test_forgetting_sets_full_against_ranks_and_regularisers(name: str) -> None:
    found = grid(name, "folder=../data")
    full = [
        (c.run.train.weight_decay > 0, c.run.train.attention_dropout > 0)
        for c in found.cells
        if c.run.adapter["kind"] == "full"
    ]
    assert sorted(full) == [(False, False), (False, True), (True, False)]
    assert [c.point["adapter.rank"] for c in found.cells if c.method == "LoRA"] == [4, 16, 64, 256]
    assert len(found.spec.measure.forgetting) >= 2 and found.spec.search is not None
    assert all(path.startswith("../data/") for path in found.paths())


def test_zero_init_crosses_gates_with_layers() -> None:
    found = grid("zero-init")
    crossed = {(c.run.adapter.get("init", "zero"), c.run.adapter["layers"]) for c in found.cells}
    assert crossed == {(init, layers) for init in ("zero", "random") for layers in (7, 14, 21, 28)}


def test_weights_and_ranks_are_those_of_the_papers_tables() -> None:
    found = {(tuple(c.run.adapter["target_modules"]), c.run.adapter["rank"]) for c in grid("weights-rank").cells}
    q, k, v, o = (f"{name}_proj" for name in "qkvo")
    table_5 = {((q,), 8), ((k,), 8), ((v,), 8), ((o,), 8), ((q, k), 4), ((q, v), 4), ((q, k, v, o), 2)}
    table_6 = {(weights, rank) for weights in ((q,), (q, v), (q, k, v, o)) for rank in (1, 2, 4, 8, 64)}
    assert found == table_5 | table_6


def test_seeds_has_each_method_of_the_methods_page_once_at_its_default_rate() -> None:
    from bench.method_table import ROWS, leads

    found = {method.name: method.layer for method in read_grid(GRIDS / "seeds.yaml").methods}
    rows = [row for row in ROWS if leads(row) or row.kind == "mixed"]
    for row in rows:
        assert found[row.name]["adapter"] == json.loads(json.dumps(dict(row.adapter))), row.name
        assert "train.learning_rate" not in found[row.name]
    assert set(found) == {row.name for row in rows}


def test_the_examples_are_plain_yaml() -> None:
    for path in GRIDS.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
