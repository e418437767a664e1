"""The batch plan: `pytest tests/unit/test_batching.py`."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe.batching import BUSY_TOKENS, UNIT_BATCHES, Batch, cut, plan_batches, plan_digest, share, units

Lengths = st.lists(st.integers(0, 300), max_size=60)


def keys_of(n: int) -> list[tuple[str, str]]:
    return [(f"d{i % 3}", f"r{i:03d}") for i in range(n)]


@given(Lengths, st.integers(300, 3000), st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=60, deadline=None)
def test_every_row_with_a_token_is_in_exactly_one_batch_within_budget(
    lengths: list[int], budget: int, batch_size: int | None
) -> None:
    plan = plan_batches(keys_of(len(lengths)), lengths, budget, batch_size)
    planned = [i for batch in plan for i in batch.rows]
    assert sorted(planned) == [i for i, n in enumerate(lengths) if n]
    for batch in plan:
        assert batch.padded <= budget
        assert batch.length == max(lengths[i] for i in batch.rows)
        assert batch_size is None or len(batch.rows) <= batch_size
        assert {f"d{i % 3}" for i in batch.rows} == {batch.dataset}


def test_the_plan_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = random.Random(0)
    rows = [(key, rng.randint(1, 50)) for key in keys_of(100)]
    digests = set()
    for _ in range(3):
        rng.shuffle(rows)
        keys = [key for key, _ in rows]
        digests.add(plan_digest(keys, plan_batches(keys, [n for _, n in rows], 200)))
    assert len(digests) == 1
    keys = [key for key, _ in rows]
    assert plan_digest(keys, plan_batches(keys, [n for _, n in rows], 400)) not in digests


def test_a_dataset_s_batches_do_not_depend_on_other_datasets() -> None:
    keys, lengths = keys_of(90), [10 + i % 40 for i in range(90)]
    alone = [i for i, key in enumerate(keys) if key[0] == "d1"]
    few = [keys[i] for i in alone]
    whole = [[keys[i] for i in b.rows] for b in plan_batches(keys, lengths, 300) if b.dataset == "d1"]
    part = [[few[i] for i in b.rows] for b in plan_batches(few, [lengths[i] for i in alone], 300)]
    assert whole == part


@given(Lengths)
@settings(max_examples=60, deadline=None)
def test_shards_share_the_plan_and_begin_with_their_largest_batch(lengths: list[int]) -> None:
    plan = plan_batches(keys_of(len(lengths)), lengths, 500)
    for pieces in (units(plan), units(plan, lengths)):
        for count in (1, 2, 3, 7, len(plan) + 2):
            shards = [share(pieces, index, count) for index in range(count)]
            taken = [unit for shard in shards for unit in shard]
            assert sorted(taken, key=lambda unit: unit[0].rows) == sorted(pieces, key=lambda unit: unit[0].rows)
            for shard in filter(None, shards):
                assert max(b.padded for b in shard[0]) == max(b.padded for unit in shard for b in unit)


def test_a_unit_gives_the_second_pass_enough_tokens() -> None:
    plan = [Batch("a", (0,), 9), Batch("a", (1,), 9), Batch("a", (2,), 9), Batch("b", (3,), 9), Batch("b", (4,), 9)]
    assert units(plan) == [(batch,) for batch in plan]
    assert units(plan, [BUSY_TOKENS, 1, BUSY_TOKENS, 1, 1]) == [(plan[0],), (plan[1], plan[2]), (plan[3], plan[4])]
    assert [len(unit) for unit in units(plan[:1] * 9, [0])] == [UNIT_BATCHES, UNIT_BATCHES, 1]


def test_little_of_what_is_computed_is_padding() -> None:
    """The workload `lengths`: even a dataset of 100 rows, which would fit into two batches, wastes at most a tenth."""
    rng = np.random.default_rng(0)
    for n, bound in ((100, 1.1), (1000, 1.06), (20_000, 1.02)):
        lengths = np.sort(np.clip(np.exp(rng.normal(4.6, 0.8, n)), 8, 1024).astype(int))[::-1].tolist()
        padded = sum(len(part) * lengths[part.start] for part in cut(lengths, 16_384))
        assert padded / sum(lengths) <= bound


def test_a_row_longer_than_the_budget_gets_a_batch_to_itself() -> None:
    assert [list(part) for part in cut([50, 20, 20], 40)] == [[0], [1, 2]]
