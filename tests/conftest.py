"""What unit and integration tests share: a pool on disk with its router data, made without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe.manifest import write_manifest
from selectmoe.pool import Row, write_pool
from selectmoe.router_data import RouterData, write_router_data


def finish(directory: Path, name: str) -> None:
    """Give a folder the manifest of a finished output."""
    rows = {"in": 0, "out": 0, "dropped": {}}
    roles: dict[str, Any] = {"identity": {}, "execution": {}}
    write_manifest(directory, stage=name, version=1, config=roles, inputs={}, rows=rows, environment={}, created="")


@pytest.fixture
def routed_world(tmp_path: Path) -> dict[str, str]:
    """Sixty rows in a pool and their router data; every third row is planted."""
    n, rng = 60, np.random.default_rng(0)
    keys = sorted((f"d{i % 3}", f"r{i:02d}") for i in range(n))
    ratio = rng.random((n, 2)).astype(np.float32)
    data = RouterData(
        dataset=[key[0] for key in keys],
        id=[key[1] for key in keys],
        tokens=rng.integers(20, 60, size=n),
        answer_tokens=rng.integers(5, 20, size=n),
        truncated=np.zeros(n, bool),
        nll=rng.random(n) + 1,
        nll_unconditional=rng.random(n) + 2,
        answer_bytes=rng.integers(20, 80, size=n),
        quality_score=np.log(ratio / (1 - ratio)),
        good_ratio=ratio,
        quality_score_answer=np.log(ratio / (1 - ratio)),
        good_ratio_answer=ratio,
        router_probs=rng.dirichlet(np.ones(4), size=(n, 2)).astype(np.float32),
    )
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "pool", [Row(d, i, [{"role": "assistant", "content": d + i}]) for d, i in keys])
    finish(tmp_path / "pool", "ingest")
    (tmp_path / "router").mkdir()
    write_router_data(tmp_path / "router", data)
    finish(tmp_path / "router", "route")
    lines = [json.dumps({"dataset": d, "id": i, "kind": "swapped"}) + "\n" for d, i in keys[::3]]
    (tmp_path / "planted.jsonl").write_text("".join(lines))
    return {"router_data_dir": str(tmp_path / "router"), "data": str(tmp_path / "pool")}
