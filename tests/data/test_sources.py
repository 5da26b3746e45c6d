"""Every kind of file is read; every damaged or hostile one is a single line that names file and line."""

import gzip
import json
import random
import time

import pytest

from tunesmith.data import sources
from tunesmith.data.sources import read_rows, read_splits, split_rows
from tunesmith.errors import DataError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def fails(path, *says, **options):
    with pytest.raises(DataError) as error:
        read_rows(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message, message
    for part in says:
        assert part in message, message


@pytest.fixture
def write(tmp_path):
    def make(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return make


def summary(rows):
    return [(row.source.rsplit(":", 1)[1], row.fields["prompt"], row.fields["output"]) for row in rows]


def test_all_formats_hold_the_same_rows(write, tmp_path):
    csv = "prompt,completion\r\n" + "".join(f'p{i},"c{i}"\r\n' for i in range(4))
    files = {
        "a.jsonl": JSONL,
        "b.jsonl.gz": gzip.compress(JSONL.encode()),
        "c.json": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "d.csv": csv,
        "e.jsonl": b"\xef\xbb\xbf" + JSONL.replace("\n", "\r\n\r\n").encode(),
    }
    read = {name: summary(read_rows(write(name, data))) for name, data in files.items()}
    wanted = [(f"p{i}", f"c{i}") for i in range(4)]
    assert all([(p, c) for _, p, c in rows] == wanted for rows in read.values())
    lines = {name: [int(n) for n, _, _ in rows] for name, rows in read.items()}
    assert lines == {
        "a.jsonl": [1, 2, 3, 4], "b.jsonl.gz": [1, 2, 3, 4], "c.json": [2, 3, 4, 5], "d.csv": [2, 3, 4, 5],
        "e.jsonl": [1, 3, 5, 7],
    }  # fmt: skip
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    assert [(p, c) for _, p, c in summary(read_rows(tmp_path / "f.parquet"))] == wanted


def test_parquet_holds_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}]), tmp_path / "m.parquet")
    assert [t.text for t in read_rows(tmp_path / "m.parquet")[0].turns] == ["a", "b"]


def test_parquet_without_pyarrow_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    fails(write("a.parquet", b"PAR1"), "pip install 'tunesmith[parquet]'")


def test_text_is_parted_at_blank_lines(write):
    rows = read_rows(write("a.txt", "one\nmore\n\n \n\ntwo\r\n"))
    assert [(r.fields["text"], r.source.rsplit(":", 1)[1]) for r in rows] == [("one\nmore", "1"), ("two", "6")]
    assert rows[0].kind == "text"


def test_csv_rows_with_line_breaks_keep_their_line(write):
    good = 'prompt,completion\n"a\nb",x\nc,y\n'
    assert [n for n, _, _ in summary(read_rows(write("a.csv", good)))] == ["2", "4"]
    assert read_rows(write("a.csv", good))[0].fields["prompt"] == "a\nb"
    fails(write("b.csv", good + "only one\n"), "b.csv:5", "has 1 fields")
    fails(write("c.csv", good + '"open,x\n'), "c.csv:5", "not CSV")
    fails(write("d.csv", good + "d, \n"), "d.csv:5", "'completion' is empty")
    fails(write("e.csv", "a,a\n1,2\n"), "repeated name")


def test_limit_and_forced_schema(write):
    path = write("a.jsonl", JSONL + "broken")
    assert len(read_rows(path, limit=2)) == 2
    fails(path, "'text' is missing", "a.jsonl:1", schema="text")
    with pytest.raises(DataError, match=r"data\.limit=0"):
        read_rows(path, limit=0)


def test_classification_is_asked_with_an_instruction(write):
    data = '{"text": "good", "label": "positive"}\n{"text": "bad", "label": "negative"}\n'
    rows = read_rows(write("a.jsonl", data))
    assert rows[0].turns[0].text == "Classify the sentiment of the text as negative or positive.\n\ngood"
    assert read_rows(write("a.jsonl", data), instruction="Good?")[1].turns[0].text == "Good?\n\nbad"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", "", ["is empty"]),
        ("a.jsonl", "\n\n", ["holds no row"]),
        ("a.json", "[]", ["holds no row"]),
        ("a.json", '{"prompt": 1}', ["name it .jsonl"]),
        ("a.json", "3", ["must hold a list"]),
        ("a.json", '[{"prompt": "a", "completion": "b"}\n{}]', ["a.json:2", "needs a ','"]),
        ("a.json", '[{"prompt": "a", "completion": "b"},\n{"pro', ["a.json:2", "cut off"]),
        ("a.json", '[{"prompt": "a", "completion": "b"}', ["ends early"]),
        ("a.json", '[{"prompt": "a", "completion": "b"}] x', ["more after the list"]),
        (
            "a.json",
            '[{"prompt": "a",\n "completion": "b"},\n\n{"prompt": 4, "completion": "x"}]',
            ["a.json:4", "'prompt'"],
        ),
        ("a.jsonl", JSONL + '{"prompt": "x", "comp', ["a.jsonl:5", "cut off"]),
        ("a.jsonl", JSONL.replace('"c1"', "c1"), ["a.jsonl:2", "not JSON", "correct or remove"]),
        ("a.jsonl", JSONL + '"text"\n', ["a.jsonl:5", "must be an object"]),
        ("a.jsonl", JSONL.encode() + '{"prompt": "é"}'.encode("latin1"), ["a.jsonl:5", "not UTF-8", "0xe9", "iconv"]),
        ("a.jsonl", JSONL.encode("utf-16"), ["UTF-16", "iconv"]),
        ("a.jsonl", "[" * 1_000_000, ["a.jsonl:1"]),
        ("a.jsonl", '{"a":' * 200_000 + "1" + "}" * 200_000, ["a.jsonl:1", "nested too deeply"]),
        ("a.json", "[" + '{"a":' * 200_000, ["a.json:1", "nested too deeply"]),
        ("a.jsonl", '{"text": ' + "9" * 5_000_000 + "}", ["a.jsonl:1", "digits"]),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:-12], ["cannot be read"]),
        ("a.jsonl.gz", b"not gzip at all", ["cannot be read"]),
        ("a.parquet", b"PAR1 nonsense PAR1", ["not a readable Parquet file"]),
        ("a.jsonk", JSONL, ["unknown kind of file", "did you mean '.json"]),
        ("a", JSONL, ["unknown kind of file"]),
    ],
)
def test_bad_files(write, name, data, says):
    start = time.monotonic()
    fails(write(name, data), *says)
    assert time.monotonic() - start < 2


def test_long_lines_and_bombs_are_refused(write, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    fails(write("a.jsonl", JSONL + '{"text": "' + "a" * 1000 + '"}\n'), "a.jsonl:5", "longer than")
    monkeypatch.setattr(sources, "MAX_LINE", 100 << 20)
    start = time.monotonic()
    fails(write("a.jsonl.gz", gzip.compress(b"\n" * (40 << 20))), "1,000,000 blank lines")
    fails(write("b.jsonl.gz", gzip.compress(b" " * (80 << 20))), "grows more than 100 times")
    monkeypatch.setattr(sources, "MAX_EXPANSION", 1)
    fails(write("c.jsonl.gz", gzip.compress(JSONL.encode() * 32_000)), "grows more than 1 times")
    assert time.monotonic() - start < 10


def test_missing_files_suggest_what_is_there(write, tmp_path):
    write("reviews.jsonl", JSONL)
    fails(tmp_path / "review.jsonl", "no such file; did you mean 'reviews.jsonl'")
    fails(tmp_path / "nowhere" / "a.jsonl", "nor is there a folder")
    fails(tmp_path, "is a folder")


def test_folders(write, tmp_path):
    write("d/train.jsonl", JSONL)
    write("d/validation.json", json.dumps(ROWS[:2]))
    write("d/README.md", "x")
    splits = read_splits(tmp_path / "d")
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [4, 2, 0]
    write("d/dev.jsonl", JSONL)
    with pytest.raises(DataError, match="more than one valid file"):
        read_splits(tmp_path / "d")
    write("hub/data/train-00000-of-00002.jsonl", JSONL)
    write("hub/data/train-00001-of-00002.jsonl", JSONL)
    assert len(read_splits(tmp_path / "hub").train) == 8
    write("empty/notes.md", "x")
    with pytest.raises(DataError, match=r"no train file .* it holds notes.md"):
        read_splits(tmp_path / "empty")
    write("mixed/train.jsonl", JSONL)
    write("mixed/test.txt", "text")
    with pytest.raises(DataError, match="different schemas"):
        read_splits(tmp_path / "mixed")
    assert len(read_splits(write("one.jsonl", JSONL)).train) == 4


def test_split_rows_is_seeded_and_keeps_twins_together(write):
    rows = read_rows(write("a.jsonl", JSONL + JSONL.splitlines()[0] + "\n"))
    train, valid = split_rows(rows, 2, seed=1)
    assert (train, valid) == split_rows(rows, 2, seed=1) and len(train) == 3
    assert not {r.turns for r in train} & {r.turns for r in valid}
    with pytest.raises(DataError, match="valid_size=5"):
        split_rows(rows, 5)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_mutated_files_never_crash(write, name):
    """300 random mutations of each format: rows or one line of DataError, nothing else, and quickly."""
    good = {
        "a.jsonl": JSONL.encode(),
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": b'prompt,completion\n"a",b\nc,d\n',
        "a.jsonl.gz": gzip.compress(JSONL.encode()),
    }[name]
    rng = random.Random(0)
    start = time.monotonic()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 4)))
            data = data or bytearray(b"x")
        path = write(name, bytes(data))
        try:
            read_rows(path)
        except DataError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - start < 20
