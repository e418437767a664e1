"""The batch plan of routing: which rows share a forward pass, decided from lengths and configuration alone.

No command runs this module; `selectmoe route` plans with it before anything is shared out, because a row's float32
results depend (in their last bits) on the batch that it was computed in. Shards take whole batches of the one plan, so
neither their number nor an interruption changes a bit. One dataset's plan knows nothing of the others.

Rows go from long to short (ties in the pool's order, which is by id). Where to cut is a trade: a batch costs as much as
`price` tokens whatever is in it, and every row is padded to its batch's longest. `cut` takes the largest price at which
at most `PADDING` more is computed than is read, and of all cuts between rows of different lengths the cheapest one.

Where the answers are read a second time without their questions, one batch's answers are too few tokens to keep a device
busy: batches that follow each other form a unit, whose answers share a pass. What is shared out are units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

PADDING = 0.02
"""Padding at most, as a share of the tokens that are read."""
PRICES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)
"""Tokens that a batch is taken to cost beside its own; at the last one there is no padding."""
WINDOW = 1024
"""Different lengths that a stretch of batches spans at most (bounds the search)."""
BUSY_TOKENS = 1024
"""Answer tokens that are worth a pass."""
UNIT_BATCHES = 4
"""Batches in a piece of work at most: a kill costs one that is not finished."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The forward passes over one dataset of N rows, M of which have a token."""

    dataset: str
    tokens: Ints
    """[N] valid tokens of a row, in the pool's order."""
    order: Ints
    """[M] rows that have a token, from long to short."""
    starts: Ints
    """[batches + 1] batch b is ``order[starts[b]:starts[b + 1]]``."""
    unit_starts: Ints
    """[units + 1] unit u is the batches ``unit_starts[u]`` to ``unit_starts[u + 1]`` (without it)."""

    def rows(self, batch: int) -> Ints:
        """The rows of a batch, longest first."""
        return self.order[self.starts[batch] : self.starts[batch + 1]]

    def batches(self, unit: int) -> range:
        """The batches of a unit."""
        return range(int(self.unit_starts[unit]), int(self.unit_starts[unit + 1]))

    @cached_property
    def lengths(self) -> Ints:
        """[batches] tokens that every row of a batch is padded to."""
        lengths: Ints = self.tokens[self.order[self.starts[:-1]]]
        return lengths

    @cached_property
    def padded(self) -> Ints:
        """[batches] tokens computed, padding included."""
        return self.lengths * np.diff(self.starts)


@dataclass(frozen=True)
class Unit:
    """One piece of work: a unit of one dataset's plan; `number` counts over all datasets."""

    number: int
    plan: Plan
    index: int

    @property
    def batches(self) -> range:
        """Its batches in the plan."""
        return self.plan.batches(self.index)

    @property
    def rows(self) -> Ints:
        """Its rows in the dataset, in the order of its results."""
        first, last = self.batches.start, self.batches.stop
        return self.plan.order[self.plan.starts[first] : self.plan.starts[last]]


def make_plan(
    dataset: str,
    tokens: npt.ArrayLike,
    token_budget: int,
    batch_size: int | None = None,
    second_pass: npt.ArrayLike | None = None,
) -> Plan:
    """Plan the forward passes over one dataset.

    Args:
        dataset: its name.
        tokens: [N] tokens per row, in the pool's order; a row of length 0 is in no batch.
        token_budget: padded tokens per batch at most; a row that alone is longer gets a batch to itself.
        batch_size: rows per batch at most; None: no limit.
        second_pass: [N] how many tokens of a row a second pass reads; None: there is none.
    """
    lengths = np.asarray(tokens, dtype=np.int64)
    order = np.lexsort((np.arange(len(lengths)), -lengths))[: int((lengths > 0).sum())]
    starts = cut(lengths[order], token_budget, batch_size)
    again = None if second_pass is None else np.asarray(second_pass, dtype=np.int64)[order]
    return Plan(dataset, lengths, order, starts, _group(starts, again))


def cut(lengths: npt.ArrayLike, token_budget: int, batch_size: int | None = None) -> Ints:
    """Cut rows into batches.

    Args:
        lengths: [M] tokens per row, in descending order, all positive.
        token_budget: padded tokens per batch at most.
        batch_size: rows per batch at most; None: no limit.

    Returns:
        [batches + 1] where each batch begins, and M.
    """
    rows = np.asarray(lengths, dtype=np.int64)
    if not len(rows):
        return np.zeros(1, dtype=np.int64)
    groups = np.append(np.flatnonzero(np.diff(rows, prepend=rows[0] + 1)), len(rows))
    most = np.maximum(1, np.minimum(token_budget // rows, batch_size or len(rows)))
    for price in PRICES:
        starts = _fill(_stretches(rows, groups, most, price), most)
        computed = int((rows[starts[:-1]] * np.diff(starts)).sum())
        if computed <= (1 + PADDING) * int(rows.sum()):
            break
    return starts


def _stretches(rows: Ints, groups: Ints, most: Ints, price: int) -> Ints:
    """Where stretches of batches begin: the cheapest cut of the groups of equally long rows (dynamic programming).

    Args:
        rows: [M] descending lengths.
        groups: [G + 1] where each group of equal rows begins, and M.
        most: [M] rows in a batch that begins at this row.
        price: of a batch, in tokens.
    """
    longest, capacity = rows[groups[:-1]], most[groups[:-1]]
    best = np.zeros(len(groups), dtype=np.int64)
    origin = np.zeros(len(groups), dtype=np.int64)
    for end in range(1, len(groups)):
        first = max(0, end - WINDOW)
        size = groups[end] - groups[first:end]
        cost = best[first:end] + size * longest[first:end] + price * -(-size // capacity[first:end])
        at = int(np.argmin(cost))
        best[end], origin[end] = cost[at], first + at
    starts, end = [], len(groups) - 1
    while end:
        end = int(origin[end])
        starts.append(int(groups[end]))
    return np.array([*reversed(starts), len(rows)], dtype=np.int64)


def _fill(stretches: Ints, most: Ints) -> Ints:
    """Cut every stretch into batches that are as full as may be."""
    starts = []
    for start, end in zip(stretches[:-1].tolist(), stretches[1:].tolist()):
        while start < end:
            starts.append(start)
            start = min(end, start + int(most[start]))
    return np.array([*starts, stretches[-1]], dtype=np.int64)


def _group(starts: Ints, again: Ints | None) -> Ints:
    """Where units begin: without a second pass at every batch, else where that pass has `BUSY_TOKENS` to read."""
    batches = len(starts) - 1
    if again is None:
        return np.arange(batches + 1)
    sizes = np.add.reduceat(again, starts[:-1]) if batches else again
    begins, waiting, held = [], BUSY_TOKENS, UNIT_BATCHES
    for batch, size in enumerate(sizes.tolist()):
        if waiting >= BUSY_TOKENS or held == UNIT_BATCHES:
            begins.append(batch)
            waiting = held = 0
        waiting, held = waiting + size, held + 1
    return np.array([*begins, batches], dtype=np.int64)


def units(plans: list[Plan]) -> Iterator[Unit]:
    """The pieces of work of several datasets, in their order."""
    number = 0
    for plan in plans:
        for index in range(len(plan.unit_starts) - 1):
            yield Unit(number, plan, index)
            number += 1


def share(plans: list[Plan], index: int, count: int) -> list[Unit]:
    """The units of one shard (every `count`-th), that with the largest batch first: what does not fit fails at once."""
    mine = [unit for unit in units(plans) if unit.number % count == index]
    if mine:
        largest = max(range(len(mine)), key=lambda i: (_size(mine[i]), -i))
        mine.insert(0, mine.pop(largest))
    return mine


def _size(unit: Unit) -> tuple[int, int]:
    plan = unit.plan
    return max((int(plan.padded[batch]), int(plan.lengths[batch])) for batch in unit.batches)
