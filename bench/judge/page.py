"""The study's page: tables and sentences made from `judge.json` alone, so that none of them can be older than the numbers.

No command runs this module; `bench/study_judge.py` calls `write`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.judge import design, statistics
from bench.judge.design import UNTRAINED
from bench.judge.figure import draw
from bench.judge.findings import CHOSEN_FROM, GATE_SCORES, RIVALS
from bench.judge.study import Study, commit

PAGE = "judge.md"
FIGURE = "judge.png"
RESULTS = "judge.json"
AIM = 120
"""Minutes of wall time that the study may take on two cores with nothing else running."""

Number = Mapping[str, Any]
Results = Mapping[str, Any]


def provenance(study: Study, smoke: bool) -> dict[str, Any]:
    """What the numbers come from."""
    cells = sorted((study.folder / "cells").glob("*.npz"))
    begun = json.loads(study.store.get("begun.json") or b"{}")
    spent = [float(found["seconds"]) for path in cells if (found := study.result(path.stem))]
    return {
        "commit": begun["commit"],
        "commit_page": commit(),
        "command": "python -m bench.study_judge FOLDER --smoke" if smoke else "make study-judge",
        "smoke": smoke,
        "design": begun["design"],
        "kinds": list(study.d.kinds),
        "layers_of_judge": study.shape()[0],
        "rows": {name: study.count(name) for name in study.pools},
        "cells": len(cells),
        "cell_seconds": sum(spent),
        "wall_seconds": study.clock(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def write(results: Results, folder: Path) -> None:
    """Write the results, their figure and their page."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = statistics.rounded(results)
    (folder / RESULTS).write_text(json.dumps(kept, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    draw(kept, folder / FIGURE)
    (folder / PAGE).write_text("\n".join(lines(kept)) + "\n", encoding="utf-8")


def rewrite(folder: Path) -> None:
    """Write figure and page of the results that are stored there: after a change of words, without the study."""
    write(json.loads((folder / RESULTS).read_text(encoding="utf-8")), folder)


def lines(r: Results) -> Iterator[str]:
    """The whole page."""
    for part in (_head, _answer, _main_table, _kinds, _choice, _confirmation, _dependence, _controls, _how):
        yield from part(r)
        yield ""


def interval(x: Number | None, sign: bool = False) -> str:
    """`0.812 (0.79 to 0.83)`."""
    if x is None:
        return ""
    form = "+" if sign else ""
    return f"{x['value']:{form}.3f} ({x['low']:{form}.2f} to {x['high']:{form}.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def of_a(r: Results) -> dict[str, Mapping[str, Any]]:
    """The rivals on pool A."""
    return {where: scores for where, scores in r["rivals"].items() if where.startswith("A")}


def is_main(r: Results, cell: Mapping[str, Any]) -> bool:
    """Whether the configuration is in the main table: the grid's own rows, rate and weight."""
    d = r["design"]
    rows, rate = (d["warm"], d["rate"]) if cell["mode"] == "observer" else (d["applied_rows"], d["applied_rate"])
    return bool(cell["loss"] == UNTRAINED or (cell["rows"] == rows and cell["rate"] == rate and cell["weight"] == 1))


def label(cell: Mapping[str, Any]) -> str:
    """A configuration's loss in words."""
    if cell["loss"] == "contrastive":
        return "contrastive, kind not seen" if cell["left_out"] else "contrastive, all kinds seen"
    return "none" if cell["loss"] == UNTRAINED else str(cell["loss"])


def find(r: Results, **wanted: Any) -> Mapping[str, Any] | None:
    """The first group whose configuration has these values."""
    for group in r["groups"]:
        if all(group["cell"][key] == value for key, value in wanted.items()) and (
            group["cell"]["loss"] != "contrastive" or group["cell"]["left_out"]
        ):
            return group  # type: ignore[no-any-return]
    return None


def _head(r: Results) -> Iterator[str]:
    yield "# Which gate loss makes a judge?\n"
    if r["smoke"]:
        yield "**A smoke run on a tiny model: the numbers mean nothing.**\n"
    else:
        yield "```bash long\nmake study-judge\n```\n"
    d, rows = r["design"], r["rows"]
    later = "" if r["commit_page"] == r["commit"] else f" (finished and written at `{r['commit_page']}`)"
    sources = "; ".join(f"{name}: {', '.join(names)}" for name, names in d["sources"])
    yield (
        f"Commit `{r['commit']}`{later}, {r['cells']} cells. {wall(r)} Written by the command from `{RESULTS}`, which holds every "
        "number. Judge: "
        f"{r['layers_of_judge']} layers{'' if r['smoke'] else ' (SmolLM2-135M-Instruct upcycled at full depth, 4 experts, top-1)'}. "
        f"Two pools without a common source ({sources}), "
        + ", ".join(f"{n}: {c['clean']} clean and {c['planted']} planted rows scored" for n, c in rows.items())
        + f". Kinds: {', '.join(r['kinds'])}."
    )
    yield (
        "\nA score's number is its AUC, planted against clean rows, per kind and then the mean over kinds (0.5: a coin). Intervals: 95 %, "
        "bootstrap over rows and seeds (few seeds: somewhat too narrow). Rows that are scored were never in a warm-up; *in-sample* is a "
        "column by itself. `contrastive` is judged on each kind by gates that did not see this kind. **An AUC on planted rows is not "
        "quality**: whether a selection makes a better model is what the verdict of a run says."
    )


def wall(r: Results) -> str:
    """How long it took, and what else the machine did."""
    which = "over all starts" if "wall_seconds" in r else "by the last start"
    seconds = r.get("wall_seconds", r.get("last_start_seconds", 0.0))
    return (
        f"Wall time {seconds / 60:.0f} min {which} on {r['cores']} cores, whose load was {r['load']:.1f} when it ended "
        f"(aim: {AIM} min with nothing else running); training and scoring cells took {r['cell_seconds'] / 60:.0f} min of it."
    )


def beats(x: Number) -> str:
    """In words, which way a paired difference's interval points."""
    return "beats it" if x["low"] > 0 else "loses to it" if x["high"] < 0 else "cannot be told from it"


def _answer(r: Results) -> Iterator[str]:
    yield "## The answer\n"
    yield from _recipe(r)
    for group in r["confirmed"]["groups"]:
        cell = group["cell"]
        if same(cell, r["chosen"]["cell"]):
            s = group["scores"][r["chosen"]["score"]]
            yield (
                f"- Chosen on pool A: {cell['mode']}, {label(cell)}, bias {cell['bias']:g}, score `{r['chosen']['score']}`. Once on pool B "
                f"({cell['warm']} warm-up): AUC {interval(s['macro'])}; minus `nll` {interval(s['minus_nll'], True)}: it "
                f"{beats(s['minus_nll'])}; minus the best untrained gates {interval(s['minus_untrained'], True)}: it "
                f"{beats(s['minus_untrained'])}."
            )
            c, rival = group["scores"]["combined"], r["rivals"]["B, all rows"]["nll_ifd"]["macro"]
            more = c["macro"]["value"] - rival["value"]
            yield (
                f"  With perplexity in it (`combined`): AUC {interval(c['macro'])}; minus `nll` {interval(c['minus_nll'], True)}: it "
                f"{beats(c['minus_nll'])}. The same ranks without a gate (`nll_ifd`) have {interval(rival)}: the gate adds "
                f"{f'{more:+.3f}' if more > 0 else 'nothing'} to them (no paired interval)."
            )
    for which, words in (("minus_untrained", "the best untrained gates"), ("minus_nll", "`nll`")):
        names = [
            f"{g['cell']['mode']} {label(g['cell'])}, bias {g['cell']['bias']:g}, {g['cell']['warm']} (`{name}`)"
            for g in r["groups"]
            for name in CHOSEN_FROM
            if is_main(r, g["cell"]) and g["cell"]["loss"] != UNTRAINED and g["scores"][name][which]["low"] > 0
        ]
        yield f"- Beat {words} on pool A by a gate alone: {'; '.join(names) or 'none'}."
    untrained = r["controls"]["untrained"]["A"]["bias 0, answer"]
    yield (
        f"- One untrained gate can look good: over {untrained['n']} initialisations the AUC of `answer` goes from "
        f"{untrained['smallest']:.2f} to {untrained['largest']:.2f}; only their mean is a coin ({interval(untrained)})."
    )


def _recipe(r: Results) -> Iterator[str]:
    """What the predecessor's recipe reaches: at its own learning rate, and at the one that few steps need."""
    d, found = r["design"], []
    for rate in (design.SEED_RATE, d["applied_rate"]):
        fixed = {"pool": "A", "mode": "applied", "loss": "sigmoid", "bias": 0.0, "warm": "clean", "weight": 1.0}
        if group := find(r, **fixed, rate=rate):
            found.append((rate, group["scores"]["legacy"]))
    if not found:
        return
    coin = "better than a coin" if any(s["macro"]["low"] > 0.5 for _, s in found) else "no better than a coin"
    told = [
        f"at {'its own' if rate == design.SEED_RATE else 'the'} learning rate {rate:g} AUC {interval(s['macro'])}, minus `nll` "
        f"{interval(s['minus_nll'], True)} (it {beats(s['minus_nll'])}), minus the best untrained gates "
        f"{interval(s['minus_untrained'], True)} (it {beats(s['minus_untrained'])})"
        for rate, s in found
    ]
    yield (
        f"- The predecessor's recipe (applied gate, `sigmoid`, bias 0, score `legacy`) is {coin} after the "
        f"{d['applied_rows'] * d['epochs'] // d['batch']} steps that it had: {'; '.join(told)}."
    )


def same(cell: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Whether a cell of pool B is the chosen configuration."""
    return all(cell[key] == chosen[key] for key in ("mode", "loss", "bias"))


def _main_table(r: Results) -> Iterator[str]:
    yield f"## Every loss, pool A\n\n![AUC by loss, initialisation, layer and number of rows]({FIGURE})\n"
    head = ["mode", "loss", "bias", "warm-up", *GATE_SCORES, "answer - nll", "answer - best untrained", "in-sample"]
    rows = []
    seen = {key(g["cell"]): g["in_sample"] for g in r["groups"] if g["in_sample"] is not None and is_main(r, g["cell"])}
    for group in r["groups"]:
        cell, scores = group["cell"], group["scores"]
        if not is_main(r, cell):
            continue
        inside = seen.get(key(cell))
        warm = "" if cell["loss"] == UNTRAINED else cell["warm"]
        row = [cell["mode"], f"{label(cell)} ({group['seeds']})", f"{cell['bias']:g}", warm]
        row += [interval(scores[name]["macro"]) for name in GATE_SCORES]
        row += [interval(scores["answer"][which], True) for which in ("minus_nll", "minus_untrained")]
        rows.append([*row, "" if inside is None else f"{inside:.3f}"])
    for where, scores in of_a(r).items():
        for name in RIVALS:
            s = scores[name]
            numbers = [interval(s["macro"]), "", "", "", interval(s["minus_nll"], True), "", ""]
            rows.append(["no gate", f"`{name}`", "", f"pool {where}", *numbers])
    yield from table(head, rows)
    yield (
        "\nIn brackets behind a loss: seeds. Applied gates are scored on fewer rows, and compared with `nll` on the same ones. Rivals: `nll` "
        "and `ifd` low is good, `nll_ifd` the smaller of their ranks, `length` long is good, `router_entropy` decided routing is good (their AUC "
        "stands in the column of `answer`). In-sample: rows of the warm-up against all their copies (and what contaminated it), all kinds seen."
    )


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a configuration has in common with the one that saw all kinds."""
    return tuple(cell[name] for name in ("pool", "mode", "loss", "bias", "warm", "rows", "rate"))


def _kinds(r: Results) -> Iterator[str]:
    yield "## By kind, pool A, clean warm-up\n"
    rows = []
    for group in r["groups"]:
        cell = group["cell"]
        if not is_main(r, cell) or cell["warm"] != "clean":
            continue
        for name, score in group["scores"].items():
            kinds = score["kinds"]
            row = [cell["mode"], label(cell), f"{cell['bias']:g}", name]
            rows.append(
                row + [f"{kinds[k]['value']:.2f} ({kinds[k]['low']:.2f}-{kinds[k]['high']:.2f})" for k in r["kinds"]]
            )
    for where, scores in of_a(r).items():
        for name in RIVALS:
            kinds = scores[name]["kinds"]
            row = ["no gate", f"pool {where}", "", name]
            rows.append(
                row + [f"{kinds[k]['value']:.2f} ({kinds[k]['low']:.2f}-{kinds[k]['high']:.2f})" for k in r["kinds"]]
            )
    yield "<details><summary>all scores</summary>\n"
    yield from table(["mode", "loss", "bias", "score", *r["kinds"]], rows)
    yield "\n</details>"


def _choice(r: Results) -> Iterator[str]:
    c = r["chosen"]
    yield "## The choice (pool A)\n"
    yield (
        "Rule, fixed before the run: the mode, loss, bias and gate's score with the largest AUC minus that of `nll`, mean over clean and "
        f"contaminated warm-up (where both were run). It takes **{c['cell']['mode']}, {c['cell']['loss']}, bias {c['cell']['bias']:g}, score "
        f"`{c['score']}`**; the next ones:\n"
    )
    rows = [[o["mode"], o["loss"], f"{o['bias']:g}", o["score"], f"{o['minus_nll']:+.3f}"] for o in c["order"][:8]]
    yield from table(["mode", "loss", "bias", "score", "minus nll"], rows)
    yield from _bias(r)
    yield (
        "\nWeight: an observer's loss stands alone and AdamW divides by its size, so a factor changes nothing but whether gradients are clipped: "
        "it stays 1. For applied gates it weighs the gate's loss against the cross-entropy:\n"
    )
    wanted = [
        g
        for g in r["groups"]
        if g["cell"]["mode"] == "applied" and g["cell"]["loss"] == "sigmoid" and g["cell"]["warm"] == "clean"
    ]
    rows = [
        [f"{g['cell']['weight']:g}", f"{g['cell']['rate']:g}", f"{g['cell']['bias']:g}"]
        + [interval(g["scores"][name]["macro"]) for name in ("answer", "legacy")]
        for g in wanted
    ]
    yield from table(["weight", "learning rate", "bias", "answer", "legacy"], rows)
    yield from _applied_half(r)


def _bias(r: Results) -> Iterator[str]:
    """The chosen bias beside the others, which differ in nothing else."""
    cell, name = r["chosen"]["cell"], r["chosen"]["score"]
    told = []
    for warm in design.WARM:
        wanted = {key: cell[key] for key in ("pool", "mode", "loss", "rows", "rate", "weight")} | {"warm": warm}
        found = [(bias, find(r, **wanted, bias=bias)) for bias in design.BIASES]
        values = {bias: g["scores"][name]["macro"] for bias, g in found if g}
        if cell["bias"] in values and len(values) > 1:
            others = ", ".join(f"{interval(x)} at {bias:g}" for bias, x in values.items() if bias != cell["bias"])
            told.append(f"{interval(values[cell['bias']])} against {others} ({warm} warm-up)")
    if told:
        yield (
            f"\nBias: {'; '.join(told)}. These are not paired, and pool B saw the chosen bias only. Observers and applied gates begin "
            f"with {cell['bias']:g} in the code too (`model.quality_gate_init_bias`)."
        )


def _applied_half(r: Results) -> Iterator[str]:
    """What the applied gates of this study do not show."""
    d, told = r["design"], []
    for bias in design.BIASES:
        values = [
            g["scores"]["legacy"]["macro"]["value"]
            for g in r["groups"]
            if is_main(r, g["cell"]) and (g["cell"]["mode"], g["cell"]["warm"]) == ("applied", "clean")
            if g["cell"]["bias"] == bias and g["cell"]["loss"] not in (UNTRAINED, "contrastive")
        ]
        if values:
            told.append(f"at bias {bias:g} `legacy` is {min(values):.4f} to {max(values):.4f}")
    yield (
        f"\n**The applied half does not compare losses**: at weight 1, times `router_aux_loss_coef` 0.01, the cross-entropy decides, and the "
        f"losses without corrupted copies ({len(d['applied_losses']) - 1}) differ in the fourth digit or the third ({'; '.join(told)}); weight "
        "100 was tried with `sigmoid` at bias 3 only. Nor does it train routers: the judge's experts are copies of each other and one is "
        "taken with the weight 1, so that a router has no gradient."
    )


def _confirmation(r: Results) -> Iterator[str]:
    yield "## Confirmed once: pool B, whose sources are others\n"
    rows = []
    groups = list(r["confirmed"]["groups"])
    named = [(g, f"trained on B, {g['cell']['warm']}") for g in groups]
    if "brought" in r["confirmed"]:
        named.append((r["confirmed"]["brought"], "trained on A, clean"))
    for group, where in named:
        for name, s in group["scores"].items():
            row = [group["cell"]["mode"], label(group["cell"]), where, name, interval(s["macro"])]
            rows.append([*row, interval(s["minus_nll"], True), interval(s.get("minus_untrained"), True)])
    for where in ("B, all rows", "B, rows of applied gates"):
        for name in RIVALS:
            s = r["rivals"][where][name]
            rows.append(
                ["no gate", f"`{name}`", where[3:], "", interval(s["macro"]), interval(s["minus_nll"], True), ""]
            )
    yield from table(["mode", "loss", "where", "score", "AUC", "minus nll", "minus best untrained"], rows)


def _dependence(r: Results) -> Iterator[str]:
    d = r["design"]
    elsewhere = "" if r["chosen"]["cell"]["bias"] == 0 else f", not the chosen {r['chosen']['cell']['bias']:g}"
    yield (
        f"## Rows, learning rate, layers, sources\n\nObservers, clean warm-up, score `answer`; bias 0{elsewhere}, but for the layers. Rows of "
        "the warm-up:\n"
    )
    counts = [*d["row_counts"], d["warm"]]
    losses = [name for name in dict.fromkeys(g["cell"]["loss"] for g in r["groups"]) if name != UNTRAINED]

    def line(loss: str, which: str, values: Sequence[Any]) -> list[str]:
        fixed = {
            "pool": "A",
            "mode": "observer",
            "loss": loss,
            "bias": 0.0,
            "warm": "clean",
            "rows": d["warm"],
            "rate": d["rate"],
        }
        found = [find(r, **{**fixed, which: value}) for value in values]
        return [loss, *(interval(g["scores"]["answer"]["macro"]) if g else "" for g in found)]

    yield from table(["loss", *map(str, counts)], [line(loss, "rows", counts) for loss in losses])
    rates = [*d["rates"], d["rate"]]
    yield "\nPeak learning rate:\n"
    yield from table(["loss", *(f"{rate:g}" for rate in rates)], [line(loss, "rate", rates) for loss in losses])
    if r["layers"]:
        first = next(o for o in r["chosen"]["order"] if o["mode"] == "observer")
        yield f"\nLayers that are used, of the observer that stands first in the order of the choice ({first['loss']}, bias {first['bias']:g}):\n"
        shown = [(name, s) for name, s in r["layers"].items() if not name.isdigit()]
        single = {name: s["macro"]["value"] for name, s in r["layers"].items() if name.isdigit()}
        best = max(single, key=lambda name: single[name])
        yield from table(
            ["layers", "AUC", "minus nll"],
            [[n, interval(s["macro"]), interval(s["minus_nll"], True)] for n, s in shown],
        )
        yield f"\nThe best single layer is number {best} of 0 to {len(single) - 1} with {single[best]:.3f} (picked by looking: too good)."
    yield "\n`contrastive` on the rows of one source, kind not seen; *source seen*: its other rows were in the warm-up:\n"
    rows = [
        [u["source"], f"{u['clean']} / {u['planted']}", *(interval(u[name]) for name in ("seen", "unseen", "nll"))]
        for u in r["unseen"]
    ]
    yield from table(["source", "clean / planted", "source seen", "source not seen", "nll"], rows)


def _controls(r: Results) -> Iterator[str]:
    c = r["controls"]
    yield "## Controls\n"
    rows = []
    for pool, scores in c["untrained"].items():
        for name, x in scores.items():
            inside = "yes" if x["low"] <= 0.5 <= x["high"] else "**no**"
            rows.append(
                [f"{pool}, {name}", str(x["n"]), interval(x), inside, f"{x['smallest']:.2f} to {x['largest']:.2f}"]
            )
    yield "Untrained gates (t interval over initialisations; rows are the same for all of them):\n"
    yield from table(["pool, bias, score", "initialisations", "mean AUC", "0.5 inside", "single ones"], rows)
    s, n = c["sum_with_negated"], c["nothing_planted"]
    yield f"\n- AUC(w) + AUC(-w) of the raw score, {s['n']} gates: from {s['smallest']:.6f} to {s['largest']:.6f}."
    for name, x in c["permuted_in_training"].items():
        yield (
            f"- Trained with permuted labels ({x['n']} seeds), score `{name}`: {interval(x)}; single ones {x['smallest']:.2f} to "
            f"{x['largest']:.2f}."
        )
    yield f"- Scored against permuted labels: {interval(c['permuted_in_scoring'])}."
    yield (
        f"- Nothing planted, half of the clean rows called bad at random ({n['n']} draws): mean {n['value']:.3f}, 95 % of the draws from "
        f"{n['low']:.2f} to {n['high']:.2f}."
    )
    error = ", ".join(f"{name} {value:.1e}" for name, value in c["shortcut_error"].items())
    yield f"- Largest difference between pooled scores from features and those of the stage `route` (all rows, layers): {error}."


def reach(rate: float, steps: int) -> float:
    """The sum of a rate's linear decay over some steps."""
    return rate * (steps + 1) / 2


def _how(r: Results) -> Iterator[str]:
    d = r["design"]
    yield "## What was done, and cut\n"
    yield (
        f"- Observers: {d['warm']} warm-up rows, {d['epochs']} epochs, {d['batch']} rows a step in one micro-batch, AdamW, rate {d['rate']:g} "
        f"falling to 0, {d['seeds']} seeds ({d['few_seeds']} where rows, rate or source vary). A row's copy of one kind is the same in every "
        "epoch and for every seed (`warmup` makes new ones), so that it is read once."
    )
    yield (
        f"- Applied gates: `convert`, `warmup recipe=legacy` (through the model) and `route`, all layers, {d['applied_rows']} "
        f"warm-up rows, {d['epochs']} epochs, {d['applied_seeds']} seed(s), scored on {d['applied_clean']} clean rows and {d['applied_planted']} of "
        f"each kind; rate {d['applied_rate']:g} falling to 0: AdamW moves a weight by at most the sum of its rates, here "
        f"{reach(d['applied_rate'], d['applied_rows'] * d['epochs'] // d['batch']):.2f}; the predecessor's {design.SEED_RATE:g} over some 840 steps "
        f"(2.5 % of 270,000 rows, 2 epochs, 16 a step) reaches {reach(design.SEED_RATE, 840):.2f} (that rate with our few steps is in the table "
        "of weights). A contaminated warm-up was run at bias 3 with `sigmoid` and `contrastive` "
        "only; `contrastive` leaves out half of the kinds at a time instead of one. No in-sample number."
    )
    yield (
        f"- A contaminated warm-up: {d['share']:.0%} of its rows are corrupted ones of all kinds, which `contrastive` is told are good. "
        "Ranks (`combined`, `nll_ifd`) are those of the whole set, not taken anew in every replicate. Intervals are not corrected for their number."
    )
