"""Spherical k-means: right, and the same bytes at any thread count. Run: pytest tests/unit/test_kmeans.py"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe.errors import UserError
from selectmoe.kmeans import Clustering, Rows, plus_plus, spherical_kmeans


def blobs(n: int = 300, k: int = 5, layers: int = 3, experts: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The workload `clusters` of the specification, small: features [n, layers * experts] and true labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    logits = rng.normal(size=(layers, experts)) + 1.5 * rng.normal(size=(k, layers, experts))[labels]
    logits += 0.2 * rng.normal(size=(n, layers, experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return probs.reshape(n, -1).astype(np.float32), labels


def digest(c: Clustering) -> str:
    return hashlib.sha256(c.labels.tobytes() + c.centres.tobytes() + c.distance.tobytes()).hexdigest()


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def test_finds_planted_clusters_and_is_a_fixed_point() -> None:
    x, truth = blobs()
    found = spherical_kmeans(x, 5, seed=1)
    assert same_partition(found.labels, truth)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cos = unit.astype(np.float64) @ found.centres.T
    assert (cos.argmax(1) == found.labels).all()
    assert found.inertia == pytest.approx((1 - cos.max(1)).sum(), abs=1e-5)
    assert np.allclose(np.linalg.norm(found.centres, axis=1), 1)
    for c in range(5):
        mean = unit[found.labels == c].sum(0)
        assert 1 - found.centres[c] @ mean / np.linalg.norm(mean) < 1e-4


def test_scale_of_rows_does_not_matter() -> None:
    x, _ = blobs(60)
    scale = 2.0 ** np.random.default_rng(0).integers(-90, 90, size=(60, 1))
    assert digest(spherical_kmeans(x, 4, 0)) == digest(spherical_kmeans(x.astype(np.float64) * scale, 4, 0))


THREADS = """
import hashlib, numpy as np
from selectmoe.choose_k import choose_k
from selectmoe.kmeans import spherical_kmeans
rng = np.random.default_rng(0)
x = np.abs(rng.normal(size=(1500, 96))) + 4           # cosines near 1: many near ties
a = spherical_kmeans(x, 40, 3, restarts=3)
b = choose_k(x, range(2, 6), "silhouette", 3, restarts=2)
print(hashlib.sha256(a.labels.tobytes() + a.centres.tobytes() + repr((a.inertia, b.k, b.curve)).encode()).hexdigest())
"""


def test_same_bytes_at_any_thread_count() -> None:
    found = set()
    for threads in ("1", "2"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        found.add(
            subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(found) == 1
    assert len(found.pop()) == 65


def test_workers_change_nothing() -> None:
    x, _ = blobs(200)
    assert digest(spherical_kmeans(x, 6, 2, threads=1)) == digest(spherical_kmeans(x, 6, 2, threads=4))


def test_near_ties_are_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 product that is wrong within its bound does not change the result."""
    rng = np.random.default_rng(5)
    x = np.abs(rng.normal(size=(400, 64))) + 8
    want = digest(spherical_kmeans(x, 12, 1, restarts=2))
    rows = Rows(x)
    rows.single = rows.single + np.float32(2**-26) * rng.choice([-1, 1], size=rows.single.shape).astype(np.float32)
    assert digest(spherical_kmeans(rows, 12, 1, restarts=2)) == want


def test_spec7_32_restarts_are_different() -> None:
    x, _ = blobs()
    starts = plus_plus(Rows(x), 5, seed=0, restarts=10)
    assert len({tuple(s) for s in starts}) == 10
    assert all(len(set(s)) == 5 for s in starts)
    best = min(spherical_kmeans(x, 5, 0, restarts=r).inertia for r in (1, 2, 5))
    assert spherical_kmeans(x, 5, 0, restarts=10).inertia <= best


def test_starts_for_fewer_clusters_are_a_prefix() -> None:
    rows = Rows(blobs()[0])
    assert (plus_plus(rows, 9, 4, 3)[:, :5] == plus_plus(rows, 5, 4, 3)).all()


@pytest.mark.parametrize("k", [0, -1, 5])
def test_spec7_35_k_out_of_range(k: int) -> None:
    with pytest.raises(UserError, match="between 1 and"):
        spherical_kmeans(np.eye(4), k, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_spec7_35_rows_without_direction(bad: float) -> None:
    x = np.eye(4)
    x[2] = bad
    with pytest.raises(UserError, match="row 2"):
        spherical_kmeans(x, 2, 0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_features_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="shape"):
        spherical_kmeans(np.ones(shape), 1, 0)


def test_spec7_35_more_clusters_than_distinct_rows() -> None:
    x = np.repeat(np.eye(3), 4, axis=0)
    found = spherical_kmeans(x, 5, 0)
    assert set(found.labels) == set(range(5))
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert len({(int(c), tuple(row)) for c, row in zip(found.labels, x, strict=True)}) == 5


def test_opposed_rows_that_cancel_out() -> None:
    found = spherical_kmeans(np.array([[1.0, 0], [-1.0, 0]]), 1, 0)
    assert np.isfinite(found.centres).all()
    assert found.inertia == pytest.approx(2)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 6), distinct=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_any_input_gives_k_clusters_none_empty(n: int, d: int, distinct: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random((distinct, d))[rng.integers(distinct, size=n)] + 1e-3
    k = data.draw(st.integers(1, n))
    found = spherical_kmeans(x, k, seed, restarts=2, max_iters=20)
    assert np.bincount(found.labels, minlength=k).min() >= 1
    assert np.isfinite(found.inertia)
    assert (found.distance >= 0).all()
    assert digest(found) == digest(spherical_kmeans(x, k, seed, restarts=2, max_iters=20, threads=3))
