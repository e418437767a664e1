"""Routing by two processes of torchrun gives the bytes of one: `pytest tests/integration/test_route_torchrun.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.judges import TINY, judge_of, tokenizer_of, word_pool
from selectmoe import route
from selectmoe.config import load
from selectmoe.manifest import read_manifest
from selectmoe.route import RouteConfig


def test_two_processes_share_the_plan_and_give_the_same_bytes(tmp_path: Path) -> None:
    pool = word_pool(tmp_path / "pool", rows=80, datasets=2)
    judge = judge_of(tmp_path / "judge", tokenizer_of(tmp_path / "tokenizer", pool), TINY)
    values = {"selector_model": {"path": str(judge)}, "data": str(pool), "token_budget": 1024, "nll": True, "ifd": True}
    alone = read_manifest(route.run(load(RouteConfig, {**values, "threads": 1}, output_dir=str(tmp_path / "alone"))))
    words = [f"selector_model.path={judge}", f"data={pool}", "token_budget=1024", "nll=true", "ifd=true", "threads=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "selectmoe.cli", "route", *words, f"output_dir={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "two")
    two = read_manifest(tmp_path / "two")
    assert two.environment["processes"] == 2
    assert two.identity == alone.identity
    assert [f for f in two.files if f["result"]] == [f for f in alone.files if f["result"]]
    assert not (tmp_path / "two" / ".work").exists()
