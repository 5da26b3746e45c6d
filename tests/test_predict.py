"""`predict`: labels and probabilities as transformers computes them; exactly once and in order, whatever stops it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.tiny import reviews, words, write_rows

from tunesmith import api
from tunesmith import predict as room
from tunesmith.data.encode import encode_prompt
from tunesmith.data.sources import read_rows
from tunesmith.data.texts import scan_texts
from tunesmith.errors import ConfigError, DataError, DiskError, Interrupted
from tunesmith.evaluate import labelled_file
from tunesmith.evaluate.classification import predict_labels
from tunesmith.evaluate.labelling import Labeller
from tunesmith.evaluate.subject import Subject

ROOT = Path(__file__).parents[1]
TASK = {"names": ["negative", "positive"], "instruction": "Good or bad?"}
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def run(tiny_base, tiny_reviews, tmp_path_factory) -> Path:
    """A run of two steps on 24 reviews."""
    from tunesmith import workflow
    from tunesmith.cli import main

    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "verify_run", partial(workflow.verify_run, fresh=False))
        given = words(tiny_base, tiny_reviews, out, evaluate__samples=0, train__max_steps=2)
        assert main(["train", *given]) == 0
    return out / "run"


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(room, "CHUNK_ROWS", 4)


def texts(path: Path, number: int = 18) -> Path:
    rows = [{"id": i, "text": row["text"]} for i, row in enumerate(reviews(number, seed=3))]
    return write_rows(path, rows)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_probabilities_are_those_of_transformers(tiny_base, tmp_path) -> None:
    """Log-probabilities of every token of a label, summed by a loop over transformers' own logits."""
    from transformers import AutoModelForCausalLM

    file, out = texts(tmp_path / "texts.jsonl", 3), tmp_path / "labels.jsonl"
    room.predict(tiny_base, file, out, **TASK)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    loaded = api.load(tiny_base, dtype="float32")
    template, _ = api.acting(loaded)
    asked = write_rows(tmp_path / "asked.jsonl", [{"text": r["text"], "label": "negative"} for r in read(file)])
    for row, found in zip(read_rows(asked, instruction=TASK["instruction"]), read(out), strict=True):
        prompt = encode_prompt(row, template, loaded.tokenizer)
        sums = []
        for label in TASK["names"]:
            answer = loaded.tokenizer.encode(label)
            with torch.no_grad():
                chances = theirs(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        expected = torch.tensor(sums).softmax(-1)
        assert found["label"] == TASK["names"][int(expected.argmax())]
        assert found["probability"] == pytest.approx(float(expected.max()), abs=0.01)  # bfloat16, where it is fast


def test_a_run_knows_its_labels_and_labels_as_it_is_evaluated(run, command, tmp_path) -> None:
    file, out = texts(tmp_path / "texts.jsonl"), tmp_path / "labels.jsonl"
    code, printed, err = command("predict", run, "--file", file, "--out", out, "--json")
    assert code == 0, err
    report, rows = json.loads(printed), read(out)
    assert [row["id"] for row in rows] == list(range(18)) and report["rows"] == report["written"] == 18
    assert report["labels"] == {name: sum(r["label"] == name for r in rows) for name in ("negative", "positive")}
    assert all(0.5 <= row["probability"] <= 1 for row in rows)
    loaded = api.load(run)
    template, adapters = api.acting(loaded)
    labelled = write_rows(tmp_path / "labelled.jsonl", [{**row, "label": ("negative", "positive")[i % 2]}
                                                        for i, row in enumerate(read(file))])  # fmt: skip
    subject = Subject(loaded.model, loaded.tokenizer, template, tuple(read_rows(labelled)), (),
                      ("negative", "positive"), adapters)  # fmt: skip
    assert predict_labels(subject) == [row["label"] for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("dies_at", range(6))
def test_killed_anywhere_it_ends_with_the_same_bytes(run, small_chunks, monkeypatch, tmp_path, suffix, dies_at) -> None:
    """18 rows in chunks of 4: killed after the lines are written and before that is noted, and half a line is left."""
    file = texts(tmp_path / "texts.jsonl")
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"labels{suffix}"
    model = api.load(run)  # loaded once
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: model)
    room.predict(run, file, whole)
    calls, write = count(), labelled_file.atomic_write_json

    def dying(path, value):
        if next(calls) == dies_at:
            raise DiskError("killed")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(labelled_file, "atomic_write_json", dying)
        with pytest.raises(DiskError):
            room.predict(run, file, out)
    if out.exists():
        with out.open("ab") as torn:
            torn.write(b'{"text": "half a li')
    report = room.predict(run, file, out)
    assert out.read_bytes() == whole.read_bytes() and report["rows"] == 18
    before = out.stat().st_mtime_ns
    assert room.predict(run, file, out)["rows_before"] == 18 and out.stat().st_mtime_ns == before


def test_interrupted_it_says_how_to_go_on(run, small_chunks, monkeypatch, tmp_path) -> None:
    file, out = texts(tmp_path / "texts.jsonl"), tmp_path / "labels.jsonl"
    label, calls = Labeller.label, count()

    def stopping(self, found):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return label(self, found)

    monkeypatch.setattr(Labeller, "label", stopping)
    with pytest.raises(Interrupted, match="8 of 18 rows are done; the same command goes on"):
        room.predict(run, file, out)
    assert len(read(out)) == 8
    report = room.predict(run, file, out)
    assert (report["rows_before"], report["rows"]) == (8, 18)
    assert [row["id"] for row in read(out)] == list(range(18))


def test_what_has_changed_is_named_and_refused(run, small_chunks, monkeypatch, tmp_path) -> None:
    file, out = texts(tmp_path / "texts.jsonl"), tmp_path / "labels.jsonl"
    room.predict(run, file, out)
    kept = out.read_bytes()
    with pytest.raises(DataError, match="begun with another labels, instruction"):
        room.predict(run, file, out, names=["positive", "bad"])
    with pytest.raises(DataError, match="begun with another min_probability"):
        room.predict(run, file, out, min_probability=0.5)
    out.write_bytes(kept.replace(b"positive", b"negative"))
    with pytest.raises(DataError, match="is not what was written"):
        room.predict(run, file, out)
    out.write_bytes(kept)
    texts(file, 19)
    with pytest.raises(DataError, match="begun with another file, rows"):
        room.predict(run, file, out)
    assert out.read_bytes() == kept
    Path(f"{out}.progress.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read; remove"):
        room.predict(run, file, out)
    Path(f"{out}.progress.json").unlink()
    with pytest.raises(DataError, match="is there already"):
        room.predict(run, file, out)
    assert out.read_bytes() == kept


def test_another_adapter_is_refused(run, tmp_path) -> None:
    before = room._adapter(run)
    file = run / "adapter" / "adapter_model.safetensors"
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert room._adapter(run) != before
    finally:
        file.write_bytes(data)
    assert room._adapter(run) == before


def test_another_base_is_refused(tiny_base, tmp_path) -> None:
    import shutil

    from tests.tiny import edit_weights

    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    file, out = texts(tmp_path / "texts.jsonl", 2), tmp_path / "labels.jsonl"
    room.predict(copy, file, out, **TASK)
    edit_weights(copy, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(DataError, match="begun with another base;"):
        room.predict(copy, file, out, **TASK)


def as_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_kind_of_file_gives_the_same_labels(tiny_base, tmp_path, monkeypatch) -> None:
    model = api.load(tiny_base)
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: model)
    rows = [{"text": 'A joy, a "real" one.', "id": "1"}, {"text": "Dull, far too long.", "id": "2"}]
    lines = "\n".join(row["text"] for row in rows)
    (tmp_path / "a.txt").write_text(f"{lines}\n\n", encoding="utf-8")
    (tmp_path / "strings.jsonl").write_text("\n".join(json.dumps(r["text"]) for r in rows), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    files = [write_rows(tmp_path / "a.jsonl", rows), as_csv(tmp_path / "a.csv", rows), tmp_path / "list.json",
             as_parquet(tmp_path / "a.parquet", rows), tmp_path / "a.txt", tmp_path / "strings.jsonl"]  # fmt: skip
    found = {}
    for file in files:
        out = tmp_path / f"{file.name}.out.jsonl"
        room.predict(tiny_base, file, out, **TASK)
        found[file.name] = [(r["text"], r["label"], r["probability"]) for r in read(out)]
        assert "id" not in read(files[0].with_name("a.jsonl"))[0] or len(read(out)) == 2
    assert len({json.dumps(rows) for rows in found.values()}) == 1


def test_other_keys_go_along(tiny_base, tmp_path) -> None:
    rows = [{"review": "One\nof two lines", "label": "x", "n": [1, 2]}, {"review": "Two", "extra": 'é,"q"'}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    report = room.predict(tiny_base, file, tmp_path / "out.jsonl", column="review", **TASK)
    first, second = read(tmp_path / "out.jsonl")
    assert first["text"] == "One\nof two lines" and first["given_label"] == "x" and first["n"] == [1, 2]
    assert first["label"] in TASK["names"] and second["extra"] == 'é,"q"' and "n" not in second
    assert report["rows"] == 2
    room.predict(tiny_base, file, tmp_path / "out.csv", column="review", **TASK)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as cells:
        table = list(csv.DictReader(cells))
    assert [row["text"] for row in table] == ["One\nof two lines", "Two"]
    assert table[0]["n"] == "[1, 2]" and table[1] == {
        "text": "Two", "label": second["label"], "probability": str(second["probability"]),
        "given_label": "", "n": "", "extra": 'é,"q"',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "fine"}\n{"txt": "x"}\n', r"a\.jsonl:2: has no text in 'text' \(keys here: txt\)"),
        ('{"text": "fine"}\n{"text": "  "}\n', r"a\.jsonl:2: has no text"),
        ('{"text": "fine"}\n{"text": \n', r"a\.jsonl:2: is not JSON"),
        ('{"text": "\\ud800"}\n', r"a\.jsonl:1: .*surrogate"),
        ("", r"a\.jsonl: is empty"),
        ("\n\n", r"a\.jsonl: holds no text"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_written(tiny_base, tmp_path, content, said) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        room.predict(tiny_base, tmp_path / "a.jsonl", tmp_path / "out.jsonl", **TASK)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}


def test_a_surrogate_in_another_key_does_no_harm(tiny_base, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "n": "\\ud800"}\n', encoding="utf-8")
    room.predict(tiny_base, tmp_path / "a.jsonl", tmp_path / "out.jsonl", **TASK)
    assert read(tmp_path / "out.jsonl")[0]["n"] == "\ud800"


def test_settings_that_cannot_act_are_refused(tiny_base, tmp_path, command) -> None:
    file = texts(tmp_path / "a.jsonl", 2)
    for extra, said in [
        ({"out": tmp_path / "out.txt"}, "should end with .jsonl or .csv"),
        ({"min_probability": 1.5}, "from 0 to 1"),
        ({"names": []}, "--labels: say which labels"),
        ({"names": ["one"]}, "two or more"),
        ({"names": ["one", "one"]}, "two or more"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            room.predict(tiny_base, file, **{"out": tmp_path / "out.jsonl", **TASK, **extra})
    code, _, err = command("predict", tiny_base, "--file", tmp_path / "none.jsonl", "--out", tmp_path / "o.csv",
                           "--labels", "a,b")  # fmt: skip
    assert code == 2 and "none.jsonl: no such file" in err


def test_a_long_text_loses_its_beginning(tiny_base, tmp_path) -> None:
    """Two texts that differ only in what must go have one probability; the instruction stays."""
    end = "it was " * 40 + "a joy"
    file = write_rows(tmp_path / "a.jsonl", [{"text": "bad " * n + end} for n in (150, 200)] + [{"text": "a joy"}])
    report = room.predict(tiny_base, file, tmp_path / "out.jsonl", cutoff=160, **TASK)
    first, second, short = read(tmp_path / "out.jsonl")
    assert report["cut"] == 2 and first["probability"] == second["probability"] != short["probability"]
    loaded = api.load(tiny_base)
    template, adapters = api.acting(loaded)
    options = ("negative", "positive")
    labeller = Labeller(loaded.model, loaded.tokenizer, template, options, "Good or bad?", adapters, 160)
    ids, cut = labeller._prompt("bad " * 150 + end)
    text = loaded.tokenizer.decode(ids)
    longest = max(map(len, labeller._options))
    assert cut and 160 - longest - 3 < len(ids) <= 160 - longest
    assert "Good or bad?" in text and text.endswith(" a joy\nassistant\n") and "bad bad" not in text
    with pytest.raises(ConfigError, match="leaves no room for a text"):
        Labeller(loaded.model, loaded.tokenizer, template, ("a" * 80, "b"), "", adapters, 8).label(["x" * 200])


def test_improbable_labels_are_left_out_and_counted(tiny_base, tmp_path) -> None:
    file = texts(tmp_path / "a.jsonl", 10)
    room.predict(tiny_base, file, tmp_path / "all.jsonl", **TASK)
    rows = read(tmp_path / "all.jsonl")
    middle = sorted(row["probability"] for row in rows)[5]
    report = room.predict(tiny_base, file, tmp_path / "some.jsonl", min_probability=middle - 1e-7, **TASK)
    kept = [row for row in rows if row["probability"] >= middle]
    assert read(tmp_path / "some.jsonl") == kept and (report["rows"], report["left_out"]) == (10, 10 - len(kept))


def test_rows_are_held_a_chunk_at_a_time(monkeypatch) -> None:
    taken = []

    def rows():
        for i in range(100):
            taken.append(i)
            yield "x" * (1 + 99 * (i >= 50)), {}

    monkeypatch.setattr(room, "CHUNK_ROWS", 10)
    monkeypatch.setattr(room, "CHUNK_CHARACTERS", 300)
    chunks = room._chunks(rows())
    sizes = []
    for chunk in chunks:
        sizes.append(len(chunk))
        assert len(taken) == sum(sizes)  # nothing is read ahead
    assert sizes == [10] * 5 + [3] * 16 + [2]


def test_a_file_is_scanned_without_being_held(tmp_path) -> None:
    import tracemalloc

    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        for i in range(3_000):
            out.write(json.dumps({"text": f"{i} " + "x" * 400}) + "\n")
    tracemalloc.start()
    assert scan_texts(file).rows == 3_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 4


def test_a_run_whose_data_is_gone_asks_for_labels(run, tmp_path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"train: .*reviews.*", "train: ./gone", config))
    file = texts(tmp_path / "a.jsonl", 2)
    with pytest.raises(ConfigError, match="--labels: give them; the run's data"):
        room.predict(copy, file, tmp_path / "o.jsonl")
    room.predict(copy, file, tmp_path / "o.jsonl", names=["negative", "positive"])
    room.predict(run, file, tmp_path / "own.jsonl")
    assert read(tmp_path / "o.jsonl") == read(tmp_path / "own.jsonl")  # the default instruction lists the labels


def test_the_recipe_of_the_page_runs(command, in_process, tiny_base, tmp_path, monkeypatch) -> None:
    """The commands of docs/labelling.md word for word, with a tiny teacher in place of the named model."""
    page = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "few.jsonl", reviews(16))
    write_rows(tmp_path / "heldout.jsonl", reviews(8, seed=1))
    texts(tmp_path / "texts.jsonl", 40)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "tiny-llama.json").write_text((tiny_base / "config.json").read_text())
    for line in recipe.splitlines():
        given = shlex.split(line.replace("smollm2-135m-instruct", str(tiny_base)).replace("0.8", "0.5"))[1:]
        if given[0] == "train":
            given += ["evaluate.samples=0", "model.device=cpu", "train.pack_tokens=512"]
        if "teacher" in given and given[0] == "train":  # random weights need more to learn both labels
            given += ["adapter.kind=full", "train.epochs=8", "train.batch_size=4", "train.learning_rate=0.005"]
        code, out, err = command(*given)
        assert code == 0, f"{line}\n{err}"
    labelled = read(tmp_path / "labels.jsonl")
    assert {row["label"] for row in labelled} == {"negative", "positive"}
    assert len(labelled) == 40 and len(read(tmp_path / "student-labels.jsonl")) == 40
    assert (tmp_path / "runs" / "student" / "verify.json").is_file()
