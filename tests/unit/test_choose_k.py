"""The choice of k. Run: pytest tests/unit/test_choose_k.py"""

from __future__ import annotations

import numpy as np
import pytest

from selectmoe.choose_k import CRITERIA, calinski_harabasz, choose_k, elbow, silhouette
from selectmoe.errors import UserError
from selectmoe.kmeans import Rows, spherical_kmeans


def blobs(n: int = 300, k: int = 5, layers: int = 3, experts: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The workload `clusters` of the specification, small: features [n, layers * experts] and true labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    logits = rng.normal(size=(layers, experts)) + 1.5 * rng.normal(size=(k, layers, experts))[labels]
    logits += 0.2 * rng.normal(size=(n, layers, experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return probs.reshape(n, -1).astype(np.float32), labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_spec7_33_automatic_k_finds_the_true_k(criterion: str) -> None:
    x, truth = blobs(240, k=6, seed=3)
    choice = choose_k(x, range(3, 11), criterion, seed=42)
    assert choice.k == 6
    assert same_partition(choice.clustering.labels, truth)
    assert [point["k"] for point in choice.curve] == list(range(3, 11))
    assert all(point["inertia"] is not None for point in choice.curve)
    alone = spherical_kmeans(x, 6, 42)
    assert (choice.clustering.labels == alone.labels).all()
    assert (choice.clustering.centres == alone.centres).all()


def test_criteria_agree_with_their_definitions() -> None:
    from sklearn.metrics import calinski_harabasz_score

    x, _ = blobs(150, k=4)
    rows, found = Rows(x), spherical_kmeans(x, 4, 0)
    unit = rows.single.astype(np.float64)
    assert calinski_harabasz(rows, found) == pytest.approx(calinski_harabasz_score(unit, found.labels), rel=1e-4)
    distance = np.sort(1 - unit @ found.centres.T, axis=1)
    want = ((distance[:, 1] - distance[:, 0]) / distance[:, 1]).mean()
    assert silhouette(rows, found) == pytest.approx(want, abs=1e-5)
    bends = elbow(np.array([2.0, 4.0, 5.0, 6.0]), np.array([10.0, 4.0, 3.0, 2.0]))
    assert bends == pytest.approx([2 * (-1 / 8 + 6 / 16) / 3, 0])


def test_unknown_criterion_and_impossible_range() -> None:
    x, _ = blobs(20)
    with pytest.raises(UserError, match="known: silhouette"):
        choose_k(x, range(2, 5), "gap", 0)
    with pytest.raises(UserError, match="k_range"):
        choose_k(x, range(25, 20), "silhouette", 0)
    with pytest.raises(UserError, match="at least 3"):
        choose_k(x, range(2, 4), "elbow", 0)
