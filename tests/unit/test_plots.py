"""`selectmoe.plots`: same numbers, same bytes; nothing is drawn from what is not there."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from selectmoe import plots
from selectmoe.verdict import Arm, Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def verdict(*arms: str) -> Verdict:
    """A verdict with these arms."""
    made = [Arm(name, "no_evidence", 0.01 * i, (-0.1, 0.1), 0.5, 4.0, 0.2, False, 3, "") for i, name in enumerate(arms)]
    return Verdict("no_evidence", "bits", made, 3, 40)


def image(uri: str) -> bytes:
    """The bytes of a data URI."""
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


@pytest.mark.parametrize("arms", [("selected",), ("selected", "oracle", "nll")])
def test_forest_is_a_png_and_repeats_to_the_byte(arms: tuple[str, ...]) -> None:
    first, second = (plots.forest(verdict(*arms)) for _ in range(2))
    assert first == second
    assert image(first).startswith(PNG)


def test_gate_scores_leave_out_rows_without_a_score() -> None:
    scores = np.linspace(0, 1, 50)
    planted = np.arange(50) < 20
    with_nan, nan_planted = np.append(scores, [np.nan, np.nan]), np.append(planted, [True, False])
    assert plots.gate_scores(with_nan, nan_planted) == plots.gate_scores(scores, planted)
    assert plots.gate_scores(scores, np.zeros(50, bool)) != plots.gate_scores(scores, planted)


def test_cluster_map_takes_rows_without_a_cluster_and_bounds_its_points() -> None:
    n = 3 * plots.MAX_POINTS
    rng = np.random.default_rng(0)
    columns = {
        "x": [None, *rng.normal(size=n).tolist()],
        "y": [None, *rng.normal(size=n).tolist()],
        "cluster": [None, None, *[1] * (n - 1)],
        "selected_rank": [None, 1, *[None] * (n - 1)],
    }
    columns["selected_rank"][2:] = range(2, n + 1)  # every point is circled
    uri = plots.cluster_map(columns)
    assert image(uri).startswith(PNG)
    assert len(uri) < 2**20


def test_forest_of_thousands_of_arms_and_of_hostile_names_stays_small() -> None:
    names = [r"$\frac{" + "x" * 5000, *[f"arm{i}" for i in range(3000)]]
    uri = plots.forest(verdict(*names))
    assert image(uri).startswith(PNG)
    assert len(uri) < 2**18


@pytest.mark.parametrize("panels", [["pool"], ["pool", "selected", "random"]])
def test_heat_maps_are_one_image_of_any_number_of_panels(panels: list[str]) -> None:
    shares = {name: np.full((2, 3), 0.1 * i) for i, name in enumerate(panels)}
    first, second = (plots.heat_maps(shares, ["a", "$b"], ["0", "1", "not clustered"]) for _ in range(2))
    assert first == second
    assert image(first).startswith(PNG)
