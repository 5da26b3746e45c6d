"""The native kernels against the torch formulas that they stand in for, and what happens where they cannot be built."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tunesmith.errors import ConfigError
from tunesmith.hardware import cpu_features
from tunesmith.model import fused, native
from tunesmith.model.attention import attend
from tunesmith.model.build import build, compiler
from tunesmith.model.layout import Layout

needs_compiler = pytest.mark.skipif(native.built()[0] is None, reason=f"NOT TESTED: {native.built()[1]}")
X86 = platform.machine().lower() in ("x86_64", "amd64")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value: a few units in the last place


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    yield
    native.select("auto")


def inputs(name: str, dtype: torch.dtype) -> list[torch.Tensor | float]:
    torch.manual_seed(0)
    wide, rows = torch.randn(37, 9, 24).to(dtype), torch.randn(37, 50).to(dtype)
    angles = torch.randn(37, 12)
    return {
        "rms_norm": [rows.requires_grad_(), torch.randn(50).to(dtype), 1e-5],
        "swiglu": [(rows * 20).requires_grad_(), torch.randn(37, 50).to(dtype).requires_grad_()],
        "rotate": [wide.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)],
    }[name]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", list(fused.PLAIN), ids=lambda f: f.__name__)
def test_a_kernel_is_its_formula(function, dtype: torch.dtype) -> None:
    arguments = inputs(function.__name__, dtype)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    assert native.kernels_for(leaves[0].detach()) is not None
    found, expected = function(*arguments), fused.PLAIN[function](*arguments)
    grad = torch.randn_like(found)
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for one, other in pairs:
        assert (one - other).abs().max() <= 4 * TOLERANCE[dtype] * other.abs().max()


@needs_compiler
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_attention_is_the_dense_formula(dtype: torch.dtype, window: int | None) -> None:
    held_against_dense(dtype, window)


@needs_compiler
@pytest.mark.parametrize("width", [8, 24, 80, 128])
def test_native_attention_of_any_head_dim(width: int) -> None:
    held_against_dense(torch.float32, None, width)


@needs_compiler
@pytest.mark.skipif(not X86, reason="NOT TESTED: no x86 processor here")
@pytest.mark.parametrize(("kind", "needed"), [("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512bw")])
def test_native_attention_with_the_vectors_of_other_processors(
    kind: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if needed not in cpu_features():
        pytest.skip(f"NOT TESTED: this processor has no {needed}")
    sources = [path for path in native.SOURCES if path.name in ("attention.cpp", "bf16.h", "exponential.h")]
    flags = [f"-march={kind}" if flag == "-march=native" else flag for flag in native.FLAGS]
    command = compiler()
    assert command is not None
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    library = ctypes.CDLL(str(build(command, sources, flags)))
    monkeypatch.setattr(native, "built", lambda: (native.Kernels(library), kind))
    for dtype in (torch.float32, torch.bfloat16):
        held_against_dense(dtype, 70, 80)


def held_against_dense(dtype: torch.dtype, window: int | None, width: int = 32) -> None:
    """Attention over a tree, and its gradients, by the kernels and by the formula in float64."""
    torch.manual_seed(1)
    layout = Layout.of([11, 600, 3, 40, 1], [-1, 0, 0, 2, -1])
    shapes = [(layout.tokens, heads, width) for heads in (6, 2, 2)]
    exact = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    own = [t.to(dtype).requires_grad_() for t in exact]
    truth = [t.detach().double().requires_grad_() for t in own]
    grad = torch.randn(shapes[0])
    found, expected = attend(*own, layout, window), attend(*truth, layout, window, backend="dense")
    pairs = [(found, expected)]
    found_grads = torch.autograd.grad(found, own, grad.to(dtype))
    pairs += zip(found_grads, torch.autograd.grad(expected, truth, grad.to(dtype).double()), strict=True)
    for one, other in pairs:
        assert (one.double() - other).norm() <= {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype] * other.norm()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.randn(5, 16)
    x[2, 3] = bad
    assert not fused.rms_norm(x, torch.ones(16), 1e-5)[2].isfinite().all()
    assert not fused.swiglu(x, torch.randn(5, 16))[2].isfinite().all()
    assert fused.swiglu(x, torch.randn(5, 16))[[0, 1, 3, 4]].isfinite().all()
    q, k = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    q[2, 0, 0] = float("nan")
    out = attend(q, k, torch.randn(5, 2, 8), Layout.single(5))
    assert out[2, 0].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


@needs_compiler
def test_the_number_of_threads_changes_nothing() -> None:
    layout, threads = Layout.of([20, 90, 70], [-1, 0, 0]), torch.get_num_threads()
    torch.manual_seed(2)
    values = [torch.randn(layout.tokens, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = attend(*values, layout)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), values)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_torch_can_be_chosen_and_is_said() -> None:
    assert native.select("torch") == ("torch", "kernels: torch, as configured")
    assert native.kernels_for(torch.randn(3, 4)) is None
    assert fused.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).allclose(torch.ones(2, 4))


def test_without_a_compiler_torch_does_the_work_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.built.cache_clear()
    try:
        used, line = native.select("auto")
        assert used == "torch" and "no C++ compiler" in line
        with pytest.raises(ConfigError, match=r"train\.kernels: native cannot be had"):
            native.select("native")
    finally:
        monkeypatch.undo()
        native.built.cache_clear()


def test_a_build_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "kernels.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(native, "SOURCES", (broken,))
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    native.built.cache_clear()
    try:
        used, line = native.select("auto")
        assert used == "torch" and ("could not be built" in line or "no C++ compiler" in line)
    finally:
        monkeypatch.undo()
        native.built.cache_clear()
