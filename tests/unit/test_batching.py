"""The batch plan: `pytest tests/unit/test_batching.py`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe.batching import BUSY_TOKENS, PADDING, UNIT_BATCHES, Plan, cut, make_plan, share, units

Lengths = st.lists(st.integers(0, 300), max_size=60)


def workload(rows: int) -> np.ndarray:
    """The lengths of the benchmarks."""
    return np.clip(np.exp(np.random.default_rng(0).normal(4.6, 0.8, rows)), 8, 1024).astype(int)


def plan(name: str, lengths: list[int], second_pass: list[int] | None = None) -> Plan:
    return make_plan(name, lengths, 500, second_pass=second_pass)


@given(Lengths, st.integers(300, 3000), st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=60, deadline=None)
def test_every_row_with_a_token_is_in_exactly_one_batch_within_budget(
    lengths: list[int], budget: int, batch_size: int | None
) -> None:
    found = make_plan("d", lengths, budget, batch_size)
    batches = [found.rows(b).tolist() for b in range(len(found.starts) - 1)]
    assert sorted(i for rows in batches for i in rows) == [i for i, n in enumerate(lengths) if n]
    assert found.padded.tolist() == [len(rows) * max(lengths[i] for i in rows) for rows in batches]
    assert all(size <= budget for size in found.padded)
    assert batch_size is None or all(len(rows) <= batch_size for rows in batches)
    keys = [(-lengths[i], i) for i in found.order]
    assert keys == sorted(keys)


@given(Lengths)
@settings(max_examples=60, deadline=None)
def test_hardly_anything_that_is_computed_is_padding(lengths: list[int]) -> None:
    found = make_plan("d", lengths, 16_384)
    assert found.padded.sum() <= (1 + PADDING) * sum(lengths)


@pytest.mark.parametrize("rows", [60, 300, 5_000, 20_000])
def test_padding_is_at_most_two_per_cent_and_batches_are_no_smaller_than_they_must_be(rows: int) -> None:
    lengths = workload(rows)
    found = make_plan("d", lengths, 16_384)
    assert found.padded.sum() <= 1.02 * lengths.sum()
    fewest = -(-lengths.sum() // 16_384)
    assert len(found.starts) - 1 <= fewest + {60: 20, 300: 60, 5_000: 60, 20_000: 120}[rows]


def test_the_cheapest_cut_is_taken() -> None:
    lengths = sorted([90, 90, 89, 40, 39, 38, 38, 5], reverse=True)
    assert cut(lengths, 10_000).tolist() == [0, 3, 7, 8]  # fewer batches would pad more than 2 % of 429 tokens
    assert cut([50, 20, 20], 40).tolist() == [0, 1, 3]  # a row longer than the budget is alone
    assert cut([], 40).tolist() == [0]


@given(Lengths, Lengths)
@settings(max_examples=60, deadline=None)
def test_shards_share_the_plan_and_begin_with_their_largest_batch(a: list[int], b: list[int]) -> None:
    for twice in (False, True):
        plans = [plan("a", a, a if twice else None), plan("b", b, b if twice else None)]
        whole = list(units(plans))
        assert [unit.number for unit in whole] == list(range(len(whole)))
        for count in (1, 2, 3, 7, len(whole) + 2):
            shards = [share(plans, index, count) for index in range(count)]
            assert sorted(u.number for shard in shards for u in shard) == [u.number for u in whole]
            for shard in filter(None, shards):
                sizes = [max(u.plan.padded[u.batches.start : u.batches.stop]) for u in shard]
                assert sizes[0] == max(sizes)


def test_units_hold_the_rows_of_their_batches() -> None:
    one = plan("a", [7, 0, 9, 9, 3, 200, 150, 1])
    rows = [row for unit in units([one]) for row in unit.rows.tolist()]
    assert rows == one.order.tolist()


def test_a_unit_gives_the_second_pass_enough_tokens() -> None:
    lengths = [400, 300, 200, 100, 50]  # every row is a batch by itself: none is within 2 % of another
    each = plan("a", lengths)
    assert np.diff(each.starts).tolist() == [1] * 5
    assert each.unit_starts.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan("a", lengths, [BUSY_TOKENS, 1, BUSY_TOKENS, 1, 1]).unit_starts.tolist() == [0, 1, 3, 5]
    many = plan("a", [400 - 20 * i for i in range(9)], [0] * 9)
    assert np.diff(many.unit_starts).tolist() == [UNIT_BATCHES, UNIT_BATCHES, 1]
