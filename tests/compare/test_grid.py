"""grid.yaml: what it expands to, and each mistake as one line with its place."""

from __future__ import annotations

import math
import re
import shutil

import pytest
from tests.compare.made import BASE, grid_of

from tunesmith.adapters import find_method
from tunesmith.compare.grid import speed_of
from tunesmith.compare.inputs import data_hashes, input_hashes
from tunesmith.config.grid import Budget
from tunesmith.data.schemas import Row
from tunesmith.errors import ConfigError
from tunesmith.prepare import held_out_rows


def test_methods_axes_sizes_templates_and_seeds_are_multiplied(tmp_path):
    grid = grid_of(
        tmp_path,
        BASE + "methods:\n  - {name: small, kind: lora, rank: 2, axes: {dropout: [0.0, 0.1]}}\n  - prompt\n"
        "axes: {train.batch_size: [8, 16, 32]}\nsizes: [100, 200]\ntemplates: [chat, alpaca]\nseeds: [0, 1]\n",
    )
    assert len(grid.cells) == (2 + 1) * 3 * 2 * 2 * 2
    assert len(grid.lines) == len(grid.cells) // 2
    cell = next(c for c in grid.cells if c.slug == "small_batch_size=16_limit=200_template=alpaca_dropout=0.1_seed=1")
    run = cell.run
    assert (run.train.batch_size, run.data.limit, run.data.template, run.train.seed) == (16, 200, "alpaca", 1)
    assert run.adapter == {"kind": "lora", "rank": 2, "dropout": 0.1}
    assert cell.point["adapter.dropout"] == 0.1 and run.evaluate.samples == 0


def test_all_seeds_are_measured_on_the_same_held_out_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Say {n}", "completion": "{n}"}}\n' for n in range(40)))
    base = f"base: {{model: tiny, data: {{train: {rows}, valid_size: 8}}}}\nbudget: {{examples: 8}}\n"

    def held(text: str) -> list[list[Row]]:
        return [held_out_rows(cell.run) for cell in grid_of(tmp_path, base + text).cells]

    first, second, third = held("seeds: [0, 1, 2]\n")
    assert first == second == third == held("seeds: [0]\n")[0]
    assert held("seeds: [1]\n")[0] != first
    drawn = held("axes: {data.valid_seed: [0, 1]}\nseeds: [0, 1]\n")
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def test_names_are_folders_and_differ(tmp_path):
    values = "[a/b, a b, '../../x', {pattern: local, window: 8}]"
    axis = values.replace(", {pattern: local, window: 8}", "")
    grid = grid_of(tmp_path, BASE + f"axes: {{data.template: {axis}}}\n")
    slugs = [cell.slug for cell in grid.cells]
    assert len(set(slugs)) == 3 and all(re.fullmatch(r"[A-Za-z0-9_.=+-]{1,119}", slug) for slug in slugs)
    assert grid.cells[0].run.data.template == "a/b"


def test_values_may_be_mappings_lists_and_null(tmp_path):
    grid = grid_of(
        tmp_path,
        BASE + "axes:\n  model.attention: [null, {pattern: local, window: 8}]\n"
        "  adapter.target_modules: [[q_proj], [q_proj, v_proj]]\n",
    )
    seen = {(c.run.model.attention is None, tuple(c.run.adapter["target_modules"])) for c in grid.cells}
    assert len(seen) == 4
    assert len(set(grid.bases.values())) == 2  # sparse attention acts on the untuned base too


def test_a_method_sets_keys_of_the_run(tmp_path):
    text = BASE + "methods:\n  - {kind: full, set: {train.weight_decay: 0.1, model.dtype: float32}}\n  - lora\n"
    full, lora = grid_of(tmp_path, text).cells
    assert (full.run.train.weight_decay, full.run.model.dtype) == (0.1, "float32")
    assert (lora.run.train.weight_decay, lora.run.model.dtype) == (0.0, "auto")


def test_words_replace_what_the_file_says(tmp_path):
    words = ("base.data.train=e", "budget.examples=128", "seeds=[3]", "axes.data.limit=[1, 2]", "measure.rows=7")
    grid = grid_of(tmp_path, BASE + "measure: {metrics: [accuracy], rows: 5}\n", *words)
    assert [c.run.data.limit for c in grid.cells] == [1, 2]
    assert {(c.run.data.train, c.run.train.seed, c.budget.examples) for c in grid.cells} == {("e", 3, 128)}
    assert grid.spec.measure.sets[0].rows == 7


def test_rates_lie_around_the_methods_default(tmp_path):
    grid = grid_of(
        tmp_path, BASE + "methods: [lora, prompt]\nsearch: {rates: 3, factor: 10, share: 0.3}\nseeds: [0, 1]\n"
    )
    for cell in grid.cells:
        centre = find_method(cell.run.adapter["kind"]).learning_rate
        assert cell.rates == pytest.approx([centre / 10, centre, centre * 10], rel=1e-2)
        trials = grid.trials(cell)
        assert [t.run.train.learning_rate for t in trials] == list(cell.rates)
        assert {t.run.train.seed for t in trials} == {0}  # one search for a method, at its first seed
        spent = sum(t.budget.examples for t in trials) + cell.budget.examples
        assert 64 - 4 <= spent <= 64  # the search is paid from the budget; a part of a row is not trained on
    assert len({t.key({}) for cell in grid.cells for t in grid.trials(cell)}) == 6


def test_a_rate_that_the_grid_gives_is_the_centre(tmp_path):
    text = BASE + "methods: [{kind: lora, set: {train.learning_rate: 0.5}}]\nsearch: {rates: 2, factor: 2}\n"
    assert grid_of(tmp_path, text).cells[0].rates == (0.5, 1.0)


def test_a_search_for_every_line_has_its_own_trials(tmp_path):
    text = BASE + "axes: {adapter.rank: [1, 2]}\nsearch: {rates: 2, per: line}\n"
    grid = grid_of(tmp_path, text)
    one, two = grid.cells
    assert not {t.key({}) for t in grid.trials(one)} & {t.key({}) for t in grid.trials(two)}
    assert [t.run.adapter["rank"] for t in grid.trials(two)] == [2, 2]


def test_the_key_says_what_a_result_depends_on(tmp_path):
    text = BASE + "seeds: [0]\n"
    (cell,) = grid_of(tmp_path, text).cells
    same = [("--",), ("base.output_dir=elsewhere",), ("base.log.report_to=[]",), ("base.train.batch_size=16",)]
    for words in same:  # 16 is the default
        (other,) = grid_of(tmp_path, text, *[word for word in words if "=" in word]).cells
        assert other.key({}) == cell.key({}), words
    other_words = [
        "base.train.batch_size=8",
        "budget.examples=65",
        "base.train.learning_rate=1",
        "measure={split: valid, metrics: [accuracy]}",
    ]
    keys = {grid_of(tmp_path, text, word).cells[0].key({}) for word in other_words} | {cell.key({"d": "1"})}
    assert len(keys) == 5 and cell.key({}) not in keys


def test_defaults_are_no_part_of_the_key(tmp_path):
    """A setting that a later version adds must not make other cells."""
    (cell,) = grid_of(tmp_path, BASE + "axes: {train.beta2: [0.95]}\n").cells
    assert cell.identity["run"] == {
        "model.path": "m",
        "data.train": "d",
        "adapter": {"kind": "lora"},
        "train.beta2": 0.95,
        "evaluate.best": "eval_loss",
        "evaluate.samples": 0,
    }


def test_changed_data_change_the_key(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}", encoding="utf-8")
    first = data_hashes([str(data)], lambda name: name)
    data.write_text("{} ", encoding="utf-8")
    assert data_hashes([str(data)], lambda name: name) != first
    folder = data_hashes([str(tmp_path)], lambda name: name)
    (tmp_path / "test.jsonl").write_text("{}", encoding="utf-8")
    more = data_hashes([str(tmp_path)], lambda name: name)
    assert more != folder
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law.csv").write_text("a", encoding="utf-8")  # as MMLU has its subjects
    deeper = data_hashes([str(tmp_path)], lambda name: name)
    (tmp_path / "test" / "law.csv").write_text("b", encoding="utf-8")
    assert len({str(found) for found in (more, deeper, data_hashes([str(tmp_path)], lambda name: name))}) == 3


def test_every_file_that_settings_name_makes_other_cells(tmp_path, tiny_base):
    """A local base's weights, a method's own file, a template, the rows that examples are taken from."""
    data, shots, template, method = (tmp_path / name for name in ("d.jsonl", "shots.jsonl", "t.jinja", "m.py"))
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for path in (data, shots, template, method):
        path.write_text("{}", encoding="utf-8")
    measure = f"measure: {{tasks: [{{task: arc_easy, data: {data}, settings: {{shots: 1, shots_from: {shots}}}}}]}}\n"
    grid = grid_of(
        tmp_path, f"base: {{model: {base}, data: {data}}}\nbudget: {{examples: 8}}\ntemplates: [{template}]\n{measure}"
    )
    seen = [input_hashes(grid, [method])]
    assert input_hashes(grid, [method]) == seen[0]
    for path in (data, shots, template, method):
        path.write_text("{} ", encoding="utf-8")
        seen.append(input_hashes(grid, [method]))
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    seen.append(input_hashes(grid, [method]))
    assert len({str(found) for found in seen}) == 6


def test_seeds_come_one_after_the_other_and_the_base_first(tmp_path):
    grid = grid_of(tmp_path, BASE + "methods: [lora, prompt]\nseeds: [5, 3]\n")
    order = [(c.role, c.method, c.run.train.seed) for c in grid.in_order()]
    assert order[0][0] == "base"
    assert order[1:] == [("cell", "lora", 5), ("cell", "prompt", 5), ("cell", "lora", 3), ("cell", "prompt", 3)]
    assert not grid_of(tmp_path, BASE + "baseline: false\n").bases


def test_timed_steps_are_a_few(tmp_path):
    (cell,) = grid_of(tmp_path, "base: {model: m, data: d}\nbudget: {seconds: 10, memory: 2}\n").cells
    speed = speed_of(cell)
    assert speed.run.train.max_steps == 6 and speed.budget == Budget(memory=2.0)
    assert math.isclose(cell.budget.seconds, 10)


MISTAKES = {
    "budget: {exampels: 3}": "budget.exampels: unknown key (grid.yaml line 2); did you mean 'examples'?",
    "budget: {}": "budget: give one or more of examples, tokens, seconds, memory",
    "budget: {examples: 0}": "budget.examples: should be greater than or equal to 1, not 0 (grid.yaml line 2)",
    "budget: {examples: 9}\nbugdet: 3": "bugdet: unknown key (grid.yaml line 3); did you mean 'budget'?",
    "budget: {examples: 9}\nmethods: []": (
        "methods: should be a list of adapters, such as [lora, full] (grid.yaml line 3)"
    ),
    "budget: {examples: 9}\nmethods: [loar]": (
        "methods: loar: adapter.kind: there is no method 'loar'; did you mean 'lora'?"
    ),
    "budget: {examples: 9}\nmethods:\n  - {kind: lora,\n     rnk: 3}": (
        "methods: lora: adapter.rnk: unknown key (grid.yaml line 5); did you mean 'rank'?"
    ),
    "budget: {examples: 9}\nmethods: [lora, lora]": "methods: two are called 'lora' (grid.yaml line 3)",
    "budget: {examples: 9}\nmethods: [prompt]\naxes: {adapter.rank: [1]}": (
        "methods: prompt: adapter.rank: unknown key (grid.yaml line 4)"
    ),
    "budget: {examples: 9}\naxes: {train.bach_size: [1]}": (
        "train.bach_size: unknown key (grid.yaml line 3); did you mean 'batch_size'?"
    ),
    "budget: {examples: 9}\naxes: {adapter.rank: 3}": (
        "axes.adapter.rank: should be a list of values, such as [1, 2], not 3 (grid.yaml line 3)"
    ),
    "budget: {examples: 9}\naxes: {adapter.rank: [3, 3]}": "axes.adapter.rank: 3 is there twice (grid.yaml line 3)",
    "budget: {examples: 9}\naxes: {train.seed: [3]}": (
        "axes: write seeds: [0, 1], not an axis of seeds (grid.yaml line 3)"
    ),
    "budget: {examples: 9}\nsizes: [1]\naxes: {data.limit: [3]}": (
        "sizes: is axes.data.limit, which is given too (grid.yaml line 3); keep one"
    ),
    "budget: {examples: 9}\nseeds: [x]": "seeds: should be whole numbers from 0 on, not ['x'] (grid.yaml line 3)",
    "budget: {examples: 9}\nsearch: {rates: 1}": (
        "search.rates: should be greater than or equal to 2, not 1 (grid.yaml line 3)"
    ),
    "budget: {examples: 9}\nsearch: {metric: accuracy}": "search.metric: 'accuracy' is not measured during training",
    "budget: {examples: 9}\nsearch: {}\naxes: {train.learning_rate: [1.0]}": (
        "search: learning rates are an axis of the grid already"
    ),
    "budget: {examples: 3}\nsearch: {rates: 3}": "budget.examples: 3 leaves nothing for a trial rate of the search",
    "budget: {examples: 9}\nmeasure: {metrics: [acuracy]}": (
        "measure.metrics: there is no metric 'acuracy'; did you mean 'accuracy'?"
    ),
    "budget: {examples: 9}\nmeasure: {tasks: [{task: hellaswga, data: x}]}": (
        "measure.task: there is no task 'hellaswga'"
    ),
    "budget: {examples: 9}\nmeasure: {tasks: [{task: hellaswag}]}": (
        "measure.tasks.0: data: say where the task's rows are"
    ),
    "budget: {examples: 9}\nmeasure: {rows: 3}": "measure: give either a task, or metrics",
    "budget: {examples: 9}\nmeasure: {row: 3}": "measure.row: unknown key (grid.yaml line 3); did you mean 'rows'?",
    "budget: {examples: 9}\nbase.x: 1": "base.x: unknown key (grid.yaml line 3)",
    "budget: {tokens: 99}\naxes: {train.epochs: [2.0]}": "train.epochs: the budget says how long every cell trains",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text.replace("\n", " "))
def test_a_mistake_is_one_line_with_its_place(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        grid_of(tmp_path, f"base: {{model: m, data: d}}\n{text}\n")
    assert MISTAKES[text] in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_in_a_word_names_the_word(tmp_path):
    with pytest.raises(ConfigError, match=r"budget.exampels: unknown key \(override budget.exampels=3\)"):
        grid_of(tmp_path, BASE, "budget.exampels=3")
    with pytest.raises(ConfigError, match=r"train.epoch: unknown key \(override base.train.epoch=3\)"):
        grid_of(tmp_path, BASE, "base.train.epoch=3")


def test_no_data_says_how_to_give_them(tmp_path):
    with pytest.raises(ConfigError, match="data.train: missing"):
        grid_of(tmp_path, "base: {model: m}\nbudget: {examples: 64}\n")
    with pytest.raises(ConfigError, match="budget: missing in grid.yaml"):
        grid_of(tmp_path, "base: {model: m, data: d}\n")


def test_a_grid_has_an_end(tmp_path):
    many = ", ".join(map(str, range(60)))
    with pytest.raises(ConfigError, match="3600 cells, more than 2000"):
        grid_of(tmp_path, BASE + f"seeds: [{many}]\nsizes: [{many.replace('0,', '99,', 1)}]\n")


def test_a_base_in_other_bits_is_named_by_its_method(tmp_path):
    """A method's own `set` may change the base too: each such base is measured, and can be told apart."""
    methods = "[lora, {name: nf4, kind: lora, set: {quant.kind: nf4}}, {name: nf2, kind: lora, set: {quant.kind: nf2}}]"
    grid = grid_of(tmp_path, BASE + f"methods: {methods}\n")
    assert [base.slug for base in grid.bases.values()] == ["untuned", "untuned_nf4", "untuned_nf2"]
    assert [base.method for base in grid.bases.values()][1:] == ["untuned base of nf4", "untuned base of nf2"]
