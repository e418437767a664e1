"""Which rows are taken, and in which order: filter, allocation over clusters, pick inside a cluster.

No command runs this module; `selectmoe select` uses it. Everything here is one sort: a row has a rank inside its
cluster, and allocation says how ranks of different clusters compare. So every order is complete, and
every budget a prefix of it.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ALLOCATIONS = ("round_robin", "proportional", "coverage")
PICKS = ("best", "centroid", "random")
PICKINGS = {
    "coverage": {"drop": 0.3, "allocation": "coverage", "pick": "centroid"},
    "legacy": {"drop": 0.0, "allocation": "round_robin", "pick": "best"},
}
"""The named combinations of the three parts."""


def share(percentage: float) -> Decimal:
    """A share as the decimal number that was written, not as its nearest binary one."""
    return Decimal(repr(float(percentage)))


def target_rows(n: int, percentage: float) -> int:
    """floor(n * percentage + 1/2) in decimal arithmetic, at least 1 and at most n.

    Raises:
        UserError: percentage outside (0, 1].
    """
    if not (math.isfinite(percentage) and 0 < percentage <= 1):
        raise UserError(f"selection_percentage={percentage} must be above 0 and at most 1 (0.05 is five per cent)")
    exact = (n * share(percentage) + Decimal("0.5")).to_integral_value(decimal.ROUND_FLOOR)
    return max(1, min(n, int(exact)))


def most_rows(n: int, drop: float) -> int:
    """How many of n rows are left when the share `drop` is left out."""
    return n - int((n * share(drop)).to_integral_value(decimal.ROUND_FLOOR))


def keep_best(scores: Floats, drop: float, target: int) -> Ints:
    """The rows that stay when the share `drop` with the worst scores is left out.

    Args:
        scores: [N], higher is better, no NaN; of equal scores the later row goes first.
        drop: share of the N rows, 0 <= drop < 1.
        target: rows that must be left.

    Returns:
        Row numbers that stay, ascending.

    Raises:
        UserError: fewer than `target` rows would be left; names the largest drop possible.
    """
    n = len(scores)
    left = most_rows(n, drop)
    if left < target:
        most = (Decimal(n - target) / n).quantize(Decimal("0.0001"), decimal.ROUND_FLOOR)
        raise UserError(
            f"filter.drop={drop} leaves {left} of {n} rows, fewer than the {target} wanted: "
            f"the largest drop possible is {most}"
        )
    return np.sort(best_first(scores)[:left])


def best_first(scores: Floats) -> Ints:
    """[N] row numbers by falling score, ties by row number.

    Raises:
        ValueError: a score is NaN, which has no place in an order.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    return np.argsort(-scores, kind="stable")


def rank_inside(labels: Ints, key: Floats) -> Ints:
    """[N] rank (from 0) of every row among the rows with its label, by rising key, ties by row number."""
    order = np.lexsort((key, labels))  # stable
    counts = np.bincount(labels)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def pick_key(pick: str, scores: Floats, distance: Floats, rng: np.random.Generator) -> Floats:
    """[N] what rows of one cluster are ordered by, rising: best score, nearest to the centre, or a draw."""
    match pick:
        case "best":
            return -scores
        case "centroid":
            return distance
        case "random":
            return rng.permutation(len(scores)).astype(np.float64)
    raise UserError(f"pick={pick!r} is unknown; known: {', '.join(PICKS)}")


def order_rows(labels: Ints, ranks: Ints, scores: Floats, allocation: str) -> Ints:
    """[N] all rows in the order in which they are taken.

    round_robin and coverage: clusters take turns, in every turn by the score of their next row, so that a budget below
    the number of clusters takes the best. proportional: the divisor method of Sainte-Lague ((2 rank + 1) / size), whose
    every prefix is shared out in proportion to the sizes.

    Args:
        labels: [N] cluster.
        ranks: [N] rank inside the cluster.
        scores: [N] higher first among rows of one turn; ties by row number.
        allocation: one of `ALLOCATIONS`.
    """
    if allocation not in ALLOCATIONS:
        raise UserError(f"allocation={allocation!r} is unknown; known: {', '.join(ALLOCATIONS)}")
    turn = ranks.astype(np.float64)
    if allocation == "proportional":
        turn = (2 * turn + 1) / np.bincount(labels)[labels]
    return np.lexsort((-scores, turn))


def take(order: Ints, target: int | None, tokens: Ints, budget: int | None) -> Ints:
    """The first `target` rows of an order, or as many as fit into `budget` answer tokens (at least one).

    Raises:
        UserError: there are not enough rows.
    """
    if budget is None:
        if target is None or target > len(order):
            raise UserError(f"{target} rows are wanted, but only {len(order)} are there")
        return order[:target]
    spent = np.cumsum(tokens[order])
    return order[: max(1, int(np.searchsorted(spent, budget, side="right")))]


def expected_rows(tokens: Ints, budget: int) -> int:
    """Rows that a budget of answer tokens pays for on average: at least 1, at most all."""
    total = int(tokens.sum())
    if total <= budget:
        return len(tokens)
    return max(1, (2 * budget * len(tokens) + total) // (2 * total))
