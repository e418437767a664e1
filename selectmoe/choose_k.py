"""How many clusters: cluster with every k of a range and take the one that a criterion likes best.

No command runs this module; `selectmoe select clustering_params.auto_k=true` uses it. The whole curve is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.kmeans import GRID, Clustering, Floats, Nearest, Rows, best_of, plus_plus, single_blas
from selectmoe.progress import progress

CRITERIA = ("silhouette", "silhouette_full", "elbow", "calinski_harabasz")
"""How k is chosen: the highest value wins, the smaller k where two are equal."""


@dataclass(frozen=True)
class Choice:
    """The chosen clustering and the whole curve: one `{"k", "inertia", "value"}` per k (value None: has none)."""

    clustering: Clustering
    k: int
    curve: list[dict[str, float | int | None]]


def choose_k(
    features: npt.ArrayLike | Rows,
    ks: Sequence[int],
    criterion: str,
    seed: int,
    restarts: int = 10,
    max_iters: int = 300,
    threads: int = 1,
) -> Choice:
    """Cluster with every k and take the one that the criterion likes best.

    Args:
        features: [N, D] or `Rows`.
        ks: rising numbers of clusters, each 2 to N - 1; at least three of them for `elbow`.
        criterion: one of `CRITERIA`.
        seed: as in `spherical_kmeans`, which gives the same clustering for the chosen k (unless the range crosses
            `GREEDY`).
        restarts: starts per k.
        max_iters: iterations of Lloyd at most.
        threads: restarts that run at the same time; changes no byte of the result.

    Raises:
        UserError: unknown criterion, or k out of range.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion={criterion!r} is unknown; known: {', '.join(CRITERIA)}")
    rows = features if isinstance(features, Rows) else Rows(features)
    least = 3 if criterion == "elbow" else 1
    if len(ks) < least or ks[0] < 2 or ks[-1] >= len(rows):
        raise UserError(
            f"k_range gives {len(ks)} numbers of clusters for {len(rows)} rows: {criterion} needs at least {least}, "
            "each from 2 to one less than the rows"
        )
    with single_blas():
        starts = plus_plus(rows, ks[-1], seed, restarts)
        runs = [best_of(rows, starts[:, :k], max_iters, threads) for k in progress(ks, desc="k-means", unit="k")]
    if criterion == "elbow":
        bends = elbow(np.array(ks, np.float64), np.array([run.inertia for run in runs]))
        values = np.concatenate(([np.nan], bends, [np.nan]))
    else:
        values = np.array([_VALUE[criterion](rows, run) for run in runs])
    values = np.round(values, 9)
    curve: list[dict[str, float | int | None]] = [
        {"k": k, "inertia": run.inertia, "value": None if np.isnan(value) else float(value)}
        for k, run, value in zip(ks, runs, values, strict=True)
    ]
    best = int(np.nanargmax(values))
    return Choice(runs[best], ks[best], curve)


def elbow(ks: Floats, inertia: Floats) -> Floats:
    """[n - 2] divided second differences of the inertia, scaled to 0..1, at the inner ks (unevenly spaced or not)."""
    span = float(inertia.max() - inertia.min())
    scaled = (inertia - inertia.min()) / (span if span > 0 else 1.0)
    slopes = np.diff(scaled) / np.diff(ks)
    return np.asarray(2 * np.diff(slopes) / (ks[2:] - ks[:-2]))


def silhouette(rows: Rows, clustering: Clustering) -> float:
    """Simplified silhouette: mean of (b - a) / max(a, b), a and b the cosine distances to own and next centre."""
    if len(clustering.centres) < 2:
        return 0.0
    second = Nearest(rows, len(clustering.centres))(clustering.centres, excluded=clustering.labels)
    b = np.maximum(1 - rows.cosine(np.arange(len(rows)), clustering.centres, second), 0)
    most = np.maximum(clustering.distance, b)
    return float(np.where(most > 0, (b - clustering.distance) / np.where(most > 0, most, 1), 0).mean())


def _silhouette_full(rows: Rows, clustering: Clustering) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(rows.single.astype(np.float64), clustering.labels, metric="cosine"))


def calinski_harabasz(rows: Rows, clustering: Clustering) -> float:
    """Between- over within-cluster variance of the unit rows, each by its degrees of freedom."""
    n, k = len(rows), len(clustering.centres)
    sums = rows.sums(np.arange(n), clustering.labels, k) / GRID
    counts = np.bincount(clustering.labels, minlength=k)
    explained = float(((sums * sums).sum(axis=1) / counts).sum())
    total = sums.sum(axis=0)
    between, within = explained - float((total * total).sum()) / n, n - explained
    return between / max(k - 1, 1) / max(within / max(n - k, 1), 1e-12)


_VALUE: dict[str, Callable[[Rows, Clustering], float]] = {
    "silhouette": silhouette,
    "silhouette_full": _silhouette_full,
    "calinski_harabasz": calinski_harabasz,
}
