"""Choose rows: the worst by score are left out, the rest is clustered by routing, rows are taken across the clusters.

    selectmoe select router_data_dir=out/route/router_data data=out/ingest output_dir=out/select

In: router data (one row per routed row, from `route` or `merge`) and the pool that it was routed from; rows are joined
by (dataset, id). Out: `selected_data.jsonl` (the rows, in pick order), `clusters.parquet` (what became of *every*
routed row, and a map of them), `selection_config.yaml` (how it was done, with the curve over k).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe import picking as pk
from selectmoe import stage
from selectmoe.choose_k import CRITERIA, choose_k
from selectmoe.config import StageConfig, group, identity, input_
from selectmoe.errors import UserError
from selectmoe.kmeans import Clustering, Rows, spherical_kmeans
from selectmoe.scores import SCORES, available, score, table
from selectmoe.selection import (
    CLUSTERED,
    CLUSTERS,
    CONFIG,
    FILE,
    METHODS,
    SCORED,
    Selected,
    planted_file,
    project,
    read_planted,
    write_clusters,
    write_config,
    write_selected,
)

if TYPE_CHECKING:
    from selectmoe.pool import Row
    from selectmoe.router_data import RouterData

STAGE = "select"
VERSION = 1
DEFAULT_SHARE = 0.05
K_RANGE = (10, 100)
"""Numbers of clusters that automatic k tries."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass
class FilterConfig:
    """What is left out before anything is chosen."""

    drop: float | None = identity(None, doc="share of the pool that is left out, worst score first; default: picking's")


@dataclass
class ClusteringConfig:
    """How the rows are clustered."""

    k: int | None = identity(None, doc="number of clusters; not under coverage, which has as many as rows wanted")
    auto_k: bool | None = identity(None, doc="choose k over k_range; default: yes unless k is given")
    k_range: list[int] | None = identity(None, doc="smallest and largest k to try; default [10,100]")
    criterion: str = identity("silhouette", doc=f"how k is chosen: {', '.join(CRITERIA)}")
    restarts: int = identity(10, doc="k-means++ starts per k, the best inertia wins; fewer are faster")
    max_iters: int = identity(300, doc="iterations of Lloyd at most")


@dataclass
class SelectConfig(StageConfig):
    """Configuration of `select`."""

    router_data_dir: str = input_(doc="router data, from route or merge")
    data: str = input_(doc="the pool that was routed, or ingest's output_dir")
    planted: str = input_("", doc="planted.jsonl or ingest's output_dir; for method=oracle, and only there")
    method: str = identity("kmeans", doc=f"how rows are chosen: {', '.join(METHODS)}")
    score: str = identity("answer", doc=f"what makes a row good: {', '.join(SCORES)}")
    picking: str = identity(
        "coverage", doc="filter, allocation and pick together: coverage, or legacy (best of each in turn)"
    )
    filter: FilterConfig = group(FilterConfig)
    allocation: str | None = identity(None, doc=f"over clusters: {', '.join(pk.ALLOCATIONS)}; default: picking's")
    pick: str | None = identity(None, doc=f"inside a cluster: {', '.join(pk.PICKS)}; default: picking's")
    selection_percentage: float = identity(DEFAULT_SHARE, doc="share of the candidates to select, above 0, at most 1")
    selection_rows: int | None = identity(None, doc="rows to select, in the place of selection_percentage")
    selection_tokens: int | None = identity(
        None, doc="answer tokens to select at most, in the place of selection_percentage"
    )
    layers: list[int] | None = identity(
        None, doc="layers whose routing is what rows are clustered by, from 0; default all"
    )
    clustering_params: ClusteringConfig = group(ClusteringConfig)

    def validate(self) -> None:
        """Check ranges, names, and that nothing is given which the method would not read."""
        check_budget(self.selection_percentage, self.selection_rows, self.selection_tokens)
        _known("method", self.method, METHODS)
        _known("score", self.score, SCORES)
        _known("picking", self.picking, tuple(pk.PICKINGS))
        if self.allocation is not None:
            _known("allocation", self.allocation, pk.ALLOCATIONS)
        if self.pick is not None:
            _known("pick", self.pick, pk.PICKS)
        if self.filter.drop is not None and not 0 <= self.filter.drop < 1:
            raise UserError(f"filter.drop={self.filter.drop} must be at least 0 and below 1")
        if self.layers is not None and (
            not self.layers or min(self.layers) < 0 or len({*self.layers}) < len(self.layers)
        ):
            raise UserError(f"layers={self.layers} must name at least one layer, from 0, and each once")
        if bool(self.planted) != (self.method == "oracle"):
            raise UserError(
                "planted= is missing: method=oracle needs it"
                if not self.planted
                else "planted= is read by method=oracle only"
            )
        if unread := self._unread():
            raise UserError(f"{unread[0]} has no effect with method={self.method}: leave it out")
        check_clustering(self.clustering_params, self.parts()["allocation"])

    def _unread(self) -> list[str]:
        """Keys that were given although the method does not read them."""
        if self.method == "kmeans":
            return []
        given = {"filter.drop": self.filter.drop is not None, "pick=best": self.pick == "best"}
        if self.method not in CLUSTERED:
            given |= {"picking": self.picking != "coverage", "allocation": self.allocation is not None}
            given |= {"pick": self.pick is not None, "layers": self.layers is not None}
            given |= {"clustering_params": self.clustering_params != ClusteringConfig()}
        return [name for name, is_given in given.items() if is_given]

    def parts(self) -> dict[str, Any]:
        """The three parts of picking that are in force: drop, allocation, pick."""
        parts = dict(pk.PICKINGS[self.picking])
        if self.method == "router_only":
            parts |= {"drop": 0.0, "pick": "centroid"}
        given = {"drop": self.filter.drop, "allocation": self.allocation, "pick": self.pick}
        return parts | {name: value for name, value in given.items() if value is not None}


def _known(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UserError(f"{key}={value!r} is unknown; known: {', '.join(names)}")


def check_budget(percentage: float, rows: int | None, tokens: int | None) -> None:
    """Raise `UserError` unless exactly one budget is given and it is in its range."""
    pk.target_rows(1, percentage)
    if (rows is not None) + (tokens is not None) + (percentage != DEFAULT_SHARE) > 1:
        raise UserError("give one of selection_percentage, selection_rows, selection_tokens")
    for name, value in (("selection_rows", rows), ("selection_tokens", tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")


def check_clustering(params: ClusteringConfig, allocation: str) -> None:
    """Raise `UserError` when values are out of range, contradict each other, or have no effect with the allocation."""
    _known("clustering_params.criterion", params.criterion, CRITERIA)
    if params.restarts < 1 or params.max_iters < 1:
        raise UserError("clustering_params.restarts and max_iters must be at least 1")
    if allocation == "coverage":
        for name in ("k", "auto_k", "k_range"):
            if getattr(params, name) is not None:
                raise UserError(
                    f"clustering_params.{name} has no effect under allocation coverage, which makes as many "
                    "clusters as rows are wanted: leave it out, or say picking=legacy or allocation=round_robin"
                )
        if params.criterion != "silhouette":
            raise UserError("clustering_params.criterion has no effect under allocation coverage: leave it out")
        return
    if params.k is not None and (params.auto_k or params.k_range is not None):
        raise UserError("clustering_params: give k, or auto_k=true with k_range, not both")
    if params.k is None and params.auto_k is False:
        raise UserError("clustering_params.auto_k=false needs clustering_params.k")
    if params.k is not None and params.k < 1:
        raise UserError(f"clustering_params.k={params.k} must be at least 1")
    bounds = params.k_range
    if bounds is not None and not (len(bounds) == 2 and 2 <= bounds[0] <= bounds[1]):
        raise UserError(f"clustering_params.k_range={bounds} must be [smallest, largest], from 2 upwards")


@dataclass
class Picked:
    """What was decided, in numbers of candidates (0..N-1).

    Attributes:
        order: the selected ones, in pick order.
        filtered: how many the filter left out.
        clustered: the ones that were clustered ([] without clusters), ascending.
        clustering: of these.
        rank: [len(clustered)] rank in the cluster, from 0.
        curve: of the criterion over k.
    """

    order: Ints
    filtered: int
    clustered: Ints
    clustering: Clustering | None = None
    rank: Ints | None = None
    curve: list[dict[str, Any]] | None = None


def run(config: SelectConfig) -> Path:
    """Select rows.

    Returns:
        The output directory.

    Raises:
        UserError: a setting is wrong, the inputs do not belong together, or there are fewer rows than wanted.
    """
    from selectmoe import router_data
    from selectmoe.legacy_router_data import check_positions
    from selectmoe.pool import locate, read_pool

    config.validate()
    routed, pool = router_data.locate(config.router_data_dir), locate(config.data)
    planted = planted_file(config.planted) if config.planted else None
    inputs = {"router_data": str(routed), "pool": str(pool), "planted": str(planted or "")}
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if out.done:
            return out.path
        data = router_data.read_router_data(routed)
        pool_rows = read_pool(pool)
        rows = join(data, pool_rows)
        check_positions(data, pool_rows)
        features = _features(data, config.layers)
        scores, scored = _scores(config, data)
        sound = np.isfinite(features).all(axis=1) & (features != 0).any(axis=1)
        at = np.flatnonzero(sound & scored)  # the candidates
        if not len(at):
            raise UserError(f"{config.router_data_dir}: none of {len(rows)} rows has a score {config.score!r}")
        unit = Rows(features[at])
        bad = read_planted(planted) if planted else set()
        planted_mask = np.array([(rows[i].dataset, rows[i].id) in bad for i in at])
        datasets = [rows[i].dataset for i in at]
        picked = choose(config, unit, np.nan_to_num(scores[at]), data.answer_tokens[at], datasets, planted_mask)
        write_selected(out.staging / FILE, _selected(picked, at, rows, data))
        write_clusters(out.staging / CLUSTERS, _columns(picked, at, rows, scores, project(unit)))
        write_config(out.staging / CONFIG, _summary(config, picked, at, rows))
        dropped = {
            "no_features": int((~sound).sum()),
            "no_score": int(sound.sum()) - len(at),
            "planted": int(planted_mask.sum()),
            "filtered": picked.filtered,
        }
        dropped["not_selected"] = len(rows) - len(picked.order) - sum(dropped.values())
        out.commit(rows_in=len(rows), rows_out=len(picked.order), dropped=dropped, bookkeeping=[CONFIG])
    return out.path


def _scores(config: SelectConfig, data: RouterData) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """[N] the score, and [N] who may be chosen: rows that have it; all rows where none has, and the method reads none.

    Raises:
        UserError: the method reads what these router data do not hold.
    """
    if (config.method == "length" or config.selection_tokens) and (data.answer_tokens < 0).any():
        raise UserError(
            "method=length and selection_tokens need token counts, which the predecessor's files do not hold"
        )
    if config.method not in SCORED and config.score not in available(data):
        return np.full(len(data), np.nan), np.ones(len(data), dtype=bool)
    scores = score(data, config.score)
    return scores, np.isfinite(scores)


def _features(data: RouterData, layers: list[int] | None) -> npt.NDArray[np.float32]:
    """What rows are clustered by: [rows, layers x experts], all layers or those that are named; of a dense judge [rows, H].

    Raises:
        UserError: a layer that the router data does not have.
    """
    probs = data.router_probs
    if not probs.shape[1]:
        if layers is not None:
            raise UserError(f"layers={layers}: the judge has no routers, rows are clustered by embeddings")
        return data.embedding
    if layers is not None:
        if max(layers) >= probs.shape[1]:
            raise UserError(f"layers={layers}: the router data has layers 0 to {probs.shape[1] - 1}")
        probs = probs[:, sorted(layers)]
    return probs.reshape(len(probs), -1)


def join(data: RouterData, pool: list[Row]) -> list[Row]:
    """The pool's row of every routed row, by (dataset, id).

    Raises:
        UserError: routed rows that the pool does not have (the first ten), or a row that was routed twice.
    """
    by_key = {(row.dataset, row.id): row for row in pool}
    keys = list(zip(data.dataset, data.id, strict=True))
    if missing := [key for key in keys if key not in by_key]:
        names = ", ".join("/".join(key) for key in missing[:10])
        raise UserError(
            f"{len(missing)} of {len(keys)} routed rows are not in the pool ({names}): "
            "data= must be the pool that was routed"
        )
    if len(set(keys)) < len(keys):
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise UserError(f"row {twice[0]}/{twice[1]} is in the router data twice")
    return [by_key[key] for key in keys]


def choose(
    config: SelectConfig, unit: Rows, scores: Floats, tokens: Ints, datasets: list[str], planted: npt.NDArray[np.bool_]
) -> Picked:
    """Decide which of N candidates are taken.

    Args:
        config: method, picking and budget.
        unit: features of the candidates, ordered by (dataset, id).
        scores: [N] no NaN.
        tokens: [N] answer tokens.
        datasets: [N] names.
        planted: [N] rows that `oracle` leaves out.
    """
    n, budget = len(unit), config.selection_tokens
    target: int | None = None
    if budget is None:
        target = config.selection_rows or pk.target_rows(n, config.selection_percentage)
        if target > n:
            raise UserError(f"selection_rows={target}: there are only {n} candidates")
    if config.method in CLUSTERED:
        return _across_clusters(config, unit, scores, tokens, target)
    rng = np.random.Generator(np.random.PCG64(config.seed))
    draw = rng.permutation(n)
    match config.method:
        case "top":
            order = pk.best_first(scores)
        case "length":
            order = pk.best_first(tokens.astype(np.float64))
        case "balanced_random":
            labels = np.unique(datasets, return_inverse=True)[1].astype(np.int64)
            ranks = pk.rank_inside(labels, draw.astype(np.float64))
            order = pk.order_rows(labels, ranks, -draw.astype(np.float64), "round_robin")
        case _:  # random, oracle
            order = draw[~planted[draw]]
    return Picked(pk.take(order, target, tokens, budget), 0, np.empty(0, np.int64))


def _across_clusters(config: SelectConfig, unit: Rows, scores: Floats, tokens: Ints, target: int | None) -> Picked:
    parts, params, budget = config.parts(), config.clustering_params, config.selection_tokens
    kept = pk.keep_best(scores, parts["drop"], target or 1)
    filtered = len(scores) - len(kept)
    rows = unit if not filtered else unit.subset(kept)
    threads = config.threads or len(os.sched_getaffinity(0))
    curve: list[dict[str, Any]] | None = None
    if parts["allocation"] == "coverage" or params.k is not None:
        wanted = target if budget is None else pk.expected_rows(tokens[kept], budget)
        k = params.k or wanted or 1
        found = spherical_kmeans(rows, k, config.seed, params.restarts, params.max_iters, threads)
    else:
        low, high = params.k_range or K_RANGE
        ks = range(low, min(high, len(rows) - 1) + 1)
        choice = choose_k(rows, ks, params.criterion, config.seed, params.restarts, params.max_iters, threads)
        found, curve = choice.clustering, choice.curve
    rng = np.random.Generator(np.random.PCG64(config.seed))
    rank = pk.rank_inside(found.labels, pk.pick_key(parts["pick"], scores[kept], found.distance, rng))
    worth = -found.distance if config.method == "router_only" else scores[kept]
    order = pk.order_rows(found.labels, rank, worth, parts["allocation"])
    chosen = pk.take(order, target, tokens[kept], budget)
    return Picked(kept[chosen], filtered, kept, found, rank, curve)


def _selected(picked: Picked, at: Ints, rows: list[Row], data: RouterData) -> list[Selected]:
    every = table(data)
    place = {int(row): n for n, row in enumerate(picked.clustered)}
    chosen = []
    for candidate in picked.order:
        i = int(at[candidate])
        scores = {name: float(values[i]) for name, values in every.items() if np.isfinite(values[i])}
        cluster = rank = None
        if picked.clustering is not None and picked.rank is not None:
            n = place[int(candidate)]
            cluster, rank = int(picked.clustering.labels[n]), int(picked.rank[n]) + 1
        chosen.append(Selected(rows[i], scores, cluster, rank))
    return chosen


def _columns(
    picked: Picked, at: Ints, rows: list[Row], scores: Floats, places: npt.NDArray[np.float32]
) -> dict[str, list[Any]]:
    """The columns of clusters.parquet, for every routed row."""
    n = len(rows)
    empty: dict[str, list[Any]] = {name: [None] * n for name in ("cluster", "distance", "selected_rank", "x", "y")}
    columns = empty | {
        "dataset": [row.dataset for row in rows],
        "id": [row.id for row in rows],
        "score": [float(value) if np.isfinite(value) else None for value in scores],
    }
    for i, (x, y) in zip(at, places, strict=True):
        columns["x"][i], columns["y"][i] = float(x), float(y)
    if picked.clustering is not None:
        for j, i in enumerate(at[picked.clustered]):
            columns["cluster"][i] = int(picked.clustering.labels[j])
            columns["distance"][i] = float(picked.clustering.distance[j])
    for rank, i in enumerate(at[picked.order], 1):
        columns["selected_rank"][i] = rank
    return columns


def _summary(config: SelectConfig, picked: Picked, at: Ints, rows: list[Row]) -> dict[str, Any]:
    """The groups of selection_config.yaml."""
    clustered = picked.clustering is not None
    params = config.clustering_params
    return {
        "selection_metadata": {
            "total_samples": len(rows),
            "candidates": len(at),
            "selected_count": len(picked.order),
            "datasets_processed": sorted({row.dataset for row in rows}),
        },
        "selection_parameters": {
            "method": config.method,
            "score": config.score,
            "selection_percentage": config.selection_percentage,
            "selection_rows": config.selection_rows,
            "selection_tokens": config.selection_tokens,
            "seed": config.seed,
            "picking": {"name": config.picking, **config.parts()} if clustered else None,
        },
        "clustering_parameters": {
            "k": len(picked.clustering.centres),
            "inertia": picked.clustering.inertia,
            "auto_k": picked.curve is not None,
            "k_range": list(params.k_range or K_RANGE) if picked.curve else None,
            "criterion": params.criterion if picked.curve else None,
            "restarts": params.restarts,
            "max_iters": params.max_iters,
            "curve": picked.curve,
        }
        if picked.clustering is not None
        else None,
        "paths": {"router_data_dir": config.router_data_dir, "data": config.data, "planted": config.planted or None},
        "device_configuration": {"device": "cpu", "threads": config.threads},
    }
