"""Hub names, against a hub of our own on this machine: real huggingface_hub in a process of its own, real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tunesmith.data.hub import is_hub_name

SOURCE = Path(__file__).parents[2] / "src"
COMMIT, OTHER = "a" * 40, "b" * 40
MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"pickle",
    "modeling_tiny.py": b"import os",
    "consolidated.safetensors": b"twice",
    "onnx/config.json": b"{}",
    "tiny.Q4_0.gguf": b"GGUF",
    "README.md": b"# Tiny",
}
REPOS = {
    "models/org/tiny": {"main": MODEL, "v2": {"config.json": b'{"v": 2}', "model.safetensors": b"newer"}},
    "models/org/pickled": {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}},
    "models/org/private": {"main": MODEL},
    "models/org/gated": {"main": MODEL},
    "models/org/cut": {"main": MODEL},
    "models/org/broken": {"main": MODEL},
    "datasets/org/rows": {"main": {"data/train.jsonl": b'{"text": "a"}\n', "rows.py": b"import os", "a.png": b"x"}},
    "datasets/org/images": {"main": {"a.png": b"x"}},
}

CUT = {"org/cut"}  # whose weights break off in the middle


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that a snapshot needs: repository, tree, file (HEAD and GET)."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization", "")
        self.server.asked.append((self.command, path, token, self.headers.get("User-Agent", "")))
        parts = path.split("/")
        if parts[0] == "api":
            kind, repo, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if parts[0] == "datasets" else parts
            repo, rest = "/".join(parts[:2]), parts[2:]
        revisions = REPOS.get(f"{kind}/{repo}")
        if revisions is None or (repo == "org/private" and token != "Bearer secret"):
            return self.send(401, code="RepoNotFound")
        if repo == "org/broken":
            return self.send(500)
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        revision = {COMMIT: "main", OTHER: "v2"}.get(revision, revision)
        files = revisions.get(revision)
        if files is None:
            return self.send(404, code="RevisionNotFound")
        commit = COMMIT if revision == "main" else OTHER
        if verb == "revision":
            return self.send(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        if verb == "tree":
            return self.send(200, json.dumps([self.entry(name, data) for name, data in files.items()]).encode())
        if repo == "org/gated":
            return self.send(403, code="GatedRepo")
        name = "/".join(rest[2:])
        if name not in files:
            return self.send(404, code="EntryNotFound")
        etag = hashlib.sha1(files[name]).hexdigest()
        cut = repo in CUT and name == "model.safetensors"
        self.send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, cut=cut)

    @staticmethod
    def entry(name: str, data: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def send(self, status: int, body: bytes = b"", headers: dict | None = None, *, code="", cut=False) -> None:
        self.send_response(status)
        extra = {"X-Error-Code": code, "X-Error-Message": "as planted"} if code else {}
        for name, value in {**(headers or {}), **extra, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    """The running hub; `hub.asked` is the list of (verb, path, authorization, user agent) so far."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def resolve(hub, tmp_path):
    """Call resolve_model or resolve_data in a new process; give the path, or the error as `Kind: message`."""
    script = (
        "import sys\nfrom tunesmith.data import catalog\nfrom tunesmith.errors import TunesmithError\n"
        "try:\n    print(getattr(catalog, sys.argv[1])(sys.argv[2], revision=sys.argv[3] if sys.argv[3:] else None))\n"
        "except TunesmithError as error:\n    print(type(error).__name__, error, sep=': ')\n"
    )

    def call(function: str, *arguments: str, **settings: str) -> str:
        hub.asked.clear()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
        about = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        environment = {**kept, **about, "PYTHONPATH": str(SOURCE), "HF_HUB_DISABLE_XET": "1", **settings}
        environment["TUNESMITH_HOME"] = str(tmp_path / "cache")
        command = [sys.executable, "-c", script, function, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == 1, done.stdout
        return lines[0]

    return call


def names(folder: str) -> set[str]:
    """The files of a folder and of those below it."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_model_without_pickles_and_code_then_offline(resolve, hub, tmp_path):
    folder = resolve("resolve_model", "org/tiny")
    assert names(folder) == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
    }
    assert (Path(folder) / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert Path(folder).is_relative_to(tmp_path / "hf")
    assert not any(token for _, _, token, _ in hub.asked)
    assert {verb for verb, *_ in hub.asked} == {"GET", "HEAD"}
    assert resolve("resolve_model", "org/tiny", HF_HUB_OFFLINE="1") == folder
    assert hub.asked == []


def test_no_telemetry_is_sent(resolve, hub):
    resolve("resolve_model", "org/tiny")
    agents = {agent for *_, agent in hub.asked}
    assert not any("torch" in agent or "telemetry" in agent for agent in agents), agents
    assert not any("telemetry" in path for _, path, *_ in hub.asked)


def test_revision(resolve):
    folder = resolve("resolve_model", "org/tiny", "v2")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"newer"
    assert Path(folder).name == OTHER
    assert Path(resolve("resolve_model", "org/tiny", COMMIT)).name == COMMIT
    message = resolve("resolve_model", "org/tiny", "v3")
    assert message == "CatalogError: org/tiny: it has no revision 'v3'; name a branch, a tag or a commit"


def test_one_gguf_file(resolve):
    path = Path(resolve("resolve_model", "org/tiny/tiny.Q4_0.gguf"))
    assert path.read_bytes() == b"GGUF"
    assert names(path.parent) == {"tiny.Q4_0.gguf"}
    message = resolve("resolve_model", "org/tiny/gone.gguf")
    assert message.startswith("CatalogError: org/tiny/gone.gguf: org/tiny has no file gone.gguf")


def test_token(resolve, hub):
    message = resolve("resolve_model", "org/private")
    assert message.startswith("CatalogError: org/private: no such model at http://127.0.0.1:")
    assert "or it is private: set HF_TOKEN" in message
    assert "or HF_TOKEN has no access to it" in resolve("resolve_model", "org/private", HF_TOKEN="wrong")
    assert names(resolve("resolve_model", "org/private", HF_TOKEN="secret")) >= {"model.safetensors"}


def test_no_such_model(resolve):
    message = resolve("resolve_model", "org/nothing")
    assert message.startswith("CatalogError: org/nothing: no such model at http")
    assert message.endswith("check the spelling")


def test_gated(resolve):
    message = resolve("resolve_model", "org/gated", HF_TOKEN="secret")
    assert message.startswith("CatalogError: org/gated: this model is gated; accept its terms on its page, then set")


def test_only_pickles(resolve):
    message = resolve("resolve_model", "org/pickled")
    assert message.startswith("CatalogError: org/pickled: it has no .safetensors file at its top level, and pickled")


def test_offline_and_not_there(resolve, hub):
    message = resolve("resolve_model", "org/tiny", HF_HUB_OFFLINE="1")
    assert "org/tiny: not (completely) in " in message
    assert message.endswith("and HF_HUB_OFFLINE is set; unset it to download")
    assert hub.asked == []


def test_hub_cannot_be_reached(resolve):
    message = resolve("resolve_model", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError)" in message
    assert message.startswith("CatalogError: org/tiny: not in ")


def test_hub_is_down(resolve):
    message = resolve("resolve_model", "org/broken")
    assert message.startswith("CatalogError: org/broken: http://127.0.0.1:")
    assert "500" in message


def test_download_broken_off_then_whole(resolve):
    message = resolve("resolve_model", "org/cut", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert message.startswith("CatalogError: org/cut: ")
    assert "try again" in message
    offline = resolve("resolve_model", "org/cut", HF_HUB_OFFLINE="1")
    assert offline.startswith("CatalogError: org/cut: not (completely) in ")  # half a snapshot is no model
    CUT.clear()
    whole = Path(resolve("resolve_model", "org/cut"))
    assert (whole / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_name_that_no_hub_can_have(resolve, hub):
    message = resolve("resolve_model", "org/a..b")
    assert message.startswith("CatalogError: org/a..b: not a name that a hub can have: ")
    assert hub.asked == []


def test_cache_of_the_hub_cannot_be_written(resolve, tmp_path):
    (tmp_path / "file").write_text("")
    message = resolve("resolve_model", "org/tiny", HF_HOME=str(tmp_path / "file" / "hf"))
    assert message.startswith(f"DiskError: {tmp_path}/file/hf/hub: org/tiny could not be stored there")


def test_data(resolve):
    folder = resolve("resolve_data", "org/rows")
    assert names(folder) == {"data/train.jsonl"}
    message = resolve("resolve_data", "org/images")
    assert message.startswith("CatalogError: org/images: the data set has no .jsonl, .json, .csv, .parquet or")
    assert resolve("resolve_data", "org/nothing").startswith("CatalogError: org/nothing: no such data set at http")


def test_what_reads_as_a_hub_name():
    assert all(map(is_hub_name, ["org/name", "meta-llama/Llama-3.2-1B", "a/b/c.Q4_0.gguf"]))
    assert not any(map(is_hub_name, ["name", "./name", "/a/b", "a/b/c", "a/", "~/a", "a/b/c/d.gguf", "../b", "a b/c"]))
