"""The batch plan of routing: which rows share a forward pass, decided from lengths and configuration alone.

No command runs this module; `selectmoe route` plans with it before anything is shared out, because a row's float32
results depend (in their last bits) on the batch that it was computed in. Shards take whole batches of the one plan, so
neither their number nor an interruption changes a bit.

Per dataset, rows go from long to short (ties by id) and are cut where the next row would exceed the token budget. A
batch that is already large enough to keep the device busy is also cut where the next row would be mostly padding: the
rows of a small dataset would otherwise all be padded to its longest one.

Where the answers are read a second time without their questions, one batch's answers are too few tokens to keep a device
busy: batches that follow each other form a unit, whose answers share a pass. What is shared out are units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from selectmoe.manifest import canonical_json

BUSY_TOKENS = 1024
"""Padded tokens from which on a batch may be cut early."""

SHRINK = 0.9
"""A row shorter than this share of its batch's longest opens a new batch: at most a tenth of a large one is padding."""


UNIT_BATCHES = 4
"""Batches in a piece of work at most: a kill costs one that is not finished."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: positions of its rows in the pool, longest first, all of one dataset, padded to `length`."""

    dataset: str
    rows: tuple[int, ...]
    length: int

    @property
    def padded(self) -> int:
        """Tokens computed, padding included."""
        return len(self.rows) * self.length


def cut(lengths: Sequence[int], token_budget: int, batch_size: int | None = None) -> Iterator[range]:
    """Cut rows into batches.

    Args:
        lengths: tokens per row, in descending order, all positive.
        token_budget: padded tokens per batch at most; a row that alone is longer gets a batch to itself.
        batch_size: rows per batch at most; None: no limit.

    Yields:
        The positions of one batch, in order.
    """
    start = 0
    for at in range(1, len(lengths) + 1):
        rows, longest = at - start, lengths[start]
        full = rows == batch_size or (rows + 1) * longest > token_budget
        if at == len(lengths) or full or (rows * longest >= BUSY_TOKENS and lengths[at] < SHRINK * longest):
            yield range(start, at)
            start = at


def plan_batches(
    keys: Sequence[tuple[str, str]],
    lengths: Sequence[int],
    token_budget: int,
    batch_size: int | None = None,
) -> list[Batch]:
    """Plan the forward passes over a pool, dataset by dataset.

    Args:
        keys: (dataset, id) per row.
        lengths: tokens per row; a row of length 0 is in no batch.
        token_budget: padded tokens per batch at most.
        batch_size: rows per batch at most; None: no limit.

    Returns:
        The batches, by dataset name, then from long to short. The same for any order of the rows, up to positions.
    """
    by_dataset: dict[str, list[int]] = {}
    for i, (dataset, _) in enumerate(keys):
        if lengths[i]:
            by_dataset.setdefault(dataset, []).append(i)
    plan = []
    for dataset, rows in sorted(by_dataset.items()):
        rows.sort(key=lambda i: (-lengths[i], keys[i][1]))
        for part in cut([lengths[i] for i in rows], token_budget, batch_size):
            plan.append(
                Batch(
                    dataset,
                    tuple(rows[part.start : part.stop]),
                    lengths[rows[part.start]],
                )
            )
    return plan


def plan_digest(keys: Sequence[tuple[str, str]], plan: Sequence[Batch]) -> str:
    """SHA-256 (hex) over the keys and the length of every batch: equal digests mean the same forward passes."""
    sha = hashlib.sha256()
    for batch in plan:
        sha.update(canonical_json([batch.length, [keys[i] for i in batch.rows]]))
    return sha.hexdigest()


Unit = tuple[Batch, ...]
"""Batches of one dataset that belong to the same piece of work."""


def units(plan: Sequence[Batch], tokens: Sequence[int] | None = None) -> list[Unit]:
    """Cut the plan into pieces of work.

    Args:
        plan: the batches.
        tokens: per row of the pool, how many of its tokens a second pass reads; None: there is none.

    Returns:
        Without a second pass every batch alone; else as many as it takes to give that pass `BUSY_TOKENS`, and no more
        than `UNIT_BATCHES`.
    """
    out: list[list[Batch]] = []
    waiting = BUSY_TOKENS
    for batch in plan:
        if waiting >= BUSY_TOKENS or len(out[-1]) == UNIT_BATCHES or out[-1][0].dataset != batch.dataset:
            out.append([])
            waiting = 0
        out[-1].append(batch)
        waiting += sum(tokens[i] for i in batch.rows) if tokens is not None else BUSY_TOKENS
    return [tuple(unit) for unit in out]


def share(plan: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """The units of one shard (every `count`-th), that with the largest batch first: what does not fit fails at once."""
    mine = list(plan[index::count])
    if mine:
        largest = max(range(len(mine)), key=lambda i: (*max((b.padded, b.length) for b in mine[i]), -i))
        mine.insert(0, mine.pop(largest))
    return mine
