"""`baseline`: one folder per arm, each what `select` gives. Run: pytest tests/unit/test_baseline.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selectmoe import baseline, select
from selectmoe.baseline import BaselineConfig
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import find_manifests, read_manifest
from selectmoe.select import SelectConfig
from selectmoe.selection import arm_directory, read_selected


@pytest.fixture
def world(routed_world: dict[str, str]) -> dict[str, str]:
    return routed_world


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


def test_settings_of_an_arm_are_those_of_select(world: dict[str, str], tmp_path: Path) -> None:
    arm = "kmeans-nll+drop-0.25+layers-1+allocation-proportional+k-4"
    out = go(world, arms=[arm, "top+budget-5"], selection_rows=9)
    settings = {"score": "nll", "filter": {"drop": 0.25}, "layers": [1], "allocation": "proportional"}
    nested = {"output_dir": str(tmp_path / "one"), "threads": 1, "selection_rows": 9, **world, **settings}
    single = select.run(load(SelectConfig, nested | {"clustering_params": {"k": 4}}))
    assert read_manifest(single).identity == read_manifest(out / arm).identity
    assert arm_directory(out, arm, 3) == out / arm
    assert len(read_selected(out / "top+budget-5")) == 5


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("kmeans+dorp-0.2", "no setting 'dorp'; known: k, drop"),
        ("kmeans+drop-much", "drop-much is no value of drop"),
        ("kmeans+layers-", "layers- is no value of layers"),
        ("kmeans+k-4", "no effect under allocation coverage"),
        ("top+layers-0", "layers has no effect with method=top"),
        ("kmeans+layers-7", "the router data has layers 0 to 1"),
        ("kmeans+budget-2.5", "budget=2.5"),
        ("selected+drop-0.1", "is unknown"),
    ],
)
def test_settings_that_are_wrong(world: dict[str, str], arm: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        go(world, arms=[arm])
