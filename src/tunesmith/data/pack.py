"""Packs: several examples in one row without padding, what they begin with in common standing there once.

    examples   A B C D E F        row       [ A B C | D E F | X Y ]      segment 0 is the parent of 1 and 2
               A B C X Y          targets   (position, token, weight): the last position of the prefix has two next
               tokens

Targets are triples because a shared position may have several next tokens, and a shared target counts once for each
example that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.encode import Example
from tunesmith.model.layout import Layout
from tunesmith.model.sight import Picture, distinct
from tunesmith.model.virtual import Needs

NOTHING = Needs()
FIRST = -(1 << 62)  # what stands for the first tokens of examples that see something: below every id with its mark
MIN_SAVING = 8  # tokens that sharing must save: below, one more segment costs more than it saves


@dataclass(frozen=True)
class Pack:
    """One row of the packed step: `tokens` (T,), their `layout`, and the targets.

    Position `read[place[i]]` is to predict token `target[i]` with weight `weight[i]`, each (n,); `read`, (m,), holds
    every such position once, in order. `examples` are the packed examples' indices, and `rows[j]` the positions of the
    tokens of the one that stands j-th there, in order.
    """

    tokens: Tensor
    layout: Layout
    read: Tensor
    place: Tensor
    target: Tensor
    weight: Tensor
    examples: tuple[int, ...]
    rows: tuple[np.ndarray, ...]

    @property
    def where(self) -> Tensor:
        """The position of every target, (n,)."""
        return self.read[self.place]

    @property
    def supervised(self) -> float:
        """Number of supervised tokens, counted for every example."""
        return float(self.weight.sum())


@dataclass(frozen=True)
class Node:
    """A run of tokens that all of `members` have at [start, stop); `parent` is the node before it (-1: none)."""

    start: int
    stop: int
    parent: int
    members: tuple[int, ...]


def prefix_tree(sequences: Sequence[np.ndarray], share: bool = True) -> list[Node]:
    """Cut sequences into nodes so that a common beginning is one node; a parent comes before its children.

    Sharing is exact by construction: the members of a node have equal tokens from 0 to `stop`. Without `share`, one
    node a sequence.
    """
    if not share:
        return [Node(0, len(s), -1, (i,)) for i, s in enumerate(sequences) if len(s)]
    nodes: list[Node] = []
    order = sorted((i for i, s in enumerate(sequences) if len(s)), key=lambda i: sequences[i].tolist())
    stack: list[tuple[list[int], int, int]] = (
        [(order, 0, -1)] if order else []
    )  # members, first uncovered token, parent
    while stack:
        members, start, parent = stack.pop()
        common = _common(sequences[members[0]], sequences[members[-1]])  # sorted: the ends differ first
        if len(members) == 1 or (len(members) - 1) * (common - start) >= MIN_SAVING:
            if common > start:
                nodes.append(Node(start, common, parent, tuple(members)))
                start, parent = common, len(nodes) - 1
            members = [i for i in members if len(sequences[i]) > common]
        else:
            ended = [i for i in members if len(sequences[i]) == common]
            nodes += [Node(start, common, parent, (i,)) for i in ended if common > start]
            members = members[len(ended) :]  # the sequences that end here sort first
        stack += [(group, start, parent) for group in reversed(list(_split(sequences, members, common)))]
    return nodes


def plan_packs(
    examples: Sequence[Example],
    *,
    budget: int,
    max_rows: int | None = None,
    share: bool = True,
    device: torch.device | str = "cpu",
    needs: Needs = NOTHING,
) -> list[Pack]:
    """Pack `examples` into as few rows of at most `budget` tokens (shared ones counted once) as are needed, evenly
    filled.

    `max_rows` bounds the examples of a pack. An example longer than the budget has a pack to itself. Empty examples
    vanish. `needs`: what the attached adapters must find in the row (`Llama.needs`); where prompts' ends matter, an
    example with several answers is as many, each behind all that comes before it; where images are looked at, examples
    share what they begin with only if they have the same image.
    """
    parts = [(i, part) for i, e in enumerate(examples) for part in (each_answer(e) if needs.by_answer else [e])]
    examples = [with_infix(e, needs.infix) if needs.infix and len(e.ids) else e for _, e in parts]
    marks = [answer_ends(e, needs.ends) for e in examples]
    # What is edited differently is not the same token, so it is not shared: marks stand above the ids' 32 bits.
    keys = [e.ids + (mark << 32) for e, mark in zip(examples, marks, strict=True)]
    keys = told_apart(keys, [e.picture for e in examples]) if needs.looks else keys
    indices = [i for i, e in enumerate(examples) if len(e.ids)]
    if share:  # neighbours share the most
        indices.sort(key=lambda i: keys[i].tolist())
    groups = _divide(keys, indices, budget, max_rows, share)
    packs = [_build(examples, keys, marks if needs.ends else None, group, share, device) for group in groups]
    return [replace(pack, examples=tuple(parts[i][0] for i in pack.examples)) for pack in packs]


def _build(
    examples: Sequence[Example],
    keys: Sequence[np.ndarray],
    marks: Sequence[np.ndarray] | None,
    indices: Sequence[int],
    share: bool,
    device: torch.device | str,
) -> Pack:
    """Lay those examples out as one pack; of equal `keys` is what may be shared."""
    nodes = prefix_tree([keys[i] for i in indices], share)
    told = None
    if marks is not None:
        told = np.concatenate([marks[indices[n.members[0]]][n.start : n.stop] for n in nodes])
    examples = [examples[i] for i in indices]
    pictures = [_picture([examples[i].picture for i in n.members]) for n in nodes]
    layout = Layout.of([n.stop - n.start for n in nodes], [n.parent for n in nodes], device, told, pictures)
    tokens = np.concatenate([examples[n.members[0]].ids[n.start : n.stop] for n in nodes]).astype(np.int64)
    rows = [np.zeros(len(e.ids), np.int64) for e in examples]
    for node, first in zip(nodes, layout.starts, strict=True):
        for member in node.members:
            rows[member][node.start : node.stop] = np.arange(first, first + node.stop - node.start)
    where, target, weight = _targets(examples, rows)
    read, place = np.unique(where, return_inverse=True)
    return Pack(
        torch.from_numpy(tokens).to(device),
        layout,
        torch.from_numpy(read).to(device),
        torch.from_numpy(place.reshape(-1)).to(device),
        torch.from_numpy(target).to(device),
        torch.from_numpy(weight).to(device),
        tuple(indices),
        tuple(rows),
    )


def told_apart(keys: Sequence[np.ndarray], pictures: Sequence[Picture | None]) -> list[np.ndarray]:
    """Keys that are equal from their first token on only where the images are, too: an image changes every token."""
    firsts = [(int(key[0]) if len(key) else 0, number) for key, number in zip(keys, distinct(pictures)[1], strict=True)]
    rank = {first: i for i, first in enumerate(sorted(set(firsts)))}
    return [np.append(FIRST + rank[first], key[1:])[: len(key)] for first, key in zip(firsts, keys, strict=True)]


def _picture(pictures: Sequence[Picture | None]) -> Picture | None:
    """The image that these examples have in common; None where they have none, or several (nobody looks then)."""
    first = pictures[0]
    return first if first is not None and all(p is not None and p.key == first.key for p in pictures) else None


def each_answer(example: Example) -> list[Example]:
    """Of every answer an example that ends with it, and has it alone to learn: so it is generated, too."""
    starts = _answers(example)
    if len(starts) == 1:
        return [example]
    place = np.arange(len(example.ids))
    ends = np.flatnonzero(example.supervised & ~np.append(example.supervised[1:], False)) + 1
    cuts = zip(starts, ends, strict=True)
    return [replace(example, ids=example.ids[:b], supervised=(place >= a)[:b]) for a, b in cuts]


def with_infix(example: Example, infix: int) -> Example:
    """The example with tokens -1 to -infix right before every answer; at its end, if it holds no answer."""
    at = _answers(example)
    ids = np.insert(example.ids, np.repeat(at, infix), np.tile(-1 - np.arange(infix), len(at)))
    return replace(example, ids=ids, supervised=np.insert(example.supervised, np.repeat(at, infix), False))


def answer_ends(example: Example, most: int) -> np.ndarray:
    """How far before the next answer each token stands, (n,): 1 is a prompt's last; 0: over `most`; -1: in an answer.

    All 0 where `most` is 0: nobody asks.
    """
    if not most:
        return np.zeros(len(example.ids), np.int64)
    at = _answers(example)
    place = np.arange(len(example.ids))
    following = np.searchsorted(at, place, side="right")
    ends = np.append(at, len(place) + most + 1)[following] - place
    return np.where(example.supervised, -1, np.where(ends > most, 0, ends))


def _answers(example: Example) -> np.ndarray:
    """Where answers begin; an example without any is a prompt, and is answered after its end."""
    starts = np.flatnonzero(example.supervised & ~np.append(False, example.supervised[:-1]))
    return starts if len(starts) else np.array([len(example.ids)])


def _targets(examples: Sequence[Example], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, token, weight) of the supervised tokens with a token before them; equal pairs are one."""
    where, target = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for example, row in zip(examples, rows, strict=True):
        chosen = np.flatnonzero(example.supervised[1:])
        where.append(row[chosen])
        target.append(example.ids[chosen + 1].astype(np.int64))
    pairs = np.stack([np.concatenate(where), np.concatenate(target)], axis=1)
    unique, count = np.unique(pairs, axis=0, return_counts=True)
    return unique[:, 0].copy(), unique[:, 1].copy(), count.astype(np.float32)


def _divide(
    keys: Sequence[np.ndarray], indices: list[int], budget: int, max_rows: int | None, share: bool
) -> Iterator[list[int]]:
    """Cut the order into runs of at most `budget` tokens and `max_rows` examples, as even as the order allows."""
    whole = [len(keys[i]) for i in indices]
    fresh = list(whole)
    if share:
        for at in range(1, len(indices)):
            fresh[at] -= _common(keys[indices[at - 1]], keys[indices[at]])
    packs = max(1, -(-sum(fresh) // budget))
    aim = min(budget, -(-sum(fresh) // packs) + max(fresh, default=0) // 2)
    first = 0
    while first < len(indices):
        last, filled = first + 1, whole[first]
        while last < len(indices) and filled + fresh[last] <= aim and last - first != max_rows:
            filled += fresh[last]
            last += 1
        while share and last > first + 1 and _tree_tokens(keys, indices[first:last]) > budget:
            last -= 1  # `fresh` counts as shared what is too short for a node of its own
        yield indices[first:last]
        first = last


def _tree_tokens(keys: Sequence[np.ndarray], indices: Sequence[int]) -> int:
    """Tokens of the row that these examples make together."""
    return sum(node.stop - node.start for node in prefix_tree([keys[i] for i in indices]))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that both begin with."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _split(sequences: Sequence[np.ndarray], members: list[int], at: int) -> Iterator[list[int]]:
    """Neighbours of the sorted order that have the same token at `at`."""
    group: list[int] = []
    for member in members:
        if group and sequences[member][at] != sequences[group[0]][at]:
            yield group
            group = []
        group.append(member)
    if group:
        yield group
