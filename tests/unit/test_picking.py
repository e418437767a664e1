"""Filter, allocation, pick and the arithmetic of budgets. Run: pytest tests/unit/test_picking.py"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe.errors import UserError
from selectmoe.picking import (
    ALLOCATIONS,
    PICKS,
    best_first,
    expected_rows,
    keep_best,
    order_rows,
    pick_key,
    rank_inside,
    take,
    target_rows,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("n", "p", "want"),
    [
        (19, 0.05, 1),
        (10, 0.05, 1),
        (30, 0.05, 2),
        (50, 0.05, 3),
        (1, 0.001, 1),
        (100, 0.285, 29),
        (7, 1.0, 7),
        (1000, 0.0005, 1),
    ],
)
def test_spec7_37_target_is_rounded_half_up_in_decimal(n: int, p: float, want: int) -> None:
    assert target_rows(n, p) == want


@pytest.mark.parametrize("p", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_spec7_37_percentage_out_of_range(p: float) -> None:
    with pytest.raises(UserError, match="selection_percentage"):
        target_rows(10, p)


@given(n=st.integers(1, 10**6), thousandths=st.integers(1, 1000))
def test_target_is_exact(n: int, thousandths: int) -> None:
    exact = (n * Fraction(thousandths, 1000) + Fraction(1, 2)).__floor__()
    assert target_rows(n, thousandths / 1000) == max(1, min(n, exact))


def test_filter_drops_the_worst_and_ties_by_id() -> None:
    scores = np.array([0.5, 0.1, 0.5, 0.9, 0.5])
    assert keep_best(scores, 0.4, 1).tolist() == [0, 2, 3]
    assert keep_best(scores, 0.0, 5).tolist() == [0, 1, 2, 3, 4]
    assert keep_best(scores, 0.39, 1).tolist() == [0, 2, 3, 4]


def test_filter_that_leaves_too_few_names_the_largest_drop() -> None:
    with pytest.raises(UserError, match=r"largest drop possible is 0\.6666"):
        keep_best(np.arange(9.0), 0.9, 3)
    assert len(keep_best(np.arange(9.0), 0.6666, 3)) >= 3


def test_spec7_39_nan_has_no_place_in_an_order() -> None:
    with pytest.raises(ValueError, match="NaN"):
        best_first(np.array([1.0, np.nan]))


def test_spec7_36_budget_below_the_clusters_takes_the_best() -> None:
    scores = RNG.permutation(40).astype(float)
    labels = np.arange(40) % 10
    ranks = rank_inside(labels, -scores)
    order = order_rows(labels, ranks, scores, "round_robin")
    tops = sorted((scores[labels == c].max() for c in range(10)), reverse=True)
    assert scores[order[:3]].tolist() == tops[:3]
    assert scores[order[:10]].tolist() == tops


def test_round_robin_takes_turns_until_clusters_are_exhausted() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    scores = np.array([9, 8, 7, 6, 5, 4, 3.0])
    order = order_rows(labels, rank_inside(labels, -scores), scores, "round_robin")
    assert order.tolist() == [0, 4, 5, 1, 6, 2, 3]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_proportional_is_sainte_lague_at_every_budget(sizes: list[int], data: st.DataObject) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    scores = np.zeros(len(labels))
    order = order_rows(labels, rank_inside(labels, -scores), scores, "proportional")
    target = data.draw(st.integers(0, len(labels)))
    seats = [0] * len(sizes)
    for _ in range(target):
        quotients = [
            Fraction(size, 2 * seat + 1) if seat < size else Fraction(-1)
            for size, seat in zip(sizes, seats, strict=True)
        ]
        seats[quotients.index(max(quotients))] += 1
    got = np.bincount(labels[order[:target]], minlength=len(sizes))
    assert sorted(got) == sorted(seats)
    assert all(abs(g - target * size / len(labels)) <= len(sizes) for g, size in zip(got, sizes, strict=True))


@given(
    n=st.integers(1, 60),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
    allocation=st.sampled_from(ALLOCATIONS),
    pick=st.sampled_from(PICKS),
)
def test_every_order_is_complete_without_duplicates(n: int, k: int, seed: int, allocation: str, pick: str) -> None:
    rng = np.random.default_rng(seed)
    labels, scores, distance = rng.integers(k, size=n), rng.integers(3, size=n) / 2, rng.random(n)
    ranks = rank_inside(labels, pick_key(pick, scores, distance, np.random.default_rng(seed)))
    order = order_rows(labels, ranks, scores, allocation)
    assert sorted(order) == list(range(n))
    for c in set(labels):
        assert ranks[order][labels[order] == c].tolist() == list(range((labels == c).sum()))
    again = rank_inside(labels, pick_key(pick, scores, distance, np.random.default_rng(seed)))
    assert (again == ranks).all()


def test_pick_inside_a_cluster() -> None:
    labels, scores, distance = np.zeros(3, np.int64), np.array([1.0, 3, 2]), np.array([0.3, 0.2, 0.1])
    rng = np.random.default_rng(0)
    assert rank_inside(labels, pick_key("best", scores, distance, rng)).tolist() == [2, 0, 1]
    assert rank_inside(labels, pick_key("centroid", scores, distance, rng)).tolist() == [2, 1, 0]
    with pytest.raises(UserError, match="known: best"):
        pick_key("worst", scores, distance, rng)
    with pytest.raises(UserError, match="known: round_robin"):
        order_rows(labels, labels, scores, "fair")


def test_budget_of_tokens() -> None:
    tokens, order = np.array([10, 20, 30, 40]), np.array([3, 0, 1, 2])
    assert take(order, None, tokens, 50).tolist() == [3, 0]
    assert take(order, None, tokens, 69).tolist() == [3, 0]
    assert take(order, None, tokens, 70).tolist() == [3, 0, 1]
    assert take(order, None, tokens, 1).tolist() == [3]
    assert take(order, None, tokens, 1000).tolist() == [3, 0, 1, 2]
    assert expected_rows(tokens, 50) == 2
    assert expected_rows(tokens, 1) == 1
    assert expected_rows(tokens, 500) == 4
    with pytest.raises(UserError, match="only 4"):
        take(order, 5, tokens, None)
