"""One law for every backend: values and gradients of `dense`, over trees, windows, groups of heads and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.model import attention as attention_module
from tunesmith.model.attention import BACKENDS, attend, attend_cached
from tunesmith.model.layout import Cut, Layout

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device here")
)
DEVICES = ["cpu", CUDA]
SHAPES = {  # lengths, parents, window
    "single": ([17], [-1], None),
    "many": ([5, 1, 12, 3, 3], [-1] * 5, None),
    "tree": ([7, 11, 5, 9, 2, 4], [-1, 0, 0, 2, -1, 4], None),
    "window": ([7, 11, 5, 9, 2, 4], [-1, 0, 0, 2, -1, 4], 6),
    "window of one": ([4, 3], [-1, 0], 1),
    "empty segment": ([0, 6, 0, 3], [-1, 0, -1, 2], None),
}


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16), (tokens, heads, 16)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(device, dtype) for s in shapes]


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, layout: Layout, window: int | None):
    """The output, and gradients of q, k, v where `grad` is given."""
    leaves = [t.clone().requires_grad_(grad is not None) for t in (q, k, v)]
    out = attend(*leaves, layout, window, backend=backend)
    return [out.detach(), *([] if grad is None else torch.autograd.grad(out, leaves, grad))]


def law(backend: str, device: str, shape: str, heads: int, kv_heads: int, dtype: torch.dtype, limit: float) -> None:
    """`backend` is the plain formula to `limit`, relative to the largest value."""
    lengths, parents, window = SHAPES[shape]
    layout = Layout.of(lengths, parents, device)
    q, k, v, grad = inputs(layout.tokens, heads, kv_heads, dtype, device)
    given = None if backend == "flex" and device == "cpu" else grad  # FlexAttention has no backward on a CPU
    found = run(backend, q, k, v, given, layout, window)
    wide = [t.double() for t in (q, k, v, grad)]
    expected = run("dense", *wide, layout, window)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=False):
        off = (a.double() - b).abs().max() / max(b.abs().max(), 1)  # with a window of one, dq and dk are 0
        assert off < limit, f"{name} is off by {off:.1e}"


LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CASES = [
    (backend, heads, kv_heads, dtype)
    for backend in BACKENDS
    for heads, kv_heads in ([(6, 2)] if backend == "flex" else [(4, 4), (6, 2), (3, 1)])
    for dtype in LIMITS
    if not (backend == "flex" and dtype == torch.float64)  # its kernels have float32 at most
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "heads", "kv_heads", "dtype"), CASES, ids=lambda value: str(value))
def test_backend_is_the_formula(backend: str, heads: int, kv_heads: int, dtype: torch.dtype, shape: str) -> None:
    law(backend, "cpu", shape, heads, kv_heads, dtype, LIMITS[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device here")
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_formula_on_cuda(backend: str) -> None:
    for _, heads, kv_heads, dtype in [case for case in CASES if case[0] == backend]:
        exact = LIMITS[dtype] if dtype != torch.float32 else 1e-5
        limit = 5e-3 if (backend, dtype) == ("flex", torch.float32) else exact  # Triton multiplies float32 in TF32
        for shape in SHAPES:
            law(backend, "cuda", shape, heads, kv_heads, dtype, limit)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_a_long_segment(device: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BATCHED", "NATIVE"):
            patch.setattr(attention_module, name, Cut(4, 64, 1.5))
        for shape in SHAPES:
            law("tiled", device, shape, 6, 2, torch.float64, 1e-13)
            law("tiled", device, shape, 6, 2, torch.float32, LIMITS[torch.float32])


def test_dense_is_torch() -> None:
    q, k, v, _ = inputs(9, 6, 2, torch.float64, "cpu")
    theirs = functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert torch.allclose(attend(q, k, v, Layout.single(9), backend="dense"), theirs[0].transpose(0, 1), atol=1e-14)


def test_gradient_passes_gradcheck() -> None:
    layout = Layout.of([2, 3, 2], [-1, 0, 0])
    q, k, v, _ = (t[..., :4].contiguous().requires_grad_(True) for t in inputs(7, 4, 2, torch.float64, "cpu"))
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, layout), (q, k, v))


def test_operators_pass_torchs_own_checks() -> None:
    from tunesmith.model.attention import tiled_attention, tiled_attention_backward

    q, k, v, grad = inputs(7, 4, 2, torch.float32, "cpu")
    tiles = list(Layout.of([4, 3], [-1, 0]).tiles())
    out, sums = tiled_attention(q, k, v, tiles)
    checks = ("test_schema", "test_faketensor")
    for more in ((), (True,), (False, 0.5, torch.tensor(3))):
        torch.library.opcheck(tiled_attention, (q, k, v, tiles, *more), test_utils=checks)
        given = (grad, q, k, v, out, sums, tiles, *more[1:])
        torch.library.opcheck(tiled_attention_backward, given, test_utils=checks)


def test_huge_scores_do_not_overflow() -> None:
    q, k, v, _ = inputs(6, 2, 2, torch.float32, "cpu")
    out = attend(q * 1e4, k * 1e4, v, Layout.of([3, 3], [-1, 0]))
    assert out.isfinite().all()


def test_a_step_against_the_cache_is_the_last_row() -> None:
    q, k, v, _ = inputs(9, 6, 2, torch.float64, "cpu")
    full = attend(q, k, v, Layout.single(9), backend="dense")
    stored = [torch.cat([t, torch.full_like(t[:2], 7.0)]).transpose(0, 1)[None] for t in (k, v)]
    hidden = torch.arange(11)[None] >= 9
    assert torch.allclose(attend_cached(q[-1:], *stored, hidden)[0], full[-1], atol=1e-14)
    assert torch.allclose(attend_cached(q[-1:], *(t[:, :, :9] for t in stored), None)[0], full[-1], atol=1e-14)
    windowed = attend(q, k, v, Layout.single(9), 4, backend="dense")
    assert torch.allclose(attend_cached(q[-1:], *stored, hidden | (torch.arange(11)[None] < 5))[0], windowed[-1])
