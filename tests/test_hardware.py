"""What is told about a machine, and the dtype that is recommended for it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith import hardware


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "bfloat16"),
        ({"avx2", "amx_bf16", "amx_tile"}, "bfloat16"),
        ({"avx2", "avx512f", "avx512_fp16", "amx_int8"}, "float32"),
        ({"neon", "bf16"}, "float32"),
        (set(), "float32"),
    ],
)
def test_dtype_of_a_cpu(features, expected, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    assert hardware.recommended_dtype() == hardware.recommended_dtype(torch.device("cpu")) == expected


@pytest.fixture
def processor(vendor, features, monkeypatch):
    """Linux on a processor of `vendor` with `features`; what was found of this one is forgotten before and after."""
    lines = {"vendor_id": vendor, "flags": " ".join(features)}
    monkeypatch.setattr(hardware, "_cpu_line", lambda *names: next((lines[n] for n in names if n in lines), None))
    monkeypatch.setattr(hardware.platform, "processor", lambda: "arm")
    found = (hardware.cpu_features, hardware.narrow_products, hardware.slow_bfloat16)
    for each in found:
        each.cache_clear()
    yield
    for each in found:
        each.cache_clear()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    ("vendor", "features", "expected"),
    [
        ("AuthenticAMD", {"avx2", "avx512f"}, True),
        ("AuthenticAMD", {"avx2"}, False),
        ("GenuineIntel", {"avx2", "avx512f"}, False),
        (None, {"neon"}, False),
    ],
)
def test_where_the_default_library_uses_half_of_the_vectors(vendor, features, expected):
    assert hardware.narrow_products() is expected
    assert hardware.describe()["cpu"]["float32_products"] == ("oneDNN" if expected else "torch's default library")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    ("vendor", "features", "slow"),
    [
        ("AuthenticAMD", {"avx2"}, True),  # emulated
        ("GenuineIntel", {"avx2", "avx512f"}, True),
        ("AuthenticAMD", {"avx2", "avx512f", "avx512_bf16"}, False),
        ("GenuineIntel", {"avx2", "avx512_bf16"}, False),
        ("GenuineIntel", {"avx2", "avx512_bf16", "avx512_fp16", "amx_bf16"}, False),
        ("GenuineIntel", {"avx2", "avx512_bf16", "avx512_fp16"}, True),  # AMX is hidden
        ("AuthenticAMD", {"avx2", "avx512_bf16", "avx512_fp16"}, False),
        (None, {"neon"}, False),
    ],
)
def test_where_bfloat16_is_slower_than_float32(vendor, features, slow):
    assert hardware.slow_bfloat16() is slow
    told = "in float32" if slow else "torch's default library"
    assert hardware.describe()["cpu"]["bfloat16_products"] == told


def test_a_windows_processor_names_its_vendor(monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_line", lambda *names: None)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert hardware._cpu_vendor() == "AuthenticAMD"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_dtype_of_a_gpu_is_never_float16(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.recommended_dtype("cuda:0") == expected


def test_other_devices_compute_in_float32():
    assert hardware.recommended_dtype("mps") == hardware.recommended_dtype("meta") == "float32"


def test_cpu_features_are_the_kernels(monkeypatch):
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            assert hardware.cpu_features() == frozenset(line.split(":")[1].split())
            return
    pytest.skip("this system has no /proc/cpuinfo with flags")


def test_cores_and_memory_are_plausible():
    assert 1 <= hardware.cores() <= (os.cpu_count() or 1)
    total, available = hardware.memory()
    assert 2**28 < available <= total < 2**50


def test_control_group_bounds_cores_and_memory(monkeypatch):
    read = Path.read_text
    limits = {"cpu.max": "150000 100000\n", "memory.max": f"{2**30}\n", "memory.current": f"{2**28}\n"}

    def limited(self, *arguments, **options):
        return limits.get(self.name) or read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", limited)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert hardware.cores() == 2
    assert hardware.memory() == (2**30, 2**30 - 2**28)
    limits |= {"cpu.max": "max 100000\n", "memory.max": "max\n"}
    assert hardware.cores() == 8
    assert hardware.memory()[0] > 2**30


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hardware.cache_dir() == tmp_path / ".cache" / "tunesmith"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hardware.cache_dir() == tmp_path / "xdg" / "tunesmith"
    monkeypatch.setenv("TUNESMITH_HOME", "~/mine")
    assert hardware.cache_dir() == tmp_path / "mine"


def test_describe_is_json_and_tells_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter2@mirror.test/hf")
    told = hardware.describe()
    text = json.dumps(told)
    assert "verysecret" not in text
    assert "hunter2" not in text
    assert told["settings"]["HF_ENDPOINT"] == "http://mirror.test/hf"
    assert told["hf_token"] == "set"
    assert told["tunesmith"] == tunesmith.__version__
    assert told["packages"]["torch"] == importlib.metadata.version("torch")
    assert {"safetensors", "tokenizers", "gguf", "huggingface_hub", "pydantic"} <= told["packages"].keys()
    assert told["cpu"]["recommended_dtype"] == hardware.recommended_dtype()
    assert len(told["gpus"]) == torch.cuda.device_count()


def test_revision_is_the_checkouts(tmp_path, monkeypatch):
    assert hardware.describe()["revision"] is None or len(hardware.describe()["revision"].rstrip("+")) == 12
    fake = tmp_path / "src" / "tunesmith" / "hardware.py"
    monkeypatch.setattr(hardware, "__file__", str(fake))
    assert hardware._revision() is None
    (tmp_path / ".git").mkdir()  # a folder that git does not know
    assert hardware._revision() is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "8000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    hardware.share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="not Linux")
def test_a_thread_gives_back_what_it_computes_with() -> None:
    """In a process of its own, where two threads may be had: they come with work, go, and come again."""
    code = """
import os, torch
from tunesmith.hardware import leave_cores
count = lambda: len(os.listdir("/proc/self/task"))
work = lambda: float(torch.ones(1 << 20).sum())
work()
busy = count()
leave_cores()
rested = count()
assert work() == 1 << 20
print(busy - rested, count() - rested)
"""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(tunesmith.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"
