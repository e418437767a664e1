"""The report as one HTML page: everything escaped and bounded, no script, no network.

No command runs this module. The answer comes first, then the plot of the intervals, then what is behind them.
Whatever the input, the page stays small: every text is cut at a number of bytes, every table at a number of rows that is
said in it ("and N more"); `results.json` has all of it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from selectmoe import plots
from selectmoe.report_data import Findings
from selectmoe.verdict import Verdict

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.verdict { font-size: 1.25rem; border-left: .4rem solid #3b6ea5; background: #f3f6fa; padding: .7rem 1rem; }
.beats_random { border-color: #2a7f62; background: #eff7f4; }
.worse_than_random { border-color: #c8553d; background: #fbf1ee; }
.blind { border: 2px solid #8a5a00; background: #fff7e0; padding: .5rem 1rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top;
  unicode-bidi: isolate; overflow-wrap: break-word; }
tbody th { font-weight: 400; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; min-width: 20rem; overflow-wrap: anywhere; }
td.more { color: #444; font-style: italic; }
img { max-width: 100%; height: auto; }
pre { font-size: .85rem; overflow-wrap: anywhere; white-space: pre-wrap; }
summary { cursor: pointer; }
"""
CSP = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
CELL, TEXT, COMMAND = 160, 800, 4000
"""Bytes of a cell, of a row's text and of a command at most, escaped."""
ROWS = 40
"""Rows of a table at most, where nothing else is said."""
OUTPUTS, FILES, COMMANDS = 200, 1000, 200
"""Outputs, files and commands at most."""
SEEDS, ARMS = 10, 12
"""Columns of seeds, and of arms, at most."""
HEAT_SOURCES, HEAT_CLUSTERS, HEAT_PANELS = 20, 40, 6
"""Lines, columns and panels of the heat maps at most; further sources and clusters are added up."""


class Text(str):
    """The text of a row: shown longer than other cells, and with its line breaks."""


class Share(float):
    """A share, shown in per cent."""


def clip(text: str, limit: int) -> str:
    """`text` escaped for HTML, cut so that it takes at most `limit` bytes."""
    if len(text) <= limit and len(whole := escape(text).encode("utf-8", "replace")) <= limit:
        return whole.decode()
    out, room = [], limit - len("…".encode())
    for character in text[:limit]:
        part = escape(character)
        room -= len(part.encode("utf-8", "replace"))
        if room < 0:
            break
        out.append(part)
    return "".join(out) + "…"


def _cell(value: Any) -> str:
    if isinstance(value, Share):
        return f"{value:.1%}"
    return f"{value:.4f}" if isinstance(value, float) else clip(str(value), CELL)


def _td(value: Any) -> str:
    if isinstance(value, Text):
        return f'<td class="text">{clip(value, TEXT)}</td>'
    return f'<td class="n">{_cell(value)}</td>' if isinstance(value, int | float) else f"<td>{_cell(value)}</td>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, most: int = ROWS) -> str:
    """A table; numbers are right-aligned, the first cell of a row is its heading.

    Args:
        head: names of the columns.
        rows: cells: numbers, strings, or the `Text` of a row.
        caption: its title.
        most: rows at most; how many more there are is said in a last line.
    """
    every = list(rows)
    lines = [f'<div class="scroll"><table><caption>{clip(caption, CELL * 2)}</caption><thead><tr>']
    lines += [f'<th scope="col">{_cell(name)}</th>' for name in head] + ["</tr></thead><tbody>"]
    for first, *rest in every[:most]:
        lines.append(f'<tr><th scope="row">{_cell(first)}</th>{"".join(map(_td, rest))}</tr>')
    if len(every) > most:
        lines.append(f'<tr><td class="more" colspan="{len(head)}">and {len(every) - most} more</td></tr>')
    return "".join([*lines, "</tbody></table></div>"])


def image(uri: str, text: str) -> str:
    """A plot with its description."""
    return f'<p><img src="{uri}" alt="{clip(text, CELL * 2)}"></p>'


def page(found: Findings, verdict: Verdict, results: dict[str, Any], *, show_text: bool) -> str:
    """The whole page.

    Args:
        found: what was read.
        verdict: the answer.
        results: the numbers of `results.json`.
        show_text: whether rows' texts are shown.
    """
    sections = [
        ("How sure is that?", _verdict(verdict, results)),
        ("What the gates say", _gates(found, results)),
        ("What was selected", _selection(found, results)),
        ("Best and worst rows", _examples(found, results) if show_text else "<p>Row text is switched off.</p>"),
        ("Time, rows and bytes per stage", _cost(results)),
        ("From the number back to the files", _lineage(results)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{text}</section>" for title, text in sections)
    described = "; ".join(f"{arm.name} {arm.effect:+.4f}, {arm.verdict.replace('_', ' ')}" for arm in verdict.arms[:3])
    blind = f'<p class="blind" role="note">{escape(verdict.blindness)}</p>' if verdict.blindness else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{CSP}"><meta name="viewport" content="width=device-width"><title>Select-MoE report</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Did the selection beat a random one?</h1>"
        f'<p class="verdict {verdict.verdict}">{clip(verdict.answer, TEXT * 2)}</p>{blind}'
        + image(plots.forest(verdict), f"Effect of every arm against random with its 95 % interval: {described}")
        + f"{body}</main></body></html>\n"
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
    head = ["arm", "verdict", "effect", "95 % interval", "p", "df", "smallest visible effect", "advice"]
    seeds = results["seeds"][:SEEDS]
    measured = []
    for name, values in sorted(results["bits_per_byte"].items()):
        whole = results["summary"][name]
        interval = f"{whole['low']:.4f} to {whole['high']:.4f}" if "low" in whole else ""
        measured.append((name, whole["mean"], interval, *(values[:SEEDS] + [""] * (len(seeds) - len(values)))))
    seen = {
        True: "The positive control beats random: this run could see an effect.",
        False: "The positive control is the arm that draws from the rows that were not planted.",
        None: "There is no positive control (oracle) in this run: whether it could have seen an effect is not known.",
    }[verdict.visible]
    columns = f"; the first {SEEDS} of {len(results['seeds'])} seeds" if len(results["seeds"]) > SEEDS else ""
    return (
        f"<p>{escape(seen)} Each interval is its arm's own; p is corrected for the number of arms (Holm), controls "
        "apart, and decides.</p>"
        + table(head, arms, f"Against {verdict.baseline}, {verdict.metric}; positive is better")
        + table(
            ["arm", "mean", "95 % over seeds", *[f"seed {seed}" for seed in seeds]],
            measured,
            f"{verdict.metric}; lower is better{columns}",
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
    composed = results["composition"]
    shares = [(arm, Share(share)) for arm, share in results["planted_share"].items()]
    return (
        (table(["rows of", "share of planted rows"], shares, "Planted rows") if found.planted else "")
        + _shares("source", composed["sources"], composed["rows"])
        + _shares("cluster", composed["clusters"], composed["rows"])
        + image(
            _heat_maps(composed),
            "Heat maps of the share of rows by source and cluster, of the pool and of every arm; the tables by source "
            "and by cluster say the same in numbers",
        )
        + image(plots.cluster_map(found.clusters), "Map of the rows by their routing; the chosen ones are circled")
    )


def _of(entry: Mapping[str, Any], name: str) -> int:
    """Rows of an entry of the composition in the pool, or in an arm."""
    return int(entry["pool"] if name == "pool" else entry["arms"].get(name, 0))


def _name(cluster: int | None) -> str:
    return "not clustered" if cluster is None else str(cluster)


def _shares(kind: str, entries: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> str:
    """What share of the pool and of every arm comes from each source or cluster; the small ones are added up."""
    columns = list(rows)[: ARMS + 1]
    shown, rest = entries[:ROWS], entries[ROWS:]

    def line(name: str, several: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        return name, *(Share(sum(_of(e, c) for e in several) / max(1, rows[c])) for c in columns)

    lines: list[Sequence[Any]] = [("rows", *(rows[column] for column in columns))]
    lines += [line(_name(e["name"]) if kind == "cluster" else e["name"], [e]) for e in shown]
    if rest:
        lines.append(line(f"and {len(rest)} more", rest))
    arms = f"; {ARMS} of {len(rows) - 1} arms" if len(rows) - 1 > ARMS else ""
    return table([kind, *columns], lines, f"Share of the rows by {kind}{arms}", len(lines))


def _heat_maps(composed: Mapping[str, Any]) -> str:
    panels = list(composed["rows"])[:HEAT_PANELS]
    sources, source_at = _axis(composed["sources"], HEAT_SOURCES, str)
    clusters, cluster_at = _axis(composed["clusters"], HEAT_CLUSTERS, _name)
    shares = {panel: np.zeros((len(sources), len(clusters))) for panel in panels}
    for entry in composed["cells"]:
        place = source_at(entry["source"]), cluster_at(entry["cluster"])
        for panel in panels:
            shares[panel][place] += _of(entry, panel) / max(1, composed["rows"][panel])
    return plots.heat_maps(shares, sources, clusters)


def _axis(
    entries: Sequence[Mapping[str, Any]], most: int, label: Callable[[Any], str]
) -> tuple[list[str], Callable[[Any], int]]:
    """Labels of the largest entries, the rest as one; and the place of each name."""
    places = {entry["name"]: min(at, most) for at, entry in enumerate(entries)}
    labels = [label(entry["name"]) for entry in entries[:most]]
    return labels + ([f"{len(entries) - most} more"] if len(entries) > most else []), places.__getitem__


def _examples(found: Findings, results: dict[str, Any]) -> str:
    text = ""
    for name, caption in (("best", "Highest gate scores"), ("worst", "Lowest gate scores")):
        lines = []
        for row in results["examples"][name]:
            messages = found.rows[row["dataset"], row["id"]].messages
            words = Text("\n".join(f"{m['role']}: {m['content'][:TEXT]}" for m in messages[:TEXT]))
            lines.append((f"{row['score']:.4f}", row["dataset"], row["id"], row["kind"], words))
        text += table(["score", "source", "id", "planted", "text"], lines, caption)
    return text


def _cost(results: dict[str, Any]) -> str:
    keys = ("arm", "seed", "seconds", "peak_rss_mib", "rows_in", "rows_out", "dropped", "bytes")
    rows = [(s["stage"], *[s[key] for key in keys]) for s in results["stages"]]
    head = ["stage", "arm", "seed", "seconds", "peak MiB", "rows in", "rows out", "dropped", "bytes"]
    return table(head, rows, "Per output", OUTPUTS)


def _lineage(results: dict[str, Any]) -> str:
    stages = results["stages"]
    rows = [(s["stage"], s["arm"], s["seed"], s["identity"][:12], s["inputs"]) for s in stages]
    files = [(s["stage"], s["arm"], s["seed"], *file) for s in stages for file in s["files"]]
    commands = [clip(s["command"], COMMAND) for s in stages[:COMMANDS]]
    if len(stages) > COMMANDS:
        commands.append(f"# and {len(stages) - COMMANDS} more")
    return (
        table(["stage", "arm", "seed", "identity", "inputs"], rows, "Every output and what it was made from", OUTPUTS)
        + "<details><summary>The files</summary>"
        + table(["stage", "arm", "seed", "file", "bytes", "SHA-256"], files, f"{len(files)} files", FILES)
        + "</details><details><summary>The commands</summary><pre>"
        + "\n".join(commands)
        + "</pre></details>"
    )
