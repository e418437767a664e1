"""Spherical k-means (cosine distance) whose result has the same bytes at any thread count.

No command runs this module; `selectmoe select method=kmeans` uses it, and `upcycle` to initialise routers.

How the bytes stay the same although BLAS adds in another order at every thread count:

* rows are scaled to unit length and rounded once to multiples of 2^-30, so that sums over rows are exact (int64) and
  can be updated by the rows that moved;
* similarities come from a float32 matrix product, whose error has a bound; where two centres lie within that bound of
  each other the decision is made again in float64, and where that cannot tell, by sums that no thread count changes;
* k-means++ works on coordinates rounded to multiples of 2^-26: a float64 product of two unit rows is then exact.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

GRID = 2.0**30
"""Steps per unit of the fixed-point coordinates: a sum of 2^33 rows still fits an int64."""
COARSE = 2.0**26
"""Steps per unit in k-means++: products are multiples of 2^-52 and their sums stay below 2, hence exact in float64."""
CHUNK = 4096
"""Rows (and pairs) that are compared at a time."""
TRIALS, GREEDY = 12, 256
"""k-means++ draws this many candidates and takes the one that lowers the inertia most; one where k is above GREEDY."""
CACHE = 2**26
"""Similarities (rows x centres) that are kept between iterations; above, they are computed anew in chunks."""
TOLERANCE = 1e-4
"""Lloyd ends when no centre moves by more than this (1 - cos)."""


@dataclass(frozen=True)
class Clustering:
    """A clustering of N rows of D features into k clusters, none of them empty.

    Attributes:
        labels: [N] int64, cluster of each row: its nearest centre (ties: the lower index).
        centres: [k, D] float64, unit length.
        inertia: sum over rows of 1 - cos(row, own centre).
        distance: [N] float64, 1 - cos(row, own centre).
    """

    labels: Ints
    centres: Floats
    inertia: float
    distance: Floats


class Rows:
    """Unit rows in the three forms that the arithmetic needs; build once, cluster many times."""

    def __init__(self, features: npt.ArrayLike):
        """Scale and round.

        Args:
            features: [N, D], finite, no row of zeros.

        Raises:
            UserError: not two-dimensional, empty, or a row without a direction (NaN, infinity, all zeros).
        """
        raw = np.asarray(features)
        if raw.ndim != 2 or 0 in raw.shape:
            raise UserError(f"features have the shape {raw.shape}; k-means needs [rows, features], neither of them 0")
        self.fixed: npt.NDArray[np.int32] = np.empty(raw.shape, np.int32)  # multiples of 2^-30
        for start in range(0, len(raw), CHUNK):
            block = raw[start : start + CHUNK].astype(np.float64)
            peak = np.abs(block).max(axis=1, keepdims=True)
            bad = ~(np.isfinite(peak) & (peak > 0)).ravel()
            if bad.any():
                row = start + int(np.argmax(bad))
                raise UserError(
                    f"features of row {row} have no direction (NaN, infinite, or all zeros): leave the row out"
                )
            block /= peak
            block /= np.sqrt((block * block).sum(axis=1, keepdims=True))
            self.fixed[start : start + CHUNK] = np.rint(block * GRID)
        self.single: Singles = self.fixed.astype(np.float32) / np.float32(GRID)
        # |float32 product - exact| <= (D + 3) * 2^-24 for unit vectors that were rounded to float32 first.
        self.margin = 2 * (raw.shape[1] + 3) * 2.0**-24

    def __len__(self) -> int:
        """N."""
        return len(self.fixed)

    def subset(self, rows: Ints) -> Rows:
        """The given rows only, without rounding again."""
        part = object.__new__(Rows)
        part.fixed, part.single, part.margin = self.fixed[rows], self.single[rows], self.margin
        return part

    def cosine(self, rows: Ints, centres: Floats, columns: Ints) -> Floats:
        """float64 products of the pairs (rows[i], centres[columns[i]]), free of BLAS and hence of thread counts."""
        out = np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            out[part] = (self.fixed[rows[part]] * (1 / GRID) * centres[columns[part]]).sum(axis=1)
        return out

    def sums(self, rows: Ints, labels: Ints, k: int) -> Ints:
        """[k, D] exact sums of the given rows per label."""
        out = np.zeros((k, self.fixed.shape[1]), np.int64)
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(k + 1))
        for label in np.flatnonzero(np.diff(bounds)):
            for at in range(bounds[label], bounds[label + 1], CHUNK):
                members = rows[order[at : min(at + CHUNK, bounds[label + 1])]]
                out[label] += self.fixed[members].sum(axis=0, dtype=np.int64)
        return out


def plus_plus(rows: Rows, k: int, seed: int, restarts: int) -> Ints:
    """Greedy k-means++ for all restarts at once, with probability proportional to 1 - cos to the nearest chosen row.

    While k stays on one side of `GREEDY`, the first j columns are the choice for j clusters: one call serves every k
    up to its own.

    Returns:
        [restarts, k] row numbers, different within a restart.
    """
    coarse = np.rint(rows.fixed * (COARSE / GRID)) / COARSE
    square = (coarse * coarse).sum(axis=1)
    trials = TRIALS if k <= GREEDY else 1
    streams = [np.random.Generator(np.random.PCG64([seed, r])) for r in range(restarts)]
    draws = np.stack([stream.random((k, trials)) for stream in streams])
    chosen = np.empty((restarts, k), np.int64)
    nearest = np.full((restarts, len(rows)), np.inf)
    for j in range(k):
        if j:
            tried = np.array([_draw(nearest[r], draws[r, j], chosen[r, :j]) for r in range(restarts)])
        else:
            tried = (draws[:, 0, :1] * len(rows)).astype(np.int64)
        flat = tried.ravel()
        # |x - c|^2 / 2 is 1 - cos for unit vectors, and exactly 0 for duplicates.
        distance = (square[flat, None] + square) / 2 - coarse[flat] @ coarse.T
        distance = distance.reshape(*tried.shape, len(rows))
        distance = np.minimum(np.maximum(distance, 0), nearest[:, None])
        best = distance.sum(axis=2).argmin(axis=1)
        chosen[:, j] = tried[np.arange(restarts), best]
        nearest = distance[np.arange(restarts), best]
    return chosen


def _draw(weights: Floats, uniforms: Floats, taken: Ints) -> Ints:
    cumulative = np.cumsum(weights)
    if cumulative[-1] > 0:
        found = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
        return np.asarray(np.minimum(found, np.flatnonzero(weights)[-1]))
    free = np.ones(len(weights), bool)  # fewer distinct rows than clusters: the first one that is left
    free[taken] = False
    return np.full(len(uniforms), np.argmax(free))


class Nearest:
    """Nearest centre of every row; keeps the products with centres that did not move."""

    def __init__(self, rows: Rows, k: int):
        """For the given rows and k centres."""
        self.rows = rows
        self.cache = np.empty((len(rows), k), np.float32) if len(rows) * k <= CACHE else None
        self.old: Singles | None = None

    def __call__(self, centres: Floats, excluded: Ints | None = None) -> Ints:
        """[N] the nearest centre; with `excluded`, the nearest one other than excluded[i]."""
        single = centres.astype(np.float32)
        moved = np.ones(len(centres), bool) if self.old is None else (single != self.old).any(axis=1)
        self.old = single
        labels = np.empty(len(self.rows), np.int64)
        for start in range(0, len(self.rows), CHUNK):
            block = slice(start, start + CHUNK)
            if self.cache is None:
                sims: Singles = self.rows.single[block] @ single.T
            else:
                sims = self.cache[block]
                if moved.all():
                    np.matmul(self.rows.single[block], single.T, out=sims)
                elif moved.any():
                    sims[:, moved] = self.rows.single[block] @ single[moved].T
            if excluded is not None:
                sims = sims.copy()
                sims[np.arange(len(sims)), excluded[block]] = -np.inf
            labels[block] = self._decide(sims, centres, start)
        return labels

    def _decide(self, sims: Singles, centres: Floats, start: int) -> Ints:
        best: Ints = sims.argmax(axis=1)
        unsure = np.flatnonzero(_rivals(sims, self.rows.margin).sum(axis=1) > 1)
        if not len(unsure):
            return best
        doubles = (self.rows.fixed[start + unsure] * (1 / GRID)) @ centres.T
        doubles[np.isneginf(sims[unsure])] = -np.inf
        best[unsure] = doubles.argmax(axis=1)
        close = _rivals(doubles, self.rows.margin * 2.0**-29)  # 2^-53 in the place of 2^-24
        tied = np.flatnonzero(close.sum(axis=1) > 1)
        if not len(tied):
            return best
        at, column = np.nonzero(close[tied])
        exact = self.rows.cosine(start + unsure[tied[at]], centres, column)
        firsts = np.searchsorted(at, np.arange(len(tied)))
        winner = np.flatnonzero(exact == np.maximum.reduceat(exact, firsts)[at])
        _, first = np.unique(at[winner], return_index=True)  # columns ascend: a tie goes to the lower one
        best[unsure[tied]] = column[winner[first]]
        return best


def _rivals(sims: npt.NDArray[np.floating], margin: float) -> npt.NDArray[np.bool_]:
    """[n, k] True for every centre that rounding alone could keep from being the nearest."""
    return np.asarray(sims >= sims.max(axis=1, keepdims=True) - margin)


def _fill_empty(rows: Rows, labels: Ints, centres: Floats) -> bool:
    """Re-seed every empty cluster, in place, with the row farthest from its centre; True where there was one."""
    counts = np.bincount(labels, minlength=len(centres))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return False
    distance = 1 - rows.cosine(np.arange(len(rows)), centres, labels)
    for cluster in empty:
        row = int(np.argmax(np.where(counts[labels] > 1, distance, -np.inf)))
        counts[labels[row]] -= 1
        counts[cluster] = 1
        labels[row] = cluster
        distance[row] = -np.inf
        centres[cluster] = _unit(rows.fixed[row].astype(np.float64)[None])[0]
    return True


def _unit(sums: Floats) -> Floats:
    return np.asarray(sums / np.sqrt((sums * sums).sum(axis=1, keepdims=True)))


def _lloyd(rows: Rows, start: Ints, max_iters: int) -> Clustering:
    k = len(start)
    centres = _unit(rows.fixed[start].astype(np.float64))
    nearest = Nearest(rows, k)
    everything = np.arange(len(rows))
    labels = nearest(centres)
    _fill_empty(rows, labels, centres)
    sums = rows.sums(everything, labels, k)
    for _ in range(max_iters):
        old = centres
        zero = (sums == 0).all(axis=1)  # opposed rows that cancel out: the centre stays
        centres = np.where(zero[:, None], old, _unit(np.where(zero[:, None], 1, sums).astype(np.float64)))
        found = nearest(centres)
        refilled = _fill_empty(rows, found, centres)
        changed = np.flatnonzero(found != labels)
        sums += rows.sums(changed, found[changed], k) - rows.sums(changed, labels[changed], k)
        labels = found
        still = ((centres - old) ** 2).sum(axis=1).max() / 2 < TOLERANCE
        if still and not (refilled and len(changed)):
            break
    distance = np.maximum(1 - rows.cosine(everything, centres, labels), 0)
    return Clustering(labels, centres, float(distance.sum()), distance)


def spherical_kmeans(
    features: npt.ArrayLike | Rows, k: int, seed: int, restarts: int = 10, max_iters: int = 300, threads: int = 1
) -> Clustering:
    """K-means with cosine distance: the best inertia of several different k-means++ starts.

    Args:
        features: [N, D], any scale, or `Rows` made of them. The order of the rows counts: sort them by id.
        k: number of clusters, 1 to N. With more clusters than distinct rows, duplicates are spread over clusters.
        seed: of the k-means++ draws; restart r draws from the stream (seed, r).
        restarts: number of starts; equal inertia goes to the earlier one.
        max_iters: iterations of Lloyd at most.
        threads: restarts that run at the same time; changes no byte of the result.

    Returns:
        The clustering; every cluster has at least one row.

    Raises:
        UserError: k or restarts out of range, or features without a direction.
    """
    rows = features if isinstance(features, Rows) else Rows(features)
    if not 1 <= k <= len(rows):
        raise UserError(f"k={k} clusters of {len(rows)} rows: k must be between 1 and the number of rows")
    if restarts < 1 or max_iters < 1:
        raise UserError(f"restarts={restarts}, max_iters={max_iters}: both must be at least 1")
    with single_blas():
        return best_of(rows, plus_plus(rows, k, seed, restarts), max_iters, threads)


def single_blas() -> AbstractContextManager[object]:
    """Restarts run in parallel; a BLAS that splits their small products as well is several times slower."""
    try:
        threadpoolctl = import_module("threadpoolctl")
    except ImportError:  # comes with scikit-learn; without it the result is the same
        return nullcontext()
    limits: AbstractContextManager[object] = threadpoolctl.threadpool_limits(1, "blas")
    return limits


def best_of(rows: Rows, starts: Ints, max_iters: int, threads: int) -> Clustering:
    """The best of Lloyd's runs from the given starts [restarts, k]; equal inertia goes to the earlier one."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        runs = list(pool.map(lambda start: _lloyd(rows, start, max_iters), starts))
    return min(runs, key=lambda run: run.inertia)
