"""Prefix trees and packs of random examples: nothing lost, nothing wrongly merged, budgets kept, targets counted."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import pack as pack_module
from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs, prefix_tree


def example(ids: Sequence[int], supervised: Sequence[bool] | None = None, source: str = "made") -> Example:
    told = np.ones(len(ids), bool) if supervised is None else np.asarray(supervised, bool)
    return Example(np.asarray(ids, np.int32), told, source)


# Few different tokens and repeated beginnings, so that examples share, end inside each other and are identical often.
beginnings = st.sampled_from([[], [1] * 9, [1] * 9 + [2, 3] * 5, [1] * 12, [4]])
tails = st.lists(st.integers(0, 2), max_size=14)


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    made = []
    for _ in range(draw(st.integers(0, 12))):
        ids = draw(beginnings) + draw(tails)
        supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        made.append(example(ids, supervised))
    return made


def check_tree(sequences: Sequence[np.ndarray], share: bool = True) -> int:
    """Every sequence is the chain of its nodes, to the token; returns the tokens that sharing saves."""
    nodes = prefix_tree(sequences, share)
    chains: dict[int, list[int]] = collections.defaultdict(list)
    for number, node in enumerate(nodes):
        assert node.parent < number and node.start < node.stop and node.members
        if node.parent >= 0:
            assert set(node.members) <= set(nodes[node.parent].members) and nodes[node.parent].stop == node.start
        else:
            assert node.start == 0
        runs = {sequences[member][node.start : node.stop].tobytes() for member in node.members}
        assert len(runs) == 1, "sharing merged unequal tokens"
        for member in node.members:
            chains[member].append(number)
        if len(node.members) > 1:
            assert (len(node.members) - 1) * (node.stop - node.start) >= pack_module.MIN_SAVING
    for i, sequence in enumerate(sequences):
        at = 0
        for number in chains[i]:
            assert nodes[number].start == at
            at = nodes[number].stop
        assert at == len(sequence), "a sequence is not covered"
    return sum(map(len, sequences)) - sum(n.stop - n.start for n in nodes)


def tokens_of(pack: Pack) -> np.ndarray:
    return pack.tokens.numpy()


def check_pack(pack: Pack, examples: Sequence[Example]) -> None:
    """Rows rebuild every example; the layout shows it to itself alone; the targets are its supervised tokens."""
    assert pack.layout.tokens == len(pack.tokens) and len(pack.examples) == len(pack.rows)
    mask = pack.layout.mask().numpy()
    due: collections.Counter[tuple[int, int]] = collections.Counter()
    for index, rows in zip(pack.examples, pack.rows, strict=True):
        ids, supervised = examples[index].ids, examples[index].supervised
        assert np.array_equal(tokens_of(pack)[rows], ids)
        assert pack.layout.position_array[rows].tolist() == list(range(len(ids)))
        for at, row in enumerate(rows):
            assert sorted(np.flatnonzero(mask[row])) == sorted(rows[: at + 1]), "sees more or less than its own past"
        for at in np.flatnonzero(supervised[1:]):
            due[int(rows[at]), int(ids[at + 1])] += 1
    found = zip(pack.where.tolist(), pack.target.tolist(), pack.weight.tolist(), strict=True)
    assert {(w, t): n for w, t, n in found} == due, "targets"
    assert len(pack.where) == len(due), "a target stands twice"


@settings(deadline=None, max_examples=200)
@given(batches(), st.booleans(), st.integers(1, 40))
def test_tree(batch: list[Example], share: bool, saving: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "MIN_SAVING", saving)
        assert check_tree([e.ids for e in batch], share) >= 0


@settings(deadline=None, max_examples=200)
@given(batches(), st.integers(1, 80), st.one_of(st.none(), st.integers(1, 4)), st.booleans())
def test_packs(batch: list[Example], budget: int, max_rows: int | None, share: bool) -> None:
    packs = plan_packs(batch, budget=budget, max_rows=max_rows, share=share)
    for pack in packs:
        check_pack(pack, batch)
        assert len(pack.tokens) <= budget or len(pack.examples) == 1
        assert max_rows is None or len(pack.examples) <= max_rows
    held = sorted(i for pack in packs for i in pack.examples)
    assert held == [i for i, e in enumerate(batch) if len(e.ids)]
    assert sum(p.supervised for p in packs) == sum(int(e.supervised[1:].sum()) for e in batch)


def test_common_preamble_stands_once() -> None:
    preamble = list(range(20))
    batch = [example([*preamble, 30 + i, 40]) for i in range(5)]
    (pack,) = plan_packs(batch, budget=1000)
    assert pack.layout.lengths == (20, 2, 2, 2, 2, 2) and pack.layout.parents == (-1, 0, 0, 0, 0, 0)
    assert pack.supervised == 5 * 21
    last = pack.where == 19
    assert sorted(pack.target[last].tolist()) == [30, 31, 32, 33, 34], "the prefix's last position has five next tokens"
    assert pack.weight[pack.where == 3].tolist() == [5.0], "a supervised prefix token counts once for every example"


def test_identical_examples_are_one_segment_with_weight() -> None:
    (pack,) = plan_packs([example(range(12))] * 4, budget=1000)
    assert pack.layout.lengths == (12,) and pack.weight.unique().tolist() == [4.0] and pack.supervised == 44
    assert len(pack.rows) == 4


def test_one_example_is_the_prefix_of_another() -> None:
    batch = [example(range(10)), example(range(25))]
    (pack,) = plan_packs(batch, budget=1000)
    assert pack.layout.lengths == (10, 15) and pack.layout.parents == (-1, 0)
    check_pack(pack, batch)


def test_short_common_runs_are_not_worth_a_segment() -> None:
    (pack,) = plan_packs([example([1, 2, 3]), example([1, 4, 5])], budget=100)
    assert pack.layout.lengths == (3, 3) and pack.layout.parents == (-1, -1)


def test_budget_holds_where_runs_are_too_short_to_share() -> None:
    """A run of 7 tokens that two examples share is not shared, so both have it whole: the budget counts that."""
    batch = [example([i // 2] * 7 + [100 + i]) for i in range(40)]
    packs = plan_packs(batch, budget=64)
    assert max(len(p.tokens) for p in packs) <= 64


def test_packs_are_evenly_filled() -> None:
    rng = np.random.default_rng(0)
    batch = [example(rng.integers(0, 9, rng.integers(20, 40))) for _ in range(64)]
    total = sum(len(e.ids) for e in batch)
    sizes = [len(p.tokens) for p in plan_packs(batch, budget=500)]
    assert len(sizes) <= -(-total // 500) + 1 and min(sizes) > 0.6 * max(sizes)


def test_nothing_to_pack() -> None:
    assert plan_packs([], budget=10) == [] and prefix_tree([]) == [] and prefix_tree([np.zeros(0, np.int32)]) == []
    assert plan_packs([example([])], budget=10) == []


def test_no_targets() -> None:
    (pack,) = plan_packs([example([5]), example([5, 6], [True, False])], budget=10)
    assert pack.supervised == 0 and len(pack.where) == 0, "token 0 has nothing before it to predict it from"


def test_indices_name_the_callers_examples() -> None:
    assert plan_packs([*[example([])] * 17, example([1, 2])], budget=10)[0].examples == (17,)


def test_deep_tries_do_not_recurse() -> None:
    chain = [np.arange(10 * (i + 1)) % 251 for i in range(300)]  # each the prefix of the next: a chain of nodes
    assert check_tree(chain) == sum(map(len, chain)) - 3000
    comb = [np.concatenate([np.zeros(i, np.int64), [1 + i % 3]]) for i in range(3000)]  # leaves the trunk one by one
    assert check_tree(comb[::-1]) > 0.98 * sum(map(len, comb))
    order = np.random.default_rng(0).permutation(600)
    packs = plan_packs([example(comb[i]) for i in order], budget=900, max_rows=200)
    assert max(len(p.tokens) for p in packs) <= 900 and sum(len(p.examples) for p in packs) == 600
