"""`baseline`: one folder per arm, each what `select` gives. Run: pytest tests/unit/test_baseline.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe import baseline, select
from selectmoe.baseline import BaselineConfig
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import find_manifests, read_manifest, write_manifest
from selectmoe.pool import Row, write_pool
from selectmoe.router_data import RouterData, write_router_data
from selectmoe.select import SelectConfig
from selectmoe.selection import arm_directory, read_selected


def finish(directory: Path, name: str) -> None:
    """Give a folder the manifest of a finished output."""
    rows = {"in": 0, "out": 0, "dropped": {}}
    roles: dict[str, Any] = {"identity": {}, "execution": {}}
    write_manifest(directory, stage=name, version=1, config=roles, inputs={}, rows=rows, environment={}, created="")


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
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


def go(world: dict[str, str], **settings: Any) -> Path:
    root = Path(world["data"]).parent
    return baseline.run(load(BaselineConfig, {"output_dir": str(root / "arms"), "threads": 1, **world, **settings}))


def test_arms_and_seeds_have_folders_that_select_would_have_written(world: dict[str, str], tmp_path: Path) -> None:
    arms = ["legacy", "random", "balanced_random", "nll", "oracle", "top-ifd", "router_only", "length"]
    planted = str(tmp_path / "planted.jsonl")
    params = {"k_range": [2, 5], "restarts": 2}
    out = go(world, arms=arms, seeds=[0, 1], selection_rows=9, planted=planted, clustering_params=params)
    folders = {
        *("legacy", "nll", "top-ifd", "router_only", "length"),
        *(f"{arm}-{seed}" for arm in ("random", "balanced_random", "oracle") for seed in (0, 1)),
    }
    assert {path.parent.name for path in out.glob("*/selected_data.jsonl")} == folders
    assert set(json.loads((out / "arms.json").read_text())) == folders
    assert [m.stage for _, m in find_manifests(out)].count("select") == len(folders)
    alone: list[tuple[str, dict[str, Any]]] = [
        ("legacy", {"picking": "legacy", "score": "legacy", "clustering_params": params}),
        ("nll", {"method": "top", "score": "nll"}),
        ("random-1", {"method": "random", "seed": 1}),
        ("oracle-0", {"method": "oracle", "seed": 0, "planted": planted}),
    ]
    for folder, settings in alone:
        nested = {"output_dir": str(tmp_path / folder), "threads": 1, "selection_rows": 9, **world, **settings}
        single = select.run(load(SelectConfig, nested))
        assert read_manifest(single).identity == read_manifest(out / folder).identity
        for file in ("selected_data.jsonl", "clusters.parquet", "selection_config.yaml"):
            assert (single / file).read_bytes() == (out / folder / file).read_bytes()
    assert len(read_selected(arm_directory(out, "random", 1))) == 9
    assert arm_directory(out, "legacy", 1) == out / "legacy"


def test_identity_covers_the_arms_and_a_finished_output_is_found(world: dict[str, str]) -> None:
    out = go(world, arms=["random", "nll"], seeds=[3])
    manifest = read_manifest(out)
    assert [f["path"] for f in manifest.files] == ["arms.json"]
    assert manifest.rows["in"] == 120
    assert manifest.rows["out"] == 6
    assert go(world, arms=["random", "nll"], seeds=[3]) == out
    with pytest.raises(UserError, match="another run's output"):
        go(world, arms=["random", "nll"], seeds=[4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ["rnd"]}, "arm 'rnd' is unknown"),
        ({"arms": []}, "arms="),
        ({"arms": ["nll", "nll"]}, "each once"),
        ({"seeds": []}, "seeds="),
        ({"arms": ["oracle"]}, "belong together"),
        ({"planted": "x"}, "belong together"),
        ({"clustering_params": {"k": 3}}, "none of the arms clusters"),
        ({"arms": ["selected"], "clustering_params": {"k": 3}}, "no effect under allocation coverage"),
        ({"arms": ["legacy"], "clustering_params": {"k": 0}}, "k=0"),
        ({"selection_percentage": 0}, "selection_percentage"),
        ({"selection_rows": 61}, "only 60 candidates"),
    ],
)
def test_bad_settings_leave_nothing(world: dict[str, str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        go(world, **settings)
    assert not (Path(world["data"]).parent / "arms").exists()
