"""What this machine has: cores, memory, what its processor and GPUs compute fast, and where the cache lies."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    *("torch", "safetensors", "tokenizers", "sentencepiece", "gguf", "huggingface_hub", "numpy", "jinja2", "pydantic"),
    *("typer", "rich", "pyyaml", "pyarrow", "wandb", "trackio", "tensorboard", "transformers", "peft"),
)
_TOLD = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "bf16")
_SETTINGS = (
    *("TUNESMITH_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("WANDB_MODE", "WANDB_PROJECT"),
)
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})  # what computes in bfloat16 on x86
_TAKEN = {"VmData": "RLIMIT_DATA", "VmSize": "RLIMIT_AS"}  # lines of /proc/self/status, and what limits them
_USER = re.compile(r"//[^/@]*@")  # user and password of an address
_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0
_AMPERE = (8, 0)  # the first CUDA capability that computes bfloat16; below it (V100, T4) PyTorch only emulates it


def cache_dir() -> Path:
    """Where downloads are kept: TUNESMITH_HOME, else XDG_CACHE_HOME/tunesmith, else ~/.cache/tunesmith."""
    if home := os.environ.get("TUNESMITH_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"


def cores() -> int:
    """How many cores this process may use: its affinity, and the quota of its control group."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups here, or the quota is "max"
        return usable


def share_cores() -> None:
    """Let threads that wait sleep soon; call it before torch is imported. OMP_WAIT_POLICY and GOMP_SPINCOUNT win.

    By default GNU OpenMP's threads wait in a busy loop, and take the core from whoever would let them go on. Sleeping
    this soon costs little on a quiet machine and gains much on a shared one (docs/decisions.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "8000")


def leave_cores() -> None:
    """Give back the threads that this thread computes with, before another thread begins to; it gets its own when it
    computes again.

    GNU OpenMP counts the teams of all threads together. Where more threads wait than there are cores it lets them sleep
    at once, and every small operation then takes some 0.2 ms longer: twice the time of a step of generation.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return  # not Linux
    for path in {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}:
        with contextlib.suppress(OSError, AttributeError):  # an older one has no such function
            ctypes.CDLL(path).omp_pause_resource_all(_PAUSE_HARD)


def memory() -> tuple[int, int]:
    """Main memory in bytes, (total, available), bounded by the control group's limit and this process's own."""
    import psutil

    found = psutil.virtual_memory()
    total, available = _of_group(found.total, found.available)
    for limit, taken in _of_process():
        total, available = min(total, limit), max(0, min(available, limit - taken))
    return total, available


def _of_group(total: int, available: int) -> tuple[int, int]:
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total, available
    return min(total, limit), max(0, min(available, limit - used))


def _of_process() -> list[tuple[int, int]]:
    """This process's limits on its memory (RLIMIT_DATA, RLIMIT_AS), each with what it has taken of it, in bytes."""
    try:
        import resource

        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        sizes = {name: int(rest.split()[0]) << 10 for name, rest in (s.split(":") for s in lines) if name in _TAKEN}
        found = [(resource.getrlimit(getattr(resource, limit))[0], sizes[name]) for name, limit in _TAKEN.items()]
        return [(limit, taken) for limit, taken in found if limit != resource.RLIM_INFINITY]
    except (ImportError, OSError, KeyError, ValueError):
        return []


@cache
def cpu_features() -> frozenset[str]:
    """The processor's instruction sets, by the names that Linux gives them (avx512_bf16, amx_bf16, ...)."""
    found = _cpu_line("flags", "Features")
    if found is not None:
        return frozenset(found.split())
    import torch

    level = torch.backends.cpu.get_cpu_capability().lower()  # no /proc (macOS, Windows): "avx2", "avx512", "default"
    return frozenset({"avx512": {"avx2", "avx512f"}, "avx2": {"avx2"}}.get(level, set()))


def recommended_dtype(device: str | torch.device = "cpu") -> str:
    """The dtype for frozen weights on `device`: "bfloat16" where the hardware computes in it, else "float32".

    float16 is never chosen: it overflows silently. So a V100 or a T4 gets float32.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= _AMPERE
        return "bfloat16" if native else "float32"
    if device.type == "cpu" and cpu_features() & _BF16:
        return "bfloat16"
    return "float32"


@cache
def narrow_products() -> bool:
    """Does torch's default library (MKL) multiply float32 matrices with half of this processor's vectors?

    It does on AMD processors with AVX-512: twice the time of oneDNN (docs/decisions.md, "Speed").
    """
    return _cpu_vendor() == "AuthenticAMD" and "avx512f" in cpu_features()


@cache
def slow_bfloat16() -> bool:
    """Does this x86 processor multiply matrices faster in float32 than in bfloat16?

    Most only emulate bfloat16, and take 6 to 60 times as long in it. In Intel's that were made for AMX, AVX-512's own
    bfloat16 is slower than float32, and all that is left where AMX is hidden, as in many virtual machines
    (docs/decisions.md).
    """
    features = cpu_features()
    if not features & _BF16:
        return "avx2" in features
    return _cpu_vendor() == "GenuineIntel" and "avx512_fp16" in features and "amx_bf16" not in features


def gpus() -> list[dict[str, Any]]:
    """One entry for each GPU that torch can use: name, memory in bytes, compute capability, recommended dtype."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "memory_bytes": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
                "recommended_dtype": recommended_dtype(f"cuda:{index}"),
            }
        )
    return found


def describe() -> dict[str, Any]:
    """What a bug report needs; plain values that print as JSON. Tokens and passwords are not in it."""
    import torch

    from tunesmith import __version__

    total, available = memory()
    return {
        "tunesmith": __version__,
        "revision": _revision(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": _versions(),
        "cpu": {
            "model": _cpu_model(),
            "cores": cores(),
            "features": sorted(cpu_features().intersection(_TOLD)),
            "torch_threads": torch.get_num_threads(),
            "recommended_dtype": recommended_dtype("cpu"),
            "float32_products": "oneDNN" if narrow_products() else "torch's default library",
            "bfloat16_products": "in float32" if slow_bfloat16() else "torch's default library",
        },
        "memory": {"total_bytes": total, "available_bytes": available},
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus(),
        "cache": str(cache_dir()),
        "settings": {name: _USER.sub("//", os.environ[name]) for name in _SETTINGS if name in os.environ},
        "hf_token": "set" if os.environ.get("HF_TOKEN") else "not set",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_vendor() -> str:
    return _cpu_line("vendor_id") or platform.processor().rpartition(", ")[2]  # Windows: "..., AuthenticAMD"


def _cpu_line(*names: str) -> str | None:
    """What Linux says of the first processor under one of these names."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    except OSError:
        pass
    return None


def _revision() -> str | None:
    """The commit of a source checkout, with "+" where tracked files were changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
