"""The report as one HTML page: everything escaped, no network, light and dark.

No command runs this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from selectmoe import plots
from selectmoe.report_data import Findings
from selectmoe.verdict import Verdict

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.verdict { font-size: 1.3rem; border-left: .4rem solid #3b6ea5; padding: .5rem 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; }
@media (prefers-color-scheme: dark) { img { filter: brightness(.85); } .verdict { border-color: #7fb0e6; } }
code, pre { font-size: .85rem; overflow-wrap: anywhere; white-space: pre-wrap; }
"""
CLIP = 400
"""Characters shown of a row."""
CLUSTERS = 50
"""Clusters in the table, the largest ones; results.json has all."""
FILES = 1000
"""Files in the table; results.json has all."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    """A table; numbers are right-aligned, the first cell of a row is its heading."""
    lines = [f"<table><caption>{escape(caption)}</caption><thead><tr>"]
    lines += [f'<th scope="col">{escape(name)}</th>' for name in head] + ["</tr></thead><tbody>"]
    for first, *rest in rows:
        cells = "".join(
            f'<td class="n">{_cell(v)}</td>' if isinstance(v, int | float) else f"<td>{_cell(v)}</td>" for v in rest
        )
        lines.append(f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>')
    return "".join([*lines, "</tbody></table>"])


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else escape(str(value))


def image(uri: str, text: str) -> str:
    """A plot with its description."""
    return f'<p><img src="{uri}" alt="{escape(text, quote=True)}"></p>'


def page(found: Findings, verdict: Verdict, results: dict[str, Any], *, show_text: bool) -> str:
    """The whole page.

    Args:
        found: what was read.
        verdict: the answer.
        results: the numbers of `results.json`.
        show_text: whether rows' texts are shown.
    """
    sections = [
        ("Did the selection beat a random one?", _verdict(verdict, results)),
        ("What the gates say", _gates(found, results)),
        ("What was selected", _selection(found, results)),
        ("Best and worst rows", _examples(found, results) if show_text else "<p>Row text is switched off.</p>"),
        ("Cost", _cost(results)),
        ("Lineage", _lineage(results)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{text}</section>" for title, text in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{CSP}"><meta name="viewport" content="width=device-width"><title>Select-MoE report</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Select-MoE report</h1>"
        f'<p class="verdict">{escape(verdict.sentence)}</p>{body}</main></body></html>\n'
    )


def _verdict(verdict: Verdict, results: dict[str, Any]) -> str:
    arms = [
        (
            arm.name + (" (control)" if arm.control else ""),
            arm.verdict.replace("_", " "),
            arm.effect,
            f"{arm.ci95[0]:+.4f} to {arm.ci95[1]:+.4f}",
            arm.p,
            arm.df,
            arm.smallest_visible_effect,
            arm.advice,
        )
        for arm in verdict.arms
    ]
    head = ["arm", "verdict", "effect", "95 % interval", "p (Holm)", "df", "smallest visible effect", "advice"]
    seeds = results["seeds"]
    measured = []
    for name, values in sorted(results["bits_per_byte"].items()):
        whole = results["summary"][name]
        interval = f"{whole['low']:.4f} to {whole['high']:.4f}" if "low" in whole else ""
        measured.append((name, *values, *[""] * (len(seeds) - len(values)), whole["mean"], interval))
    seen = {
        True: "The oracle beats random: this run could see an effect.",
        False: "The oracle does not beat random: this run could not have seen an effect.",
        None: "There is no oracle in this run: whether it could have seen an effect is not known.",
    }[verdict.visible]
    return (
        f"<p>{escape(seen)}</p>"
        + table(head, arms, f"Against random, {verdict.metric}; positive is better")
        + image(plots.forest(verdict), "Effect of every arm against random with its 95 % interval")
        + table(
            ["arm", *[f"seed {seed}" for seed in seeds], "mean", "95 % over seeds"],
            measured,
            f"{verdict.metric}; lower is better",
        )
    )


def _gates(found: Findings, results: dict[str, Any]) -> str:
    planted = np.array([key in found.planted for key in found.router.keys])
    text = image(
        plots.gate_scores(found.scores["answer"], planted), "Histogram of gate scores, planted rows beside the others"
    )
    if not found.planted:
        return text + "<p>Nothing was planted in this pool, so no ranking of known bad rows can be shown.</p>"
    for part, title in (
        ("held_out", "rows that the warm-up did not see"),
        ("in_sample", "rows of the warm-up (in sample)"),
    ):
        kinds = results["auc"].get(part, {})
        names = list(found.scores)
        rows = [(kind, *[by.get(name, "") for name in names]) for kind, by in kinds.items()]
        text += table(["planted kind", *names], rows, f"AUC: planted rows ranked below the others; {title}")
    return text + "<p>An AUC on planted rows is not quality: the verdict is.</p>"


def _selection(found: Findings, results: dict[str, Any]) -> str:
    sources = sorted(results["composition"]["pool"])
    rows = [(arm, *[by.get(name, 0) for name in sources]) for arm, by in results["composition"].items()]
    shares = [(arm, share) for arm, share in results["planted_share"].items()]
    largest = results["clusters"][:CLUSTERS]
    by_cluster = [
        ("not clustered" if c["cluster"] is None else str(c["cluster"]), c["rows"], c["selected"]) for c in largest
    ]
    return (
        table(["rows of", *sources], rows, "Rows by source")
        + (table(["rows of", "share of planted rows"], shares, "Planted rows") if found.planted else "")
        + image(plots.cluster_map(found.clusters), "Map of the rows by their routing; the chosen ones are circled")
        + table(
            ["cluster", "rows", "selected"],
            by_cluster,
            f"Rows by cluster, {len(largest)} of {len(results['clusters'])}",
        )
    )


def _examples(found: Findings, results: dict[str, Any]) -> str:
    text = ""
    for name, caption in (("best", "Highest gate scores"), ("worst", "Lowest gate scores")):
        lines = []
        for row in results["examples"][name]:
            messages = found.rows[row["dataset"], row["id"]].messages
            words = " / ".join(f"{m['role']}: {m['content']}" for m in messages)
            lines.append((f"{row['score']:.4f}", row["dataset"], row["id"], row["kind"], words[:CLIP]))
        text += table(["score", "source", "id", "planted", "text"], lines, caption)
    return text


def _cost(results: dict[str, Any]) -> str:
    keys = ("arm", "seed", "seconds", "peak_rss_mib", "rows_in", "rows_out", "dropped", "bytes")
    rows = [(s["stage"], *[s[key] for key in keys]) for s in results["stages"]]
    return table(
        ["stage", "arm", "seed", "seconds", "peak MiB", "rows in", "rows out", "dropped", "bytes"], rows, "Per stage"
    )


def _lineage(results: dict[str, Any]) -> str:
    rows = [(s["stage"], s["arm"], s["seed"], s["identity"][:12], s["inputs"]) for s in results["stages"]]
    files = [(s["stage"], s["arm"], s["seed"], *file) for s in results["stages"] for file in s["files"]][:FILES]
    total = sum(len(s["files"]) for s in results["stages"])
    commands = "\n".join(s["command"] for s in results["stages"])
    return (
        table(["stage", "arm", "seed", "identity", "inputs"], rows, "Every output and what it was made from")
        + "<details><summary>The files</summary>"
        + table(["stage", "arm", "seed", "file", "bytes", "SHA-256"], files, f"{len(files)} of {total} files")
        + f"</details><details><summary>The commands</summary><pre>{escape(commands)}</pre></details>"
    )
