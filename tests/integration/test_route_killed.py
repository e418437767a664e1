"""Routing under ten real `kill -9`: `pytest tests/integration/test_route_killed.py` (200: `make study-kill-route`)."""

from __future__ import annotations

from pathlib import Path

from bench import study_kill_route as study
from bench.judges import TINY, judge_of, tokenizer_of, word_pool

COMMIT = 0.3


def test_ten_kills_change_no_byte_and_cost_at_most_a_commit_interval_each(tmp_path: Path) -> None:
    pool = word_pool(tmp_path / "pool", rows=250, datasets=2)
    judge = judge_of(tmp_path / "judge", tokenizer_of(tmp_path / "tokenizer", pool), TINY)
    values = {"selector_model": {"path": str(judge)}, "data": str(pool), "token_budget": 1024, "nll": True}
    out = study.kill_often({**values, "threads": 1}, tmp_path / "runs", kills=10, seed=1, commit=COMMIT)
    assert sum(out.kills.values()) == 10
    assert len(out.kills) > 1, f"all kills fell into one phase: {out.kills}"
    assert out.same
    assert max(out.lost) <= COMMIT
