"""`selectmoe.report_composition`: pytest tests/unit/test_report_composition.py"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from selectmoe.pool import Row
from selectmoe.report_composition import composition, planted_share
from selectmoe.report_data import Findings
from selectmoe.selection import Selected

KEYS = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("b", "3")]


def findings() -> Findings:
    """Five rows in two clusters, the last one in none; a draw of random per seed."""
    rows = {key: Row(*key, [{"role": "user", "content": "x"}]) for key in KEYS}

    def some(*places: int) -> list[Selected]:
        return [Selected(rows[KEYS[i]], {}, None, None) for i in places]

    found: Any = SimpleNamespace(
        rows=rows,
        planted={KEYS[4]: "shuffled"},
        selections={"nll": some(0), "random-0": some(0, 4), "random-1": some(4), "selected": some(1, 2)},
        arms={"nll": "nll", "random-0": "random", "random-1": "random", "selected": "selected"},
        clusters={"dataset": [d for d, _ in KEYS[:4]], "id": [i for _, i in KEYS[:4]], "cluster": [1, 1, 1, 0]},
    )
    return cast(Findings, found)


def test_every_row_of_pool_and_arms_counts_once_by_source_by_cluster_and_by_both() -> None:
    composed = composition(findings())
    assert list(composed["rows"].items()) == [("pool", 5), ("selected", 2), ("random", 3), ("nll", 1)]
    assert composed["sources"][0] == {"name": "b", "pool": 3, "arms": {"selected": 1, "random": 2}}
    assert [(c["name"], c["pool"]) for c in composed["clusters"]] == [(1, 3), (None, 1), (0, 1)]
    assert composed["clusters"][0]["arms"] == {"selected": 2, "random": 1, "nll": 1}
    assert composed["cells"][0] == {
        "cluster": 1,
        "source": "a",
        "pool": 2,
        "arms": {"selected": 1, "random": 1, "nll": 1},
    }
    for part in ("sources", "clusters", "cells"):
        assert sum(e["pool"] for e in composed[part]) == 5
        assert sum(e["arms"].get("random", 0) for e in composed[part]) == 3


def test_planted_share_is_over_all_draws_of_an_arm() -> None:
    assert planted_share(findings()) == {"pool": 1 / 5, "selected": 0, "random": 2 / 3, "nll": 0}
