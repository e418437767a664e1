"""Merging shards: `pytest tests/unit/test_merge.py` (with real shards of a tiny judge: `test_route.py`)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectmoe import merge
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import Manifest, read_manifest, write_manifest
from selectmoe.merge import MergeConfig
from selectmoe.router_data import RouterData, read_router_data
from selectmoe.router_data_writing import write_router_data


def router_data(n: int, layers: int = 2, experts: int = 3) -> RouterData:
    rng = np.random.default_rng(0)
    gates = rng.random((4, n, layers)).astype(np.float32)
    return RouterData(
        dataset=[f"d{i % 3}" for i in range(n)],
        id=[f"r{i:03d}" for i in range(n)],
        tokens=rng.integers(10, 99, n),
        answer_tokens=rng.integers(1, 9, n),
        truncated=np.zeros(n, bool),
        nll=rng.random(n),
        nll_unconditional=np.full(n, np.nan),
        answer_bytes=rng.integers(1, 99, n),
        quality_score=gates[0],
        good_ratio=gates[1],
        quality_score_answer=gates[2],
        good_ratio_answer=gates[3],
        router_probs=rng.random((n, layers, experts)).astype(np.float32),
    )


def shard_of(
    output: Path, data: RouterData, index: int, count: int, *, planned: int, version: int = 1, **identity: Any
) -> Path:
    """A shard's output as `route` writes it: unsharded where there is one only."""
    (output / "router_data").mkdir(parents=True)
    write_router_data(output / "router_data", data)
    (output / "plan.json").write_text(json.dumps({"digest": "0", "rows": planned}))
    (output / "units.jsonl").write_text("")
    about: dict[str, Any] = {
        "stage": f"route-shard-{index}-of-{count}" if count > 1 else "route",
        "version": version,
        "config": {
            "identity": {"max_length": 128, **identity},
            "execution": {"output_dir": str(output), "shard": {"index": index, "count": count}},
        },
        "inputs": {"pool": {"uri": "somewhere", "identity": "f" * 64}},
        "environment": {"seconds": index},
        "created": "now",
    }
    parts = sorted(path.name for path in (output / "router_data").iterdir())
    for name in parts:
        (output / "router_data" / name / "plan.json").write_text(json.dumps({"digest": name}))
        rows = {"in": data.dataset.count(name), "out": data.dataset.count(name), "dropped": {}}
        write_manifest(output / "router_data" / name, **about, rows=rows)
    empty = 2 if index == 0 else 0
    rows = {"in": len(data) + empty, "out": len(data), "dropped": {"no_valid_token": empty} if empty else {}}
    folders = [f"router_data/{name}" for name in parts]
    write_manifest(output, **about, rows=rows, parts=folders, bookkeeping=["units.jsonl"])
    return output


def shards_of(root: Path, data: RouterData, count: int, **identity: Any) -> list[Path]:
    n = len(data)
    parts = [data.take(range(i, n, count)) for i in range(count)]
    return [shard_of(root / f"s{i}", part, i, count, planned=n, **identity) for i, part in enumerate(parts)]


def merged(shards: list[Path], output: Path) -> Path:
    return merge.run(load(MergeConfig, {"shards": [str(s) for s in shards], "output_dir": str(output)}))


def result(manifest: Manifest) -> list[Any]:
    return [f for f in manifest.files if f["result"]]


@given(st.sampled_from([1, 2, 3, 7]), st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_shards_in_any_order_is_the_unsharded_run(
    tmp_path_factory: pytest.TempPathFactory, count: int, n: int, rng: random.Random
) -> None:
    root = tmp_path_factory.mktemp("merge")
    data = router_data(n)
    [whole] = shards_of(root / "whole", data, 1)
    shards = shards_of(root, data, count)
    rng.shuffle(shards)
    output = merged(shards, root / "out")
    ours, theirs = read_manifest(output), read_manifest(whole)
    assert result(ours) == result(theirs)
    assert (ours.stage, ours.rows, ours.identity, ours.key) == ("route", theirs.rows, theirs.identity, theirs.key)
    assert sorted(read_router_data(output).keys) == sorted(data.keys)


def test_a_finished_merge_is_found_and_another_s_is_refused(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, router_data(20), 3)
    output = merged(shards, tmp_path / "out")
    before = read_manifest(output)
    assert merged(shards[::-1], tmp_path / "out") == output
    assert read_manifest(output) == before
    others = shards_of(tmp_path / "others", router_data(20), 2, nll=True)
    with pytest.raises(UserError, match="holds another run's output"):
        merged(others, tmp_path / "out")


def test_spec7_28_every_batch_is_there_exactly_once(tmp_path: Path) -> None:
    data = router_data(20)
    a, b, c = shards_of(tmp_path, data, 3)
    with pytest.raises(UserError, match=r"shard 1 of 3 is missing: shards= must name all 3"):
        merged([c, a], tmp_path / "out")
    with pytest.raises(UserError, match=r"shard 1 of 3 is there twice"):
        merged([a, b, b, c], tmp_path / "out")
    short = shard_of(tmp_path / "short", data.take([2, 5]), 2, 3, planned=20)
    with pytest.raises(UserError, match=r"the shards hold 16 rows, but their plan has 20"):
        merged([a, b, short], tmp_path / "out")
    again = shard_of(tmp_path / "again", data.take(range(0, 20, 3)), 2, 3, planned=20)
    with pytest.raises(UserError, match=r"row 'r000' of dataset 'd0' is in two shards"):
        merged([a, b, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_different_runs_are_not_mixed(tmp_path: Path) -> None:
    data = router_data(20)
    a, _b = shards_of(tmp_path, data, 2)
    part = data.take(range(1, 20, 2))
    longer = shard_of(tmp_path / "longer", part, 1, 2, planned=20, nll=True)
    with pytest.raises(UserError, match=r"longer and .*s0 are shards of different runs: nll is True in one, None in"):
        merged([a, longer], tmp_path / "out")
    newer = shard_of(tmp_path / "newer", part, 1, 2, planned=20, version=2)
    with pytest.raises(UserError, match="different runs: version is 2"):
        merged([a, newer], tmp_path / "out")
    third = shard_of(tmp_path / "third", part, 1, 3, planned=20)
    with pytest.raises(UserError, match=r"different runs: shard\.count is 3"):
        merged([a, third], tmp_path / "out")
    replanned = shard_of(tmp_path / "replanned", part, 1, 2, planned=21)
    with pytest.raises(UserError, match="different runs: plan is"):
        merged([a, replanned], tmp_path / "out")


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards=.* is empty"):
        load(MergeConfig, {"shards": [], "output_dir": str(tmp_path / "out")})
    with pytest.raises(UserError, match=r"shards= is missing"):
        load(MergeConfig, {"output_dir": str(tmp_path / "out")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no manifest\.json"):
        merged([tmp_path / "empty"], tmp_path / "out")
    a, b = shards_of(tmp_path, router_data(9), 2)
    file = b / "router_data" / "d1" / "00000.parquet"
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(UserError, match=r"d1/00000\.parquet does not have the bytes"):
        merged([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()
