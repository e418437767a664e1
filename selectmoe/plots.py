"""The report's plots, as data URIs: the same numbers give the same bytes.

No command runs this module.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from selectmoe.verdict import Verdict

MAX_POINTS = 5000
"""Points of the cluster map at most; of more, evenly spaced ones are drawn."""


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def forest(verdict: Verdict) -> str:
    """Effect of every arm against random, with its 95 % interval."""
    arms = list(reversed(verdict.arms))
    figure, axes = _figure(6.5, 0.9 + 0.4 * len(arms))
    for place, arm in enumerate(arms):
        low, high = arm.ci95
        axes.plot([low, high], [place, place], color="#3b6ea5", linewidth=2)
        axes.plot(arm.effect, place, "o", color="#3b6ea5")
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(-0.5, len(arms) - 0.5)
    axes.set_xlabel(f"better than random by ({verdict.metric}); 95 % interval")
    return _uri(figure)


def gate_scores(scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_]) -> str:
    """Distribution of the rows' gate scores, planted rows apart."""
    figure, axes = _figure(6.5, 3)
    finite = np.isfinite(scores)
    edges = np.histogram_bin_edges(scores[finite], bins=40)
    axes.hist(scores[finite & ~planted], edges, alpha=0.7, label="rows of the pool", color="#3b6ea5")
    if planted.any():
        axes.hist(scores[finite & planted], edges, alpha=0.7, label="planted rows", color="#c8553d")
        axes.legend()
    axes.set_xlabel("good ratio of the answer, mean over layers")
    axes.set_ylabel("rows")
    return _uri(figure)


def cluster_map(clusters: Mapping[str, Sequence[Any]]) -> str:
    """The rows by their routing (first two principal components); chosen ones marked."""
    figure, axes = _figure(6.5, 4.5)
    points = [
        (x, y, c, rank)
        for x, y, c, rank in zip(
            clusters["x"], clusters["y"], clusters["cluster"], clusters["selected_rank"], strict=True
        )
        if x is not None
    ]
    shown = points[:: max(1, len(points) // MAX_POINTS)]
    axes.scatter(
        [p[0] for p in shown],
        [p[1] for p in shown],
        c=[-1 if p[2] is None else p[2] for p in shown],
        s=8,
        cmap="viridis",
        alpha=0.6,
    )
    chosen = [p for p in points if p[3] is not None]
    axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=36, facecolors="none", edgecolors="#c8553d")
    axes.set_xlabel("first component of the routing")
    axes.set_ylabel("second")
    return _uri(figure)
