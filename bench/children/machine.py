"""What this machine allows: matrix products at the model's shapes, memory bandwidth; and what it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.children.common import spec, synchronise, tell

ROWS, HEAD_ROWS = 2048, 128  # tokens of a pack, and targets whose logits exist at a time


def main() -> None:
    """Measure and tell."""
    wanted = spec()
    import torch

    config, device = wanted["config"], wanted["device"]
    facts: dict[str, Any] = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_bytes": memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name()
    facts["gflops"] = {dtype: products(config, dtype, device, wanted["seconds"]) for dtype in wanted["dtypes"]}
    facts["copy_gb_s"] = copy_bandwidth(device, wanted["seconds"])
    tell("machine", **facts)


def products(config: dict[str, Any], dtype: str, device: str, spend: float) -> dict[str, float]:
    """GFLOP/s of x W^T at each shape of the model, by the fastest way that torch has here."""
    import torch

    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kind = getattr(torch, dtype)
    found = {}
    for name, (rows, inner, outer) in {
        "attention": (ROWS, d, d), "up": (ROWS, d, f), "down": (ROWS, f, d), "head": (HEAD_ROWS, d, vocab),
    }.items():  # fmt: skip
        x = torch.randn(rows, inner, dtype=kind, device=device)
        weight = torch.randn(outer, inner, dtype=kind, device=device)
        best = min(seconds(way, device, spend) for way in ways(x, weight))
        found[name] = 2 * rows * inner * outer / best / 1e9
    return found


def ways(x: Any, weight: Any) -> list[Callable[[], Any]]:
    """The default path; oneDNN asked directly, which is faster in float32 on some processors; and for bfloat16 on a CPU
    the product in float32, which is faster where the processor only emulates the other.
    """
    import torch

    found: list[Callable[[], Any]] = [lambda: torch.nn.functional.linear(x, weight)]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        wide, wide_weight = x.float(), weight.float()
        found.append(lambda: torch.nn.functional.linear(wide, wide_weight))
    direct = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if x.device.type == "cpu" and direct is not None and torch.backends.mkldnn.is_available():
        found.append(lambda: direct(x, weight, None, "none", [], ""))
    return found


def copy_bandwidth(device: str, spend: float) -> float:
    """GB/s of a copy of 256 MB, what is read and what is written together."""
    import torch

    source = torch.ones(64_000_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, spend) / 1e9


def seconds(work: Callable[[], Any], device: str, spend: float) -> float:
    """The median time of the calls of `spend` seconds, after one that does not count; infinity where none runs."""
    try:
        work()
    except (RuntimeError, NotImplementedError):
        return float("inf")
    times: list[float] = []
    while not times or (sum(times) < spend and len(times) < 200):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory() -> int:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


if __name__ == "__main__":
    main()
