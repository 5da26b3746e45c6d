"""Which rows an optimizer step sees: fixed by the seed, the epoch and the step's number alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.config import TrainSection

_EPOCHS = 8  # that are looked at for the heaviest batches: later ones hardly hold a heavier one


def row_order(rows: int, settings: TrainSection, epoch: int) -> np.ndarray:
    """The order in which an epoch (from 0) visits its rows, (rows,)."""
    if not settings.shuffle:
        return np.arange(rows)
    return np.random.default_rng([settings.seed, epoch]).permutation(rows)


def heaviest_batches(lengths: Sequence[int], settings: TrainSection, count: int = 2) -> list[list[int]]:
    """The batches that need the most memory: the `count` with the most tokens, and one with the longest row.

    `lengths`: tokens of each row. Each batch is a list of rows, none twice; no rows give no batches.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    size = settings.batch_size
    starts = np.arange(0, len(sizes), size)
    found: list[tuple[int, int, int]] = []  # (tokens, epoch, first)
    for epoch in range(min(math.ceil(settings.epochs), _EPOCHS) if settings.shuffle else 1):
        order = row_order(len(sizes), settings, epoch)
        totals = np.add.reduceat(sizes[order], starts)
        most = np.argsort(-totals, kind="stable")[:count]
        found += [(int(totals[i]), epoch, int(starts[i])) for i in most]
        longest = int(np.argmax(sizes[order])) // size
        found.append((-1 - epoch, epoch, int(starts[longest])))
    chosen = [*sorted(found, reverse=True)[:count], max(f for f in found if f[0] < 0)]
    batches = dict.fromkeys((epoch, start) for _, epoch, start in chosen)
    return [row_order(len(sizes), settings, epoch)[start : start + size].tolist() for epoch, start in batches]
