"""The study's one figure: losses, initialisations, layers and numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.judge.design import UNTRAINED

BLUE, RED, GREY = "#30638e", "#c8553d", "#888888"


def draw(r: Mapping[str, Any], path: Path) -> None:
    """Write the figure as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (losses, scatter), (layers, rows) = figure.subplots(2, 2)
    _losses(r, losses)
    _scatter(r, scatter)
    _layers(r, layers)
    _rows(r, rows)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def _nll(r: Mapping[str, Any]) -> float:
    return float(r["rivals"]["A, all rows"]["nll"]["macro"]["value"])


def _losses(r: Mapping[str, Any], axes: Any) -> None:
    """AUC minus nll of the score `answer` and of `legacy`, all main configurations with a clean warm-up."""
    d, shown = r["design"], []
    for group in r["groups"]:
        cell = group["cell"]
        rows, rate = (d["warm"], d["rate"]) if cell["mode"] == "observer" else (d["applied_rows"], d["applied_rate"])
        unseen = cell["loss"] != "contrastive" or cell["left_out"]
        if cell["warm"] == "clean" and cell["rows"] == rows and cell["rate"] == rate and cell["weight"] == 1 and unseen:
            shown.append((f"{cell['mode']} {cell['loss']} {cell['bias']:g}", group["scores"]))
    for n, (_, scores) in enumerate(shown):
        for name, colour, shift in (("answer", BLUE, 0.15), ("legacy", RED, -0.15)):
            x = scores[name]["minus_nll"]
            axes.plot([x["low"], x["high"]], [n + shift] * 2, color=colour, lw=1)
            axes.plot(x["value"], n + shift, "o", color=colour, ms=3, label=name if n == 0 else None)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("AUC minus that of nll (95 %)")
    axes.legend(fontsize=7)


def _scatter(r: Mapping[str, Any], axes: Any) -> None:
    """Single untrained gates, and gates trained with permuted labels."""
    values = {name: x["values"] for name, x in r["controls"]["untrained"]["A"].items() if "raw" not in name}
    values |= {f"permuted, {name}": x["values"] for name, x in r["controls"]["permuted_in_training"].items()}
    for n, single in enumerate(values.values()):
        axes.plot(
            single, [n + 0.3 * ((i * 0.618) % 1 - 0.5) for i in range(len(single))], "o", color=GREY, ms=3, alpha=0.6
        )
        axes.plot(sum(single) / len(single), n, "|", color=RED, ms=14)
    axes.axvline(0.5, color=GREY, lw=0.8)
    axes.set_yticks(range(len(values)), [f"{name}" for name in values], fontsize=7)
    axes.set_xlabel("AUC of single gates without training (red: mean)")


def _layers(r: Mapping[str, Any], axes: Any) -> None:
    """The best observer by one layer alone."""
    single = [(int(name), s["macro"]["value"]) for name, s in r["layers"].items() if name.isdigit()]
    if single:
        axes.plot(*zip(*single, strict=True), "o-", color=BLUE, ms=3, label="one layer")
        axes.axhline(r["layers"]["all"]["macro"]["value"], color=BLUE, lw=0.8, ls="--", label="all layers")
    axes.axhline(_nll(r), color=RED, lw=0.8, label="nll")
    axes.set_xlabel("layer")
    axes.set_ylabel("AUC of the best observer")
    axes.legend(fontsize=7)


def _rows(r: Mapping[str, Any], axes: Any) -> None:
    """AUC of `answer` over the number of warm-up rows."""
    d = r["design"]
    by_loss: dict[str, dict[int, tuple[float, float, float]]] = {}
    for group in r["groups"]:
        cell = group["cell"]
        plain = (
            cell["mode"] == "observer" and cell["warm"] == "clean" and cell["bias"] == 0 and cell["rate"] == d["rate"]
        )
        if plain and cell["loss"] != UNTRAINED and (cell["loss"] != "contrastive" or cell["left_out"]):
            x = group["scores"]["answer"]["macro"]
            by_loss.setdefault(cell["loss"], {})[cell["rows"]] = (x["value"], x["low"], x["high"])
    for loss, found in by_loss.items():
        counts = sorted(found)
        axes.plot(counts, [found[n][0] for n in counts], "o-", ms=3, label=loss)
        axes.fill_between(counts, [found[n][1] for n in counts], [found[n][2] for n in counts], alpha=0.12)
    axes.axhline(_nll(r), color=RED, lw=0.8, label="nll")
    axes.set_xlabel("warm-up rows")
    axes.set_ylabel("AUC of `answer`")
    axes.legend(fontsize=6)
