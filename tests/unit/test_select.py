"""`select`: every method, its budget, joins, outputs and refusals. Run: pytest tests/unit/test_select.py"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe import select
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.kmeans import Rows
from selectmoe.manifest import read_manifest
from selectmoe.pool import Row
from selectmoe.router_data import RouterData
from selectmoe.select import SelectConfig
from selectmoe.selection import Selected, arm_directory, read_selected
from tests.pools import make_pool, make_router_data

N = 120


def router(n: int = N, seed: int = 0) -> RouterData:
    """n routed rows of three sources in four clusters; sorted by (dataset, id)."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(4, size=n)
    logits = rng.normal(size=(4, 2, 5))[cluster] * 2 + 0.1 * rng.normal(size=(n, 2, 5))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    quality = rng.normal(size=(n, 2)).astype(np.float32)
    ratio = (1 / (1 + np.exp(-quality))).astype(np.float32)
    keys = sorted((f"d{i % 3}", f"r{i:04d}") for i in range(n))
    return RouterData(
        dataset=[key[0] for key in keys],
        id=[key[1] for key in keys],
        tokens=rng.integers(20, 60, size=n),
        answer_tokens=rng.integers(5, 20, size=n),
        truncated=np.zeros(n, bool),
        nll=rng.random(n) + 1,
        nll_unconditional=rng.random(n) + 2,
        answer_bytes=rng.integers(20, 80, size=n),
        quality_score=quality,
        good_ratio=ratio,
        quality_score_answer=quality,
        good_ratio_answer=ratio,
        router_probs=probs.astype(np.float32),
    )


def talk(key: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {key[1]}"}, {"role": "assistant", "content": f"answer {key}"}]


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """A pool with ten rows more than were routed, router data, and planted rows."""
    return write_world(tmp_path, router())


def write_world(root: Path, data: RouterData) -> dict[str, str]:
    keys = list(zip(data.dataset, data.id, strict=True)) + [("d0", f"unrouted{i}") for i in range(10)]
    make_pool(root / "pool", [Row(d, i, talk((d, i))) for d, i in keys])
    make_router_data(root / "router", data)
    planted = [{"dataset": d, "id": i, "kind": "swapped"} for d, i in keys[: len(data.id) : 3]]
    (root / "planted.jsonl").write_text("".join(json.dumps(p) + "\n" for p in planted))
    return {"router_data_dir": str(root / "router"), "data": str(root / "pool")}


def go(world: dict[str, str], name: str = "out", **settings: Any) -> Path:
    root = Path(world["data"]).parent
    if settings.get("method") == "oracle":
        settings["planted"] = str(root / "planted.jsonl")
    nested: dict[str, Any] = {"output_dir": str(root / name), "threads": 1, **world}
    for key, value in settings.items():
        first, dot, last = key.partition("__")
        if dot:
            nested.setdefault(first, {})[last] = value
        else:
            nested[key] = value
    return select.run(load(SelectConfig, nested))


def keys_of(path: Path) -> list[tuple[str, str]]:
    return [(s.row.dataset, s.row.id) for s in read_selected(path)]


METHODS: list[dict[str, Any]] = [
    {"method": "kmeans"},
    {"method": "kmeans", "score": "ifd", "allocation": "proportional", "pick": "random", "filter__drop": 0.1},
    {"method": "kmeans", "picking": "legacy", "clustering_params__k_range": [2, 8]},
    {"method": "kmeans", "picking": "legacy", "score": "legacy", "clustering_params__k": 4},
    {"method": "top", "score": "nll"},
    {"method": "random"},
    {"method": "balanced_random"},
    {"method": "length"},
    {"method": "router_only"},
    {"method": "router_only", "picking": "legacy", "clustering_params__k": 5},
    {"method": "oracle"},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_method_gives_exactly_the_rows_wanted_and_the_same_bytes_again(
    world: dict[str, str], settings: dict[str, Any]
) -> None:
    out = go(world, "a", selection_percentage=0.104, **settings)  # 12.48 of 120
    picked = read_selected(out)
    assert len(picked) == len(set(keys_of(out))) == 12
    assert all(s.row.messages == talk((s.row.dataset, s.row.id)) for s in picked)  # (26): every row with its own text
    assert all(settings.get("score", "answer") in s.scores for s in picked)
    again = go(world, "b", selection_percentage=0.104, **settings)
    for file in ("selected_data.jsonl", "clusters.parquet", "selection_config.yaml"):
        assert (out / file).read_bytes() == (again / file).read_bytes()
    assert read_manifest(out).identity == read_manifest(again).identity
    rows = read_manifest(out).rows
    assert rows["in"] == N
    assert rows["out"] == 12
    clustered = settings["method"] in ("kmeans", "router_only")
    assert all((s.cluster is not None) == (s.rank is not None) == clustered for s in picked)


def test_coverage_takes_one_row_of_each_cluster_after_the_filter(world: dict[str, str]) -> None:
    out = go(world, selection_rows=15)
    picked = read_selected(out)
    assert len({s.cluster for s in picked}) == 15
    assert {s.rank for s in picked} == {1}
    scores = [s.scores["answer"] for s in picked]
    assert scores == sorted(scores, reverse=True)
    table = pq.read_table(out / "clusters.parquet").to_pylist()
    clustered = [r for r in table if r["cluster"] is not None]
    assert len(table) == N
    assert len(clustered) == 84
    assert min(r["score"] for r in clustered) >= max(r["score"] for r in table if r["cluster"] is None)
    for s in picked:
        mates = [r for r in clustered if r["cluster"] == s.cluster]
        nearest = min(mates, key=lambda r: r["distance"])
        assert (nearest["dataset"], nearest["id"]) == (s.row.dataset, s.row.id)
    ranked = sorted((r for r in table if r["selected_rank"]), key=lambda r: r["selected_rank"])
    assert [(r["dataset"], r["id"]) for r in ranked] == keys_of(out)
    assert all(r["x"] is not None and r["y"] is not None for r in table)
    assert read_manifest(out).rows["dropped"] == {"filtered": 36, "not_selected": 69}


def test_top_takes_the_best_and_length_the_longest(world: dict[str, str]) -> None:
    data = router()
    order = np.argsort(data.nll, kind="stable")[:10]
    assert keys_of(go(world, "a", method="top", score="nll", selection_rows=10)) == [
        (data.dataset[i], data.id[i]) for i in order
    ]
    order = np.argsort(-data.answer_tokens, kind="stable")[:10]
    assert keys_of(go(world, "b", method="length", selection_rows=10)) == [(data.dataset[i], data.id[i]) for i in order]


def test_draws_depend_on_the_seed_and_oracle_avoids_planted(world: dict[str, str]) -> None:
    samples = [keys_of(go(world, f"r{seed}", method="random", seed=seed, selection_rows=20)) for seed in range(3)]
    assert len({tuple(s) for s in samples}) == 3
    planted = {(r["dataset"], r["id"]) for r in map(json.loads, (Path(world["data"]).parent / "planted.jsonl").open())}
    out = go(world, "o", method="oracle", selection_rows=80)
    assert not planted & set(keys_of(out))
    assert read_manifest(out).rows["dropped"] == {"planted": 40}
    assert planted & set(samples[0])
    with pytest.raises(UserError, match="only 80"):
        go(world, "p", method="oracle", selection_rows=81)
    counts = Counter(d for d, _ in keys_of(go(world, "b", method="balanced_random", selection_rows=31)))
    assert max(counts.values()) - min(counts.values()) == 1


def test_budget_of_answer_tokens(world: dict[str, str]) -> None:
    data = router()
    tokens = dict(zip(zip(data.dataset, data.id, strict=True), data.answer_tokens, strict=True))
    for method in ("kmeans", "random", "top"):
        spent = sum(tokens[key] for key in keys_of(go(world, method, method=method, selection_tokens=300)))
        assert 280 < spent <= 300


def test_settings_are_kept_where_a_safe_loader_finds_them(world: dict[str, str]) -> None:
    out = go(
        world, picking="legacy", clustering_params__k_range=[2, 7], clustering_params__criterion="calinski_harabasz"
    )
    groups = yaml.safe_load((out / "selection_config.yaml").read_text())
    assert list(groups) == [
        "selection_metadata",
        "selection_parameters",
        "clustering_parameters",
        "paths",
        "device_configuration",
    ]
    assert groups["clustering_parameters"]["k"] == 4
    assert [p["k"] for p in groups["clustering_parameters"]["curve"]] == [2, 3, 4, 5, 6, 7]
    assert groups["selection_parameters"]["picking"] == {
        "name": "legacy",
        "drop": 0.0,
        "allocation": "round_robin",
        "pick": "best",
    }
    bookkeeping = [f["path"] for f in read_manifest(out).files if not f["result"]]
    assert bookkeeping == ["selection_config.yaml"]


def test_spec7_35_39_rows_without_features_or_score_are_dropped_with_a_reason(tmp_path: Path) -> None:
    data = router()
    data.router_probs[3] = np.nan
    data.router_probs[4] = 0
    data.good_ratio_answer[5] = np.nan
    world = write_world(tmp_path, data)
    out = go(world, selection_percentage=1, filter__drop=0.0)
    assert read_manifest(out).rows["dropped"] == {"no_features": 2, "no_score": 1}
    assert not {(data.dataset[i], data.id[i]) for i in (3, 4, 5)} & set(keys_of(out))
    table = pq.read_table(out / "clusters.parquet").to_pylist()
    assert table[5]["score"] is None
    assert table[3]["x"] is None
    data.good_ratio_answer[:] = np.nan
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none of 120 rows has a score"):
        go(write_world(tmp_path / "none", data))


def test_spec7_27_28_rows_that_are_not_in_the_pool_or_twice(tmp_path: Path) -> None:
    data = router(20)
    world = write_world(tmp_path, data)
    make_pool(tmp_path / "small", [Row(d, i, talk((d, i))) for d, i in data.keys[15:]])
    with pytest.raises(UserError, match=r"15 of 20 routed rows are not in the pool \(d0/r0000, (\S+ ){8}d1/\S+\)"):
        go(world | {"data": str(tmp_path / "small")})
    assert not (tmp_path / "out").exists()
    data.id[1], data.dataset[1] = data.id[0], data.dataset[0]
    with pytest.raises(UserError, match="d0/r0000 is in the router data twice"):
        select.join(data, [Row(d, i, talk((d, i))) for d, i in zip(data.dataset, data.id, strict=True)])


def test_spec7_40_order_of_datasets_does_not_matter(tmp_path: Path) -> None:
    data = router(60)
    outs = []
    for n, flip in enumerate((1, -1)):
        (tmp_path / str(n)).mkdir()
        turned = dataclasses.replace(data, **{f.name: getattr(data, f.name)[::flip] for f in dataclasses.fields(data)})
        outs.append(go(write_world(tmp_path / str(n), turned), selection_rows=9))
    for file in ("selected_data.jsonl", "clusters.parquet"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()


def test_spec7_42_finished_output_is_found_and_another_is_refused(world: dict[str, str]) -> None:
    out = go(world)
    before = (out / "manifest.json").read_bytes()
    assert go(world, threads=2) == out
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="another run's output"):
        go(world, seed=1)
    assert sorted(p.name for p in out.iterdir()) == [
        "clusters.parquet",
        "manifest.json",
        "selected_data.jsonl",
        "selection_config.yaml",
    ]
    assert arm_directory(out, "selected", 5) == out
    with pytest.raises(UserError, match="not a selection of arm legacy"):
        arm_directory(out, "legacy", 5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"selection_percentage": 0}, "selection_percentage"),
    ({"selection_percentage": 1.5}, "selection_percentage"),
    ({"selection_percentage": float("nan")}, "selection_percentage"),
    ({"selection_rows": 0}, "selection_rows"),
    ({"selection_rows": 121}, "only 120 candidates"),
    ({"selection_rows": 5, "selection_tokens": 5}, "give one of"),
    ({"selection_rows": 5, "selection_percentage": 0.1}, "give one of"),
    ({"selection_percentage": 0.9}, "largest drop possible is 0.1"),
    ({"filter__drop": 1.0}, "filter.drop"),
    ({"filter__drop": -0.1}, "filter.drop"),
    ({"method": "hdbscan"}, "known: kmeans"),
    ({"score": "loss"}, "known: answer"),
    ({"picking": "mine"}, "known: coverage"),
    ({"allocation": "mine"}, "known: round_robin"),
    ({"pick": "mine"}, "known: best"),
    ({"clustering_params__k": 5}, "k has no effect under allocation coverage"),
    ({"clustering_params__auto_k": True}, "auto_k has no effect under allocation coverage"),
    ({"clustering_params__k_range": [2, 9]}, "k_range has no effect under allocation coverage"),
    ({"clustering_params__criterion": "elbow"}, "criterion has no effect under allocation coverage"),
    ({"clustering_params__restarts": 0}, "at least 1"),
    ({"picking": "legacy", "clustering_params__k": 0}, "k=0"),
    ({"picking": "legacy", "clustering_params__k": 121}, "between 1 and"),
    ({"picking": "legacy", "clustering_params__k": 5, "clustering_params__auto_k": True}, "not both"),
    ({"picking": "legacy", "clustering_params__auto_k": False}, "needs clustering_params.k"),
    ({"picking": "legacy", "clustering_params__k_range": [9, 2]}, "k_range"),
    ({"picking": "legacy", "clustering_params__k_range": [200, 300]}, "k_range"),
    ({"method": "random", "picking": "legacy"}, "picking has no effect with method=random"),
    ({"method": "top", "filter__drop": 0.1}, "filter.drop has no effect with method=top"),
    ({"method": "length", "clustering_params__k": 5}, "clustering_params has no effect"),
    ({"method": "router_only", "pick": "best"}, "pick=best has no effect"),
    ({"method": "random", "planted": "x"}, "oracle only"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: str(x)[:60])
def test_bad_settings_get_one_line_and_leave_nothing(
    world: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        go(world, **settings)
    assert "\n" not in str(error.value)
    assert not (Path(world["data"]).parent / "out").exists()


def test_oracle_needs_planted_rows(world: dict[str, str], tmp_path: Path) -> None:
    config = {"output_dir": str(tmp_path / "out"), "method": "oracle", **world}
    with pytest.raises(UserError, match="planted= is missing"):
        load(SelectConfig, config)
    with pytest.raises(UserError, match="does not exist"):
        select.run(load(SelectConfig, config | {"planted": world["data"]}))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 50),
    seed=st.integers(0, 999),
    share=st.floats(0.01, 1),
    method=st.sampled_from([m for m in METHODS if "clustering_params__k_range" not in m and m["method"] != "oracle"]),
)
def test_exact_size_no_duplicates_same_again(n: int, seed: int, share: float, method: dict[str, Any]) -> None:
    rng = np.random.default_rng(seed)
    flat = {key: value for key, value in method.items() if "__" not in key}
    config = SelectConfig(output_dir="x", router_data_dir="x", data="x", seed=seed, selection_percentage=share, **flat)
    config.filter.drop = 0.0 if config.method == "kmeans" else None
    if config.parts()["allocation"] != "coverage" and config.method in ("kmeans", "router_only"):
        config.clustering_params.k = int(rng.integers(1, n + 1))
    config.clustering_params.restarts = 2
    unit = Rows(rng.random((max(1, n // 2), 4))[rng.integers(max(1, n // 2), size=n)] + 0.01)  # with duplicates
    scores, tokens = rng.integers(4, size=n) / 4, rng.integers(1, 9, size=n)
    names = [f"d{i}" for i in rng.integers(3, size=n)]
    runs = []
    for threads in (1, 3):
        config.threads = threads
        runs.append(select.choose(config, unit, scores, tokens, names, np.zeros(n, bool)))
    target = max(1, min(n, int(n * share + 0.5)))
    assert abs(len(runs[0].order) - target) <= (1 if abs(n * share % 1 - 0.5) < 1e-9 else 0)
    assert len(set(runs[0].order)) == len(runs[0].order)
    assert (runs[0].order == runs[1].order).all()


def test_result_dataclass_is_plain_json() -> None:
    row = Selected(Row("d", "1", talk(("d", "1"))), {"answer": 0.5}, 1, 2)
    assert json.loads(row.json())["rank"] == 2
    assert tempfile.gettempdir() not in row.json()


def test_a_judge_without_gates_or_without_routers(tmp_path: Path) -> None:
    data = router()
    for name in ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer"):
        setattr(data, name, np.zeros((N, 0), np.float32))
    (tmp_path / "plain").mkdir()
    plain = write_world(tmp_path / "plain", data)
    embedded = dataclasses.replace(data, router_probs=np.zeros((N, 0, 0), np.float32))
    embedded.embedding = data.router_probs.reshape(N, -1) - 0.1
    (tmp_path / "dense").mkdir()
    dense = write_world(tmp_path / "dense", embedded)
    for world in (plain, dense):
        for n, asked in enumerate(({"method": "router_only"}, {"score": "nll"}, {"method": "random"})):
            chosen = read_selected(go(world, f"out-{n}", selection_rows=7, **asked))
            assert len(chosen) == 7
            assert set(chosen[0].scores) == {"nll", "ifd"}
        with pytest.raises(UserError, match=r"no score 'answer' \(it needs a judge with gates.*they have nll, ifd"):
            go(world, "refused")
    with pytest.raises(UserError, match="has no routers, rows are clustered by embeddings"):
        go(dense, "refused", score="nll", layers=[0])
    data.nll[:] = np.nan
    (tmp_path / "none").mkdir()
    none = write_world(tmp_path / "none", data)
    assert not read_selected(go(none, method="router_only"))[0].scores
    with pytest.raises(UserError, match=r"they have none \(method=router_only needs none\)"):
        go(none, "refused", score="nll")
