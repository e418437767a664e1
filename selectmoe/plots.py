"""The report's plots, as data URIs: the same numbers give the same bytes, and no input makes them large.

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
"""Points of the cluster map at most, and circles; of more, evenly spaced ones are drawn."""
MAX_ARMS = 30
"""Arms of the interval plot at most, the first ones."""
MAX_LABEL = 32
"""Characters of a label at most."""
COLOURS = {"beats_random": "#2a7f62", "no_evidence": "#3b6ea5", "worse_than_random": "#c8553d"}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def png(figure: Figure) -> bytes:
    """A figure as PNG; the same numbers give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def uri(image: bytes) -> str:
    """A PNG as data URI."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _uri(figure: Figure) -> str:
    return uri(png(figure))


def label(text: object) -> str:
    """Text for an axis: short, and never read as a formula."""
    words = str(text)
    return (words if len(words) <= MAX_LABEL else words[: MAX_LABEL - 1] + "…").replace("$", r"\$")


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most MAX_POINTS of them, evenly spaced."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[int(i)] for i in np.linspace(0, len(points) - 1, MAX_POINTS)]


def forest(verdict: Verdict) -> str:
    """Effect of every arm against random, with its 95 % interval; a control's marker is hollow."""
    arms = list(reversed(verdict.arms[:MAX_ARMS]))
    figure, axes = _figure(7.5, 0.9 + 0.4 * len(arms))
    for place, arm in enumerate(arms):
        colour = COLOURS[arm.verdict]
        axes.plot(arm.ci95, [place, place], color=colour, linewidth=2)
        axes.plot(arm.effect, place, "o", color=colour, markerfacecolor="white" if arm.control else colour)
    axes.axvline(0, color="#555555", linewidth=1)
    names = [label(arm.name) + (" (control)" if arm.control else "") for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(-0.5, len(arms) - 0.5)
    values = axes.secondary_yaxis("right")
    values.set_yticks(
        range(len(arms)), [f"{arm.effect:+.4f} ({arm.ci95[0]:+.4f} to {arm.ci95[1]:+.4f})" for arm in arms]
    )
    values.tick_params(length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"gain over {label(verdict.baseline)} in {label(verdict.metric)}; 95 % interval")
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
    columns = (clusters[name] for name in ("x", "y", "cluster", "selected_rank"))
    points = [point for point in zip(*columns, strict=True) if point[0] is not None]
    shown = _thinned(points)
    axes.scatter(
        [p[0] for p in shown],
        [p[1] for p in shown],
        c=[-1 if p[2] is None else p[2] for p in shown],
        s=8,
        cmap="viridis",
        alpha=0.6,
    )
    chosen = _thinned([p for p in points if p[3] is not None])
    axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=36, facecolors="none", edgecolors="#c8553d")
    axes.set_xlabel("first component of the routing")
    axes.set_ylabel("second")
    return _uri(figure)


def heat_maps(shares: Mapping[str, npt.NDArray[np.float64]], sources: Sequence[str], clusters: Sequence[str]) -> str:
    """One map of shares by source and cluster per panel, all in one scale.

    Args:
        shares: panel (`pool`, an arm) -> [sources, clusters] shares of its rows.
        sources: names of the lines.
        clusters: names of the columns.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    lines = (len(shares) + 1) // 2
    figure = Figure(figsize=(10, lines * (0.9 + 0.17 * len(sources))), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False, sharex=True, sharey=True)
    most = max((float(panel.max()) for panel in shares.values()), default=0.0) or 1.0
    colours = ScalarMappable(Normalize(0, most), "Blues")
    for axes, (name, panel) in zip(grid.flat, shares.items(), strict=False):
        axes.imshow(panel, cmap=colours.cmap, norm=colours.norm, aspect="auto", interpolation="nearest")
        axes.set_title(label(name), fontsize=10)
        axes.set_yticks(range(len(sources)), [label(source) for source in sources], fontsize=8)
        step = max(1, len(clusters) // 16)
        axes.set_xticks(range(0, len(clusters), step), clusters[::step], fontsize=7, rotation=90)
    for axes in grid.flat[len(shares) :]:
        axes.set_visible(False)
        if lines > 1:  # the shared labels would have stood below the hidden one
            grid[-2, -1].tick_params(labelbottom=True)
    figure.supxlabel("cluster", fontsize=9)
    figure.colorbar(colours, ax=grid, format=lambda share, _: f"{share:.1%}", shrink=0.8)
    return _uri(figure)
