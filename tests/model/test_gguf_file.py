"""The GGUF reader equals the gguf library's on whole files, and refuses every broken one quickly and in one line."""

from __future__ import annotations

import importlib.util
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest

from tunesmith.errors import ModelError
from tunesmith.model.gguf_file import QUANT_TYPES, GgufFile
from tunesmith.model.load import load_model

_spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("checkpoints.py"))
checkpoints: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checkpoints)

EXTRA = {
    "general.name": "größe",
    "general.languages": ["en", "de"],
    "x.flag": True,
    "x.numbers": [1, 2, 3],
    "x.halves": [0.5, 0.25],
    "x.small": 1.5,
    "x.big": -(1 << 30),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    checkpoints.write_gguf(path, checkpoints.reference("llama-tied"), "Q8_0", EXTRA)
    return path.read_bytes()


def test_reads_what_the_gguf_library_reads(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    theirs = gguf.GGUFReader(path)
    with GgufFile(path) as ours:
        assert {k: ours.metadata[k] for k in ours.metadata} == {
            k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")
        }
        assert len(ours.metadata) > len(EXTRA) and ours.metadata.count("x.numbers") == 3
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.start, mine.size) == (tensor.data_offset, tensor.n_bytes)
            assert mine.shape == tuple(reversed(tensor.shape.tolist()))
            assert mine.quant_name == tensor.tensor_type.name
            assert ours.raw(mine).tobytes() == tensor.data.tobytes()


def test_a_file_that_was_changed_in_its_place_is_read_again(whole: bytes, tmp_path: Path) -> None:
    """The index of the file opened last is remembered, and believed for the same bytes alone."""
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    with GgufFile(path) as first, GgufFile(path) as again:
        assert again.tensors is first.tensors and again.metadata["x.numbers"] == [1, 2, 3]
    path.write_bytes(whole.replace("größe".encode(), "Größe".encode()))  # as long as before
    with GgufFile(path) as changed:
        assert changed.metadata["general.name"] == "Größe"
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="runs past the end"):
        GgufFile(path)


def test_block_sizes_are_the_gguf_librarys() -> None:
    for number, (name, block, width) in QUANT_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (number, (block, width))


def _refused(data: bytes, path: Path) -> str:
    """The one line that refuses these bytes; empty where they load."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        load_model(path)
        message = ""
    except ModelError as error:
        message = str(error)
    assert "\n" not in message and len(message) < 3000 + len(str(path)) * 2
    assert time.perf_counter() - start < 2
    return message


def test_truncated_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    for cut in [0, 1, 3, 4, 8, 23, 24, 25, len(whole) - 1, *rng.sample(range(len(whole)), 60)]:
        assert _refused(whole[:cut], tmp_path / "cut.gguf"), cut


def test_mutated_files_load_or_are_refused_in_one_line(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(1)
    header = 4000  # metadata and tensor index; mutations of the data itself only change weights
    tracemalloc.start()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(header)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + 8] = struct.pack(
                    "<Q", rng.choice([0, 1, 1 << 31, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
                )
            elif kind == 2:
                del data[at : at + rng.randrange(40)]
            else:
                data[at] = rng.randrange(256)
        _refused(bytes(data), tmp_path / "mutant.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(whole) + (64 << 20)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(40), "tensors in"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(40), "metadata keys in"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IIQ", 9, 0, 1 << 60),
            "numbers of an array",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IIQ", 9, 8, 1 << 60),
            "strings of an array",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(9),
            "array of type 9",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IQ", 8, 1 << 50), "a string of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<II", 99, 0), "unknown value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (_string("a") + struct.pack("<IQ", 10, 0)), "twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(8), "architecture 'None'"),
    ],
)
def test_crafted_headers(data: bytes, message: str, tmp_path: Path) -> None:
    assert message in _refused(data, tmp_path / "crafted.gguf")


def _with_tensor(dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    entry = _string("t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(256)


@pytest.mark.parametrize(
    ("dims", "kind", "offset", "message"),
    [
        ((1 << 40, 1 << 40), 0, 0, "past the end"),
        ((8,), 0, 1 << 50, "past the end"),
        ((8,), 0, 7, "past the end"),
        ((0,), 0, 0, "cannot be stored"),
        ((33,), 2, 0, "cannot be stored as Q4_0"),
        ((32,), 16, 0, "ggml type 16; supported: F32"),
        ((1, 1, 1, 1, 1), 0, 0, "5 dimensions"),
        ((), 0, 0, "0 dimensions"),
    ],
)
def test_crafted_tensors(dims: tuple[int, ...], kind: int, offset: int, message: str, tmp_path: Path) -> None:
    assert message in _refused(_with_tensor(dims, kind, offset), tmp_path / "crafted.gguf")


def test_split_files_and_other_architectures_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    checkpoints.write_gguf(path, checkpoints.reference("llama"), extra={"split.count": 3})
    with pytest.raises(ModelError, match="one of 3 parts.*llama-gguf-split"):
        load_model(path)
    checkpoints.write_gguf(path, checkpoints.reference("llama"), extra={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match="rope scaling 'yarn'"):
        load_model(path)
    checkpoints.write_gguf(path, checkpoints.reference("llama"), extra={"llama.expert_count": 8})
    with pytest.raises(ModelError, match="expert_count=8"):
        load_model(path)


@pytest.mark.smollm2
def test_smollm2_vocabulary_is_the_gguf_librarys(smollm2_gguf: Path) -> None:
    theirs = gguf.GGUFReader(smollm2_gguf)
    with GgufFile(smollm2_gguf) as ours:
        for key in ("tokens", "token_type", "merges"):
            name = f"tokenizer.ggml.{key}"
            assert ours.metadata[name] == theirs.fields[name].contents()
