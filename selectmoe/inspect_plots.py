"""The plots of `selectmoe inspect`, as PNG: the same numbers give the same bytes, and no input makes them large.

No command runs this module. What a judge or a file does not have gives no plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe.inspect_data import GATES, Findings, Source
from selectmoe.plots import label, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 12
"""Sources in a plot at most, those with the most rows."""
POINTS = 5000
"""Pieces of work in the scatter plot at most, evenly spaced."""
BLUE, RED, GREY, YELLOW = "#3b6ea5", "#c8553d", "#555555", "#ffd400"
COLOURS = ("#3b6ea5", "#c8553d", "#2a7f62", "#8a5a00", "#6b4c9a", "#4a9aa8", "#b0487f", "#555555")
CLIP = 8.0
"""An expert's use is shown between 1/CLIP and CLIP times an even share."""

Layers = Sequence[Mapping[str, Any]]


def draw(found: Findings, numbers: Mapping[str, Any]) -> dict[str, bytes]:
    """Every plot that these router data allow, by name."""
    known = any(source["tokens"] for source in numbers["sources"].values())
    figures = {
        "gates": gates(numbers) if numbers["gate"] else None,
        "experts": experts(numbers["use"]) if numbers["use"] else None,
        "entropy": entropy(numbers) if numbers["entropy"] else None,
        "lengths": lengths(found, numbers) if known else None,
        "scores": scores(found) if numbers["scores"] else None,
        "work": work(found.units) if found.units else None,
    }
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def largest(numbers: Mapping[str, Any]) -> list[str]:
    """The sources that are shown: those with the most rows, by name."""
    rows = {name: source["rows"] for name, source in numbers["sources"].items()}
    return sorted(sorted(rows, key=lambda name: (-rows[name], name))[:PANELS])


def _band(axes: Any, layers: Layers, colour: str) -> None:
    """Median and the middle half and nine tenths of the values of every layer."""
    at = [n for n, layer in enumerate(layers) if layer["values"]]
    for low, high, alpha in (("p5", "p95", 0.2), ("p25", "p75", 0.4)):
        lows, highs = ([layers[n][key] for n in at] for key in (low, high))
        axes.fill_between(at, lows, highs, alpha=alpha, color=colour, linewidth=0)
    axes.plot(at, [layers[n]["median"] for n in at], "o-", color=colour, markersize=3, linewidth=1.2)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.locator_params(axis="x", integer=True)


def gates(numbers: Mapping[str, Any]) -> Figure:
    """What the gates say, layer by layer: all rows, then a panel per source."""
    names = largest(numbers)
    panels = {"all rows": (numbers["rows"], numbers["gate"]["layers"])} if len(numbers["sources"]) > 1 else {}
    panels |= {name: (numbers["sources"][name]["rows"], numbers["sources"][name]["gate"]) for name in names}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(max(6.0, 3.6 * columns), 0.7 + 2.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for n, (axes, (name, (rows, layers))) in enumerate(zip(grid.flat, panels.items())):
        _band(axes, layers, GREY if name == "all rows" else BLUE)
        axes.set_title(f"{label(name)} ({rows:,})", fontsize=9)
        axes.tick_params(labelsize=8, labelbottom=n + columns >= len(panels))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel(GATES[numbers["gate"]["tensor"]], fontsize=9)
    return figure


def experts(use: Mapping[str, Any]) -> Figure:
    """Mean probability of every expert by layer, against an even share; dead experts are marked."""
    from matplotlib.colors import LogNorm

    shares = np.array(use["mean"])
    layers, count = shares.shape
    figure = _figure(max(6.0, min(14.0, 2.2 + 0.14 * count)), max(2.6, min(10.0, 1.2 + 0.24 * layers)))
    axes = figure.add_subplot()
    relative = np.clip(shares * count, 1 / CLIP, CLIP)
    image = axes.imshow(relative, cmap="PuOr_r", norm=LogNorm(1 / CLIP, CLIP), aspect="auto", interpolation="nearest")
    if use["dead"]:
        at, dead = zip(*use["dead"])
        axes.plot(dead, at, "x", color=YELLOW, markersize=5, markeredgewidth=1.6)
    axes.set_xlabel("expert" + ("; crosses: dead" if use["dead"] else ""))
    axes.set_ylabel("layer")
    axes.locator_params(axis="both", integer=True)
    bar = figure.colorbar(image, ax=axes, label="mean probability / even share")
    bar.minorticks_off()
    ticks = [1 / CLIP, 0.25, 0.5, 1, 2, 4, CLIP]
    bar.set_ticks(ticks, labels=["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    return figure


def entropy(numbers: Mapping[str, Any]) -> Figure:
    """How evenly rows spread over the experts, by layer; 1 is even. Sources' medians as thin lines."""
    figure = _figure(7, 3.4)
    axes = figure.add_subplot()
    layers = numbers["entropy"]
    names = largest(numbers)
    if len(numbers["sources"]) > 1:
        for n, name in enumerate(names):
            medians = [layer["median"] for layer in numbers["sources"][name]["entropy"]]
            style = "-" if n < len(COLOURS) else ":"
            axes.plot(medians, style, color=COLOURS[n % len(COLOURS)], linewidth=0.8, label=label(name), zorder=3)
    _band(axes, layers, GREY)
    axes.plot([layer["of_mean"] for layer in layers], "--", color=GREY, linewidth=1.2, label="of the mean of all rows")
    axes.set_xlabel("layer (grey: median, middle half and nine tenths of all rows)")
    axes.set_ylabel("routing entropy / ln E")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def lengths(found: Findings, numbers: Mapping[str, Any]) -> Figure:
    """Tokens of a row and of its answer, and per source where most of its rows lie and how many were cut."""
    known = [source for source in found.sources if numbers["sources"][source.name]["tokens"]]
    names = [name for name in largest(numbers) if numbers["sources"][name]["tokens"]]
    figure = _figure(10, max(3.2, 1.2 + 0.32 * len(names)))
    left, right = figure.subplots(1, 2)
    top = max(2, max(int(source.columns["tokens"].max()) for source in known))
    edges = np.unique(np.round(np.geomspace(1, top + 1, 32)))
    for name, text, colour in (("tokens", "row", BLUE), ("answer_tokens", "answer", RED)):
        values = np.concatenate([source.columns[name] for source in known])
        left.hist(values[values > 0], edges, histtype="step", linewidth=1.4, color=colour, label=text)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(1, 1.1 * top)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
    left.set_xlabel("tokens")
    left.set_ylabel("rows")
    left.legend(fontsize=8)
    for place, name in enumerate(reversed(names)):
        source = numbers["sources"][name]
        for key, shift, colour in (("tokens", 0.14, BLUE), ("answer_tokens", -0.14, RED)):
            _whisker(right, source[key], place + shift, colour)
    right.set_yticks(range(len(names)), [label(name) for name in reversed(names)], fontsize=8)
    right.set_ylim(-0.6, len(names) - 0.4)
    right.set_xlabel("tokens (p5 to p95, middle half, median)")
    cut = right.secondary_yaxis("right")
    texts = [f"{numbers['sources'][name]['truncated']:.1%} cut" for name in reversed(names)]
    cut.set_yticks(range(len(names)), texts, fontsize=8)
    cut.tick_params(length=0)
    return figure


def _whisker(axes: Any, quantiles: Mapping[str, Any], at: float, colour: str) -> None:
    low, high, a, b, middle = (max(1, quantiles[key]) for key in ("p5", "p95", "p25", "p75", "median"))
    axes.plot([low, high], [at, at], color=colour, linewidth=1)
    axes.plot([a, b], [at, at], color=colour, linewidth=4, solid_capstyle="butt")
    axes.plot(middle, at, "|", color="white", markersize=7, markeredgewidth=1.6)


def scores(found: Findings) -> Figure:
    """Distribution of every score, sources side by side as shares of their rows."""
    names = found.scores
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(max(6.0, 3.8 * columns), 0.8 + 2.5 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    biggest = sorted(found.sources, key=lambda source: (-source.rows, source.name))[: len(COLOURS)]
    sources = sorted(biggest, key=lambda source: source.name)
    for axes, name in zip(grid.flat, names):
        _histograms(axes, sources, name)
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supylabel("share of the source's rows", fontsize=9)
    if len(sources) > 1:
        handles, texts = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, texts, fontsize=8, loc="outside lower center", ncols=min(4, len(texts)))
    return figure


def _histograms(axes: Any, sources: Sequence[Source], name: str) -> None:
    values = [source.columns[name][np.isfinite(source.columns[name])].astype(np.float64) for source in sources]
    together: npt.NDArray[np.float64] = np.concatenate(values)
    low, high = np.quantile(together, [0.002, 0.998]) if len(together) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1e-6, 31)
    for n, (source, here) in enumerate(zip(sources, values)):
        if len(here):
            counts = np.histogram(np.clip(here, edges[0], edges[-1]), edges)[0]
            axes.stairs(counts / len(here), edges, color=COLOURS[n % len(COLOURS)], label=label(source.name))


def work(units: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of every piece of work by the tokens that it computed; the slowest are marked."""
    shown = [units[int(i)] for i in np.linspace(0, len(units) - 1, min(len(units), POINTS))]
    slow = sorted(units, key=lambda unit: -unit["seconds"])[:10]
    figure = _figure(6.5, 3.2)
    axes = figure.add_subplot()
    axes.plot([u["padded_tokens"] for u in shown], [u["seconds"] for u in shown], ".", color=BLUE, markersize=4)
    axes.plot([u["padded_tokens"] for u in slow], [u["seconds"] for u in slow], "o", color=RED, fillstyle="none")
    axes.set_xlabel("tokens of a piece of work, padding included (circles: the ten slowest)")
    axes.set_ylabel("seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure
