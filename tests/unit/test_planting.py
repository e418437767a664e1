"""Corrupted copies of a dataset's own rows. Run: pytest tests/unit/test_planting.py"""

from __future__ import annotations

import pytest

from selectmoe.corruption import CORRUPTIONS
from selectmoe.errors import UserError
from selectmoe.planting import held, plant
from selectmoe.pool import Row, content_hash, content_id
from selectmoe.table import HASHES


def rows(n: int) -> list[Row]:
    made = []
    for i in range(n):
        messages = [
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": f"{i} rain cloud river {i * 7}"},
        ]
        made.append(Row("x", content_id("x", messages), messages))
    return made


def test_no_copy_has_a_content_of_the_holdout() -> None:
    below = HASHES // 2
    copies, kinds = plant(rows(60), 0.5, list(CORRUPTIONS), "seed", below)
    assert len(copies) == len(kinds) == 60
    assert all(held(content_hash(copy.messages)) >= below for copy in copies)
    free, _ = plant(rows(60), 0.5, list(CORRUPTIONS), "seed")
    assert any(held(content_hash(copy.messages)) < below for copy in free)


def test_a_small_dataset_gets_its_share() -> None:
    for n in range(2, 12):
        copies, kinds = plant(rows(n), 0.4, list(CORRUPTIONS), "seed")
        assert len(copies) == round(0.4 * n / 0.6)
        assert kinds == (list(CORRUPTIONS) * 3)[: len(copies)]
    assert plant(rows(1), 0.3, list(CORRUPTIONS), "seed") == ([], [])
    with pytest.raises(UserError, match=r"plant.share=0.5 needs 1 copies \(swapped\) in x; its rows give 0"):
        plant(rows(1), 0.5, ["swapped"], "seed")
