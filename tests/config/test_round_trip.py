"""What a run writes down is what it was: load(dump(run)) == run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.config import DataSection, EvaluateSection, LogSection, ModelSection, Run, TrainSection, load_run

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
tricky = st.sampled_from(
    [
        "yes",
        "no",
        "1e-4",
        "3",
        "~",
        "null",
        "",
        " x ",
        "a: b",
        "#c",
        "<<",
        "=",
        "{a}",
        "- a",
        "\t",
        "é\n\nb",
        "0x1",
        "\x85x",
    ]
)
words = st.one_of(text, tricky.filter(bool))
count = st.integers(1, 10**9)
maybe = lambda strategy: st.none() | strategy  # noqa: E731
share = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-300, 1e300)
scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | tricky
nested = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)

models = st.builds(ModelSection, path=words, revision=maybe(words), dtype=st.sampled_from(["auto", "float16"]))
data = st.builds(
    DataSection,
    train=words,
    valid_size=st.none() | st.integers(0, 10**6) | share,
    template=words,
    instruction=maybe(words | tricky),
    labels=st.lists(words, max_size=3).map(tuple),
    cutoff=st.integers(2, 10**6),
    cut=st.sampled_from(["answer-end", "drop"]),
    train_on_inputs=st.booleans(),
) | st.builds(DataSection, train=words, valid_size=st.integers(1, 10**6), valid_seed=st.integers(0, 10**6))
trains = st.builds(
    TrainSection, epochs=positive, learning_rate=maybe(positive), eps=positive, warmup_ratio=share, beta1=share,
    seed=st.integers(0, 2**63 - 1), resume=maybe(words), micro_batch=maybe(count), shuffle=st.booleans(),
)  # fmt: skip
evaluates = st.builds(EvaluateSection, metrics=st.lists(words, max_size=3).map(tuple), patience=maybe(count))
logs = st.builds(LogSection, report_to=st.sampled_from([(), ("wandb",), ("trackio", "wandb")]), name=maybe(words))
runs = st.builds(
    Run, model=models, data=data, train=trains, evaluate=evaluates, log=logs, output_dir=words,
    adapter=st.dictionaries(words, nested, max_size=4).map(lambda extra: {**extra, "kind": "lora"}),
    name=maybe(st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(runs)
@example(Run(model=ModelSection(path="\x85"), data=DataSection(train="a\u2028b", template=" a\n\n  b\r\n")))
def test_a_dumped_run_loads_equal(run: Run):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(run.dump_yaml(), encoding="utf-8", newline="")
        again, notes = load_run(path)
    assert again == run
    assert notes == []
    assert again.dump_yaml() == run.dump_yaml()
