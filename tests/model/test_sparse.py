"""Sparse attention is its definition, sees no future, skips what is hidden, and trains the same in packs as padded."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.laws import Case
from tests.laws.small import TINY, build, disturb, logits_of, relative, sample_row
from tests.model.test_cache import Talk, draw
from torch import Tensor

from tunesmith.adapters import find_method
from tunesmith.config import AttentionSettings
from tunesmith.errors import ModelError
from tunesmith.model.attention import attend
from tunesmith.model.layout import Layout, Tile
from tunesmith.model.llama import Llama
from tunesmith.model.native import select
from tunesmith.model.sparse import Pattern, Window, count_pairs, count_products, pattern_of

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
PATTERNS = {
    "local": {"window": 5},
    "strided": {"stride": 4},
    "strided and window": {"stride": 4, "window": 9},
    "strided, short window": {"stride": 4, "window": 3},
    "fixed": {"block": 6, "columns": 2},
    "factorized": {"stride": 5, "window": 3},
    "s2": {"group": 8},
}


def pattern(name: str, kv_heads: int = 2) -> Pattern:
    """A pattern of the table."""
    made = pattern_of(AttentionSettings(pattern=name.split()[0].rstrip(","), **PATTERNS[name]), kv_heads)
    assert made is not None
    return made


def truth(name: str, n: int, second: bool, **changes: int) -> np.ndarray:
    """Who sees whom, (n, n), by the words of the papers: for heads of the first half, or of the second."""
    s = {**PATTERNS[name], **changes}
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    back = i - j
    seen = {
        "local": lambda: back < s["window"],
        "strided": lambda: (back % s["stride"] == 0) | (back < s.get("window", 0)),
        "fixed": lambda: (i // s["block"] == j // s["block"]) | (j % s["block"] >= s["block"] - s["columns"]),
        "factorized": lambda: back % s["stride"] == 0 if second else back < s["window"],
        "s2": lambda: np.isin(back, range(n)) & (_group(i, s["group"], second) == _group(j, s["group"], second)),
    }[name.split()[0].rstrip(",")]()
    return seen & (back >= 0)


def _group(position: np.ndarray, size: int, shifted: bool) -> np.ndarray:
    """The number of the group: those of the shifted half are [0, size / 2), [size / 2, 3 size / 2), ..."""
    borders = np.arange(size // 2 if shifted else size, position.max() + size + 1, size)
    return np.searchsorted(borders, position, side="right")


# Pairs of a sequence of 1024, by pattern: published sizes of the sets, recomputed by hand; full attention has 524,800.
COUNTS = [
    ({"pattern": "local", "window": 32}, [32_272]),
    ({"pattern": "strided", "stride": 32}, [16_896]),
    ({"pattern": "strided", "stride": 32, "window": 32}, [48_144]),
    ({"pattern": "fixed", "block": 32, "columns": 1}, [32_768]),
    ({"pattern": "fixed", "block": 32}, [32_768]),
    ({"pattern": "fixed", "block": 32, "columns": 8}, [143_872]),
    ({"pattern": "factorized", "stride": 32}, [32_272, 16_896]),
    ({"pattern": "s2", "group": 256}, [131_584, 115_200]),
]


@pytest.mark.parametrize(("settings", "expected"), COUNTS, ids=lambda v: str(v))
def test_pairs_of_1024_tokens(settings: dict[str, object], expected: list[int]) -> None:
    assert pattern_of(AttentionSettings(**settings)).pairs(1024) == expected
    assert count_pairs(Layout.single(1024).tiles()) == 524_800


def test_columns_of_fixed() -> None:
    position = torch.arange(1024)
    i, j = position[:, None], position[None]
    for columns, expected in ((1, 15_904), (8, 128_128)):
        assert int(((j % 32 >= 32 - columns) & (j <= i)).sum()) == expected  # the paper's set, own block included
    own = pattern_of(AttentionSettings(pattern="fixed", block=32)).fields[0].rules[0]
    assert count_pairs(Layout.single(1024).tiles(None, own)) == 16_896
    assert count_pairs(Layout.single(1024).tiles(None, Window(33))) == 33_264  # Child's own local set has a key more


def seen_by_tiles(made: Pattern, layout: Layout, window: int | None, half: int) -> np.ndarray:
    """How often each pair occurs in the tiles, (tokens, tokens)."""
    found = np.zeros((layout.tokens, layout.tokens), int)
    for rule in made.fields[half % len(made.fields)].rules:
        tiles = layout.tiles(window, rule)
        for queries, keys, visible in zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True):
            for query, key, (low, high) in (
                (q, k, v) for qs, k, vs in zip(queries, keys, visible, strict=True) for q, v in zip(qs, vs, strict=True)
            ):
                if query >= 0:
                    found[query, key[low:high]] += 1
    return found


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("window", [None, 7])
def test_tiles_hold_each_visible_pair_once(name: str, window: int | None) -> None:
    layout = Layout.of([7, 11, 5, 40, 2, 9], [-1, 0, 0, 2, -1, 4])
    for half in (0, 1):
        found = seen_by_tiles(pattern(name), layout, window, half)
        expected = np.zeros_like(found)
        for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            rows = layout.rows_of(segment)
            alone = truth(name, len(rows), second=half == 1)
            if window is not None:  # Mistral's own window hides what is farther
                alone &= np.subtract.outer(np.arange(len(rows)), np.arange(len(rows))) < window
            expected[np.ix_(np.arange(start, start + length), rows)] = alone[len(rows) - length :]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["tiled", "dense", "flex"])
def test_probabilities_are_there_where_the_definition_says(name: str, backend: str) -> None:
    n, heads, kv_heads = 24, 6, 3
    q, k = (torch.randn(n, h, n, generator=torch.Generator().manual_seed(h)) for h in (heads, kv_heads))
    v = torch.eye(n)[:, None].expand(n, kv_heads, n).contiguous()  # so that the output is the probabilities
    out = attend(q, k, v, Layout.single(n), None, pattern(name, kv_heads), backend=backend)
    for head in range(heads):
        second = head // 2 >= 2  # of three KV heads, the first half are two
        assert np.array_equal(out[:, head].numpy() > 0, truth(name, n, second)), f"head {head}"
    assert torch.allclose(out.sum(-1), torch.ones(n, heads), atol=1e-5)


SHAPES = {  # lengths, parents, window
    "single": ([33], [-1], None),
    "tree": ([7, 11, 5, 29, 2, 4], [-1, 0, 0, 2, -1, 4], None),
    "window": ([7, 11, 5, 29, 2, 4], [-1, 0, 0, 2, -1, 4], 6),
    "empty segment": ([0, 6, 0, 3], [-1, 0, -1, 2], None),
    "long": ([40, 300, 20], [-1, 0, 0], None),
    "nothing": ([0], [-1], None),
}
KERNELS = [pytest.param("native", marks=pytest.mark.skipif(not COMPILER, reason="NOT TESTED: no compiler")), "torch"]


@pytest.fixture
def kernels():
    """Choose the kernels of a test; what was there comes back."""
    yield select
    select("auto")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formula(kernels, name: str, which: str, dtype, limit: float) -> None:
    kernels(which)
    for lengths, parents, window in SHAPES.values():
        layout = Layout.of(lengths, parents)
        for heads, kv_heads in ((4, 4), (6, 2), (9, 3)):
            rng = torch.Generator().manual_seed(layout.tokens)
            shapes = (heads, kv_heads, kv_heads, heads)
            q, k, v, grad = (
                torch.randn(layout.tokens, h, 16, generator=rng, dtype=torch.float64).to(dtype) for h in shapes
            )
            made = pattern(name, kv_heads)

            def run(backend: str, *given: Tensor, where=(layout, window, made)) -> list[Tensor]:
                leaves = [t.clone().requires_grad_() for t in given[:3]]
                out = attend(*leaves, *where, backend=backend)
                return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]

            expected = run("dense", *(t.double() for t in (q, k, v, grad)))
            for what, a, b in zip(("out", "dq", "dk", "dv"), run("tiled", q, k, v, grad), expected, strict=True):
                assert a.shape == b.shape
                off = max((a.double() - b).abs().flatten().tolist(), default=0) / max([1, *b.abs().flatten().tolist()])
                assert off < limit, f"{what} is off by {off:.1e} ({heads} heads, {kv_heads} KV heads, {lengths})"


@pytest.mark.parametrize("name", ["strided and window", "fixed", "s2"])
def test_gradient_passes_gradcheck(name: str) -> None:
    layout, made = Layout.of([4, 7, 3], [-1, 0, 0]), pattern(name)
    rng = torch.Generator().manual_seed(1)
    given = [torch.randn(14, h, 3, generator=rng, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, layout, None, made), given)


def sees_no_future(model: Llama, tokens: Tensor, layout: Layout) -> None:
    """Changing a token changes no logit of a token before it, nor of another example."""
    before = logits_of(model, tokens, layout)
    mask = layout.mask()
    for place in range(layout.tokens):
        other = tokens.clone()
        other[place] = (other[place] + 1) % model.config.vocab_size
        moved = (logits_of(model, other, layout) != before).any(-1)
        assert not (moved & ~mask[:, place]).any(), f"token {place} is seen by one that must not see it"
        assert moved[place]


@pytest.mark.parametrize("name", PATTERNS)
def test_no_future_is_seen(name: str) -> None:
    model = build(dtype=torch.float32).train()  # s2 acts in training only
    model.pattern = pattern(name)
    tokens, layout = sample_row()
    sees_no_future(model, tokens, layout)
    sees_no_future(model, draw(27, 1), Layout.single(27))


@dataclass(frozen=True)
class Rolled:
    """S2 as it is widely copied: the sequence is rolled by half a group, and its ends share one."""

    group: int

    @property
    def rules(self) -> tuple[Rolled, ...]:
        return (self,)

    def tiles(self, rows: np.ndarray, before: int, window: int | None):
        """Causal tiles of the rolled sequence."""
        rolled = np.roll(rows, -(self.group // 2))
        for start in range(0, len(rows), self.group):
            block = rolled[start : start + self.group]
            ends = np.arange(1, len(block) + 1)
            yield Tile(block, block, np.stack([0 * ends, ends], axis=1))


def test_a_leak_of_the_future_is_caught() -> None:
    model = build(dtype=torch.float32)
    model.pattern = Pattern("rolled", (pattern("s2").fields[0], Rolled(8)))
    with pytest.raises(AssertionError, match="must not see it"):
        sees_no_future(model, draw(24, 1), Layout.single(24))
    found = seen_by_tiles(model.pattern, Layout.single(24), None, 1)
    assert np.triu(found, 1).sum() == 8 * 8 // 4  # pairs that look ahead, as many as are told of it


@pytest.mark.parametrize("length", [512, 2048, 8192])
@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "local", "window": 128},
        {"pattern": "strided", "stride": 64, "window": 64},
        {"pattern": "fixed", "block": 128, "columns": 8},
        {"pattern": "factorized", "stride": 64},
        {"pattern": "s2", "group": 128},
    ],
    ids=lambda s: s["pattern"],
)
def test_hidden_pairs_are_not_computed(settings: dict[str, object], length: int) -> None:
    layout, made = Layout.single(length), pattern_of(AttentionSettings(**settings))
    computed = [sum(count_products(layout.tiles(None, rule)) for rule in part.rules) for part in made.fields]
    for products, pairs in zip(computed, made.pairs(length), strict=True):
        assert products <= 3 * pairs  # a tile is a rectangle around a triangle
    if length == 8192:
        assert max(computed) < count_products(layout.tiles()) / 5


def kept_bytes(length: int, made: Pattern | None) -> int:
    """What the forward keeps for the backward, beside q, k, v, the output and what is cut once for all layers."""
    layout, found = Layout.single(length), {}
    q, k, v = (torch.randn(length, h, 8, requires_grad=True) for h in (6, 2, 2))
    if made is not None:
        made.prepare(layout, {None})

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, layout, None, made)
    return sum(found.values())


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_kept_grows_with_the_tokens_only(kernels, name: str, which: str) -> None:
    kernels(which)
    short, long = kept_bytes(256, pattern(name)), kept_bytes(1024, pattern(name))
    assert long <= 4 * short and short <= 256 * 4 * (2 * 6 * 8 + 2 * 2 * 8 + 3 * 6)


CASES = {
    "lora": Case(find_method("lora"), {"rank": 4}),
    "full": Case(find_method("full")),
    "prompt": Case(find_method("prompt"), {"virtual_tokens": 4}),
}


@pytest.fixture
def with_pattern(monkeypatch: pytest.MonkeyPatch):
    """Let the laws build their models with a pattern."""

    def choose(made: Pattern) -> None:
        def sparse(*args: object, **more: object) -> Llama:
            model = build(*args, **more)
            model.pattern = made
            return model

        monkeypatch.setattr(laws, "build", sparse)

    return choose


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", CASES)
def test_packed_is_padded(with_pattern, name: str, method: str) -> None:
    with_pattern(pattern(name))
    laws.packed_is_padded(CASES[method])


@pytest.mark.parametrize("name", PATTERNS)
def test_other_laws_hold(with_pattern, name: str) -> None:
    with_pattern(pattern(name))
    for law in (laws.examples_stand_alone, laws.split_does_not_matter, laws.recompute_changes_nothing):
        law(CASES["lora"])


@pytest.mark.parametrize("name", ["local", "strided and window", "s2"])
def test_compiled_is_eager(with_pattern, name: str) -> None:
    with_pattern(pattern(name))
    laws.compiled_is_eager(CASES["lora"])


@dataclass(frozen=True)
class FromSegment(Window):
    """A window that forgets what stands before the segment, which padding does not have."""

    @property
    def rules(self) -> tuple[FromSegment, ...]:
        return (self,)

    def tiles(self, rows: np.ndarray, before: int, window: int | None):
        return super().tiles(rows[before:], 0, window)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return i - j < self.size


def test_a_pattern_that_counts_from_the_segment_is_caught(with_pattern) -> None:
    with_pattern(Pattern("from segment", (FromSegment(5),)))
    for law in (laws.packed_is_padded, laws.examples_stand_alone):
        with pytest.raises(AssertionError):
            law(CASES["lora"])


@pytest.mark.parametrize("name", ["strided and window", "s2"])
def test_recomputation_changes_nothing(name: str) -> None:
    for dropout in (0.0, 0.3):
        results = []
        for recompute in (False, True):
            model = build().train()
            model.pattern = pattern(name)
            adapter = CASES["lora"].attach(model)
            disturb(adapter)
            tokens, layout = sample_row()
            torch.manual_seed(3)
            ctx = model.context(layout, dropout=dropout)
            model.run(tokens, ctx, recompute).square().sum().backward()
            results.append(torch.cat([p.grad.flatten() for p in adapter.trainable.values()]))
        assert relative(*results) < 1e-12


@pytest.mark.parametrize("name", [None, "strided and window", "s2"])
def test_dropout_has_the_gradient_of_what_it_computed(name: str | None) -> None:
    layout, made = Layout.of([4, 9, 3], [-1, 0, 0]), name and pattern(name)
    rng = torch.Generator().manual_seed(1)
    given = [torch.randn(16, h, 3, generator=rng, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]

    def run(*qkv: Tensor) -> Tensor:
        torch.manual_seed(11)
        return attend(*qkv, layout, None, made, dropout=0.4)

    assert torch.autograd.gradcheck(run, given)
    assert not torch.equal(run(*given), attend(*given, layout, None, made, dropout=0.4))  # another draw


def test_dropout_sets_a_share_to_zero_and_scales_the_rest() -> None:
    n = 64
    q, k = (torch.randn(n, h, n, generator=torch.Generator().manual_seed(h)) for h in (4, 2))
    v = torch.eye(n)[:, None].expand(n, 2, n).contiguous()  # so that the output is the probabilities
    made = pattern("strided and window")
    whole = attend(q, k, v, Layout.single(n), None, made)
    torch.manual_seed(0)
    left = attend(q, k, v, Layout.single(n), None, made, dropout=0.25)
    kept = left[whole > 0] > 0
    assert torch.allclose(left[left > 0], (whole / 0.75)[left > 0], rtol=1e-5)
    assert abs(kept.double().mean() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    with pytest.raises(ModelError, match="no dropout"):
        attend(q, k, v, Layout.single(n), backend="flex", dropout=0.5)


@pytest.mark.parametrize("config", [TINY, replace(TINY, sliding_window=6, window_layers=(1,))], ids=["plain", "window"])
@pytest.mark.parametrize("name", PATTERNS)
def test_generation_through_the_cache_is_the_full_forward(name: str, config) -> None:
    model = build(config)
    model.pattern = pattern(name)
    talk = Talk(model, 3)
    talk.prompt(draw(30, 1), Layout.of([6, 3, 9, 8, 4], [-1, 0, 0, -1, 2]))
    for step in range(4):  # unequal lengths: a ragged step
        talk.go_on(*(draw(1, 10 * step + i) for i in range(3)))
    talk.go_on(draw(3, 50), draw(1, 51), draw(7, 52))  # several tokens each
    talk.cache.keep([1])
    talk.texts = [talk.texts[1]]
    for step in range(9):
        talk.go_on(draw(1, 90 + step))


def test_s2_is_evaluated_dense_and_the_others_are_not() -> None:
    tokens, layout = sample_row()
    full = logits_of(build(), tokens, layout)
    for name in PATTERNS:
        model = build()
        model.pattern = pattern(name)
        assert torch.equal(logits_of(model, tokens, layout), full) == (name == "s2")
        assert not torch.equal(logits_of(model.train(), tokens, layout), full)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "strided"])
def test_a_wide_pattern_is_full_attention(name: str) -> None:
    wide = {"window": 64, "stride": 2, "block": 64, "columns": 1, "group": 128}
    settings = {key: wide[key] for key in PATTERNS[name]}
    tokens, layout = sample_row()
    model = build().train()
    expected = logits_of(model, tokens, layout)
    made = pattern_of(AttentionSettings(pattern=name.split()[0].rstrip(","), **settings))
    model.pattern = Pattern(made.name, made.fields[:1])  # the first half's field, for all heads
    assert torch.allclose(logits_of(model, tokens, layout), expected, atol=1e-12)


def test_halves_need_two_heads() -> None:
    with pytest.raises(ModelError, match="s2 needs two KV heads.*this model has 1"):
        pattern("s2", kv_heads=1)
    assert pattern("s2", kv_heads=5).split(5) == [
        (0, 3, pattern("s2").fields[0]),
        (3, 5, pattern("s2").fields[1]),
    ]
    assert pattern_of(None) is None and pattern_of(AttentionSettings()) is None
