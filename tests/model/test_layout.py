"""Layouts of random trees: positions, visibility, and tiles that hold exactly the pairs of the mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import ModelError
from tunesmith.model.layout import BATCHED, NATIVE, Cut, Layout


@st.composite
def trees(draw: st.DrawFn) -> Layout:
    """Random segments, some empty, each a root or the child of an earlier one."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=0, max_size=9))
    parents = [draw(st.integers(-1, i - 1)) for i in range(len(lengths))]
    return Layout.of(lengths, parents)


def sees(layout: Layout, window: int | None) -> np.ndarray:
    """The truth, told slowly: q sees k where k is q's own segment's or an ancestor's, not later, and in the window."""
    owner = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    truth = np.zeros((layout.tokens, layout.tokens), bool)
    for q in range(layout.tokens):
        allowed, at = {owner[q]}, layout.parents[owner[q]]
        while at >= 0:
            allowed.add(at)
            at = layout.parents[at]
        for k in range(layout.tokens):
            back = layout.position_array[q] - layout.position_array[k]
            truth[q, k] = owner[k] in allowed and back >= 0 and (window is None or back < window)
    return truth


@settings(deadline=None, max_examples=150)
@given(trees(), st.one_of(st.none(), st.integers(1, 12)))
def test_mask_is_the_truth(layout: Layout, window: int | None) -> None:
    assert np.array_equal(layout.mask(window).numpy(), sees(layout, window))


@settings(deadline=None, max_examples=150)
@given(trees(), st.one_of(st.none(), st.integers(1, 12)), st.integers(1, 5), st.sampled_from([1, 40, 1 << 20]))
def test_tiles_hold_exactly_the_pairs_of_the_mask(layout: Layout, window: int | None, block: int, room: int) -> None:
    tiles = layout.tiles(window, cut=Cut(block, room, 1.5))
    count = np.zeros((layout.tokens, layout.tokens), int)
    answered = np.zeros(layout.tokens, int)
    for queries, keys, visible in zip(tiles[::3], tiles[1::3], tiles[2::3], strict=True):
        assert visible.shape == (*queries.shape, 2)
        for b in range(len(queries)):
            for i, q in enumerate(queries[b].tolist()):
                low, high = visible[b, i].tolist()
                if q < 0:
                    assert low < high, "a padded query that sees nothing would be NaN"
                    continue
                answered[q] += 1
                np.add.at(count[q], keys[b][low:high].numpy(), 1)
    assert (answered == 1).all(), "every query is answered in one tile"
    assert np.array_equal(count, sees(layout, window).astype(int)), "a pair is missing, doubled, or too much"


@settings(deadline=None, max_examples=100)
@given(trees())
def test_positions_count_from_the_root(layout: Layout) -> None:
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        rows = layout.rows_of(segment)
        assert layout.positions[torch.from_numpy(rows)].tolist() == list(range(len(rows)))
        assert rows[len(rows) - length :].tolist() == list(range(start, start + length))
        assert layout.offsets[segment] == len(rows) - length


@pytest.mark.parametrize("cut", [BATCHED, NATIVE])
def test_long_segments_are_cut_into_blocks_that_skip_the_future(cut: Cut) -> None:
    n = 16 * cut.queries
    tiles = Layout.single(n).tiles(cut=cut)
    pairs = sum(hidden.numel() for hidden in tiles[2::3])
    assert pairs < 0.6 * n * n
    windowed = Layout.single(n).tiles(32, cut=cut)
    assert sum(hidden.numel() for hidden in windowed[2::3]) < 0.3 * n * n


def test_tiles_are_made_once() -> None:
    layout = Layout.of([3, 4], [-1, 0])
    assert layout.tiles() is layout.tiles() and layout.tiles(2) is not layout.tiles()


@pytest.mark.parametrize("parents", [[0, -1], [-1, 1], [-1, -2], [-1]])
def test_a_parent_comes_first(parents: list[int]) -> None:
    with pytest.raises(ModelError, match="earlier segment"):
        Layout.of([2, 3], parents)


def test_a_chain_of_thousands_does_not_recurse() -> None:
    layout = Layout.of([1] * 3000, range(-1, 2999))
    assert layout.positions.tolist() == list(range(3000))
    assert layout.visibility[:, 2].unique().tolist() == [3000]
