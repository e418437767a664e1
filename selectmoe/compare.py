"""Many selections from one set of router data, side by side: what a sweep over settings found.

    selectmoe compare selections=out/sweep planted=out/ingest output_dir=out/compare

In: the output of `baseline` (one folder per arm or setting) and, where adapters were trained on them, the outputs of
`evaluate`. Out: `results.json` (per selection: its settings, rows, share of planted rows, mean scores, rows by source;
the overlap of every two as Jaccard's index; the verdict: whether each beats random, or that nothing was fine-tuned),
`compare.html` and `summary.md` for people.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from selectmoe import stage
from selectmoe.config import StageConfig, flatten, input_
from selectmoe.errors import UserError
from selectmoe.manifest import Manifest, find_manifests
from selectmoe.selection import Selected, planted_file, read_planted, read_selected

STAGE = "compare"
VERSION = 1
NOT_JUDGED = "not_judged"
"""The verdict where nothing was fine-tuned."""


@dataclass
class CompareConfig(StageConfig):
    """Configuration of `compare`."""

    selections: str = input_(doc="output of baseline, or a folder that holds several selections")
    planted: str = input_("", doc="planted.jsonl or ingest's output_dir, to count planted rows")
    evaluations: list[str] = input_(
        [], doc="outputs of evaluate for these arms, for the verdict; with random among them"
    )


def run(config: CompareConfig) -> Path:
    """Compare the selections.

    Returns:
        The output directory.

    Raises:
        UserError: fewer than two selections, or evaluations that do not fit together.
    """
    config.validate()
    planted = str(planted_file(config.planted)) if config.planted else ""
    inputs = {"selections": config.selections, "planted": planted, "evaluations": config.evaluations}
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if out.done:
            return out.path
        found = {
            path.name: (read_selected(path), m) for path, m in find_manifests(config.selections) if m.stage == "select"
        }
        if len(found) < 2:
            raise UserError(f"selections={config.selections} holds {len(found)} selections; to compare takes two")
        bad = read_planted(Path(planted)) if planted else None
        table = [describe(name, rows, manifest, bad) for name, (rows, manifest) in sorted(found.items())]
        overlap = jaccard({name: rows for name, (rows, _) in found.items()})
        verdict, sentence = judge(config.evaluations)
        results = {"selections": table, "jaccard": overlap, "verdict": verdict, "sentence": sentence}
        text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False)
        (out.staging / "results.json").write_text(text + "\n", encoding="utf-8")
        (out.staging / "compare.html").write_text(page(results), encoding="utf-8")
        (out.staging / "summary.md").write_text(markdown(results), encoding="utf-8")
        for entry in table:
            for key in ("planted_share", "mean_answer"):
                if key in entry:
                    out.metric(f"{key}/{entry['name']}", entry[key])
        out.commit(rows_in=len(found), rows_out=len(found), bookkeeping=["compare.html", "summary.md"])
    return out.path


def describe(
    name: str, rows: Sequence[Selected], manifest: Manifest, planted: set[tuple[str, str]] | None
) -> dict[str, Any]:
    """One line of the table: name, rows, planted_share (where it is known), mean_SCORE, sources, settings."""
    entry: dict[str, Any] = {"name": name, "rows": len(rows), "identity": manifest.identity}
    if planted is not None:
        entry["planted_share"] = sum(row.row.key in planted for row in rows) / len(rows)
    scores = sorted({score for row in rows for score in row.scores})
    for score in scores:
        values = [row.scores[score] for row in rows if score in row.scores]
        entry[f"mean_{score}"] = sum(values) / len(values)
    entry["sources"] = dict(sorted(Counter(row.row.dataset for row in rows).items()))
    entry["settings"] = flatten(manifest.config["identity"])
    return entry


def jaccard(selections: dict[str, list[Selected]]) -> dict[str, dict[str, float]]:
    """Shared rows / rows of either, for every two selections: name -> later name -> index."""
    keys = {name: {row.row.key for row in rows} for name, rows in sorted(selections.items())}
    table: dict[str, dict[str, float]] = {name: {} for name in keys}
    for one, two in itertools.combinations(keys, 2):
        table[one][two] = len(keys[one] & keys[two]) / len(keys[one] | keys[two])
    return table


def judge(evaluations: list[str]) -> tuple[dict[str, Any], str]:
    """The verdict as in `verdict.json` of `report`, that of `selected` with every other selection beside it; a sentence."""
    if not evaluations:
        return {"verdict": NOT_JUDGED, "arms": []}, "nothing was fine-tuned on these selections"
    from selectmoe import report_data, verdict

    values, weights, strata, _ = report_data.evaluations(report_data.find(evaluations))
    judged = verdict.judge(values, weights, strata, metric="held-out answer bits per byte")
    return judged.json(), judged.sentence


def differing(table: list[dict[str, Any]]) -> list[str]:
    """The settings in which the selections differ; the seed of a draw is not one."""
    keys = sorted({key for entry in table for key in entry["settings"]} - {"seed"})
    return [key for key in keys if len({json.dumps(entry["settings"].get(key)) for entry in table}) > 1]


def grid(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table that people see."""
    table: list[dict[str, Any]] = results["selections"]
    numbers = [k for k in table[0] if k == "planted_share" or k.startswith("mean_")]
    settings = differing(table)
    effects = {arm["name"]: arm for arm in results["verdict"]["arms"]}
    head = ["selection", "rows", *numbers, *(["effect", "verdict"] if effects else []), "largest source", *settings]
    cells = []
    for entry in table:
        source, count = max(entry["sources"].items(), key=lambda item: item[1])
        line = [entry["name"], str(entry["rows"]), *(f"{entry[k]:.4f}" if k in entry else "" for k in numbers)]
        if effects:
            arm = effects.get(entry["name"], {})
            line += [f"{arm['effect']:+.4f}" if arm else "", arm.get("verdict", "")]
        line += [f"{source} {count / entry['rows']:.0%}", *(str(entry["settings"].get(k, "")) for k in settings)]
        cells.append(line)
    return head, cells


def overlap_grid(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of overlaps."""
    overlap: dict[str, dict[str, float]] = results["jaccard"]
    names = list(overlap)
    cells = [
        [one, *(f"{overlap[one][two]:.2f}" if two in overlap[one] else "" for two in names[1:])] for one in names[:-1]
    ]
    return ["overlap (Jaccard)", *names[1:]], cells


def markdown(results: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = ["# Selections compared", "", results["sentence"], ""]
    for head, cells in (grid(results), overlap_grid(results)):
        rows = [head, ["---"] * len(head), *cells]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The comparison as one self-contained page."""
    from selectmoe import report_html

    parts = [f'<p class="verdict">{escape(results["sentence"])}</p>']
    captions = ("Every selection, and the settings in which they differ", "Shared rows / rows of either")
    for (head, cells), caption in zip((grid(results), overlap_grid(results)), captions, strict=True):
        parts.append(report_html.table(head, cells, caption))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{report_html.CSP}"><title>Selections compared</title><style>{report_html.STYLE}</style></head>'
        f"<body><main><h1>Selections compared</h1>{''.join(parts)}</main></body></html>\n"
    )
