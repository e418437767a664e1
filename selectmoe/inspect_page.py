"""The page of `selectmoe inspect`: everything escaped and bounded, no script, no network.

No command runs this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from selectmoe.inspect_tables import layer_table, slowest_table, source_table
from selectmoe.plots import uri
from selectmoe.report_html import CSP, STYLE, image, table

MOST = 200
"""Sources and layers in a table at most."""
TITLES = {
    "gates": ("Gates", "Distribution of the gates' values by layer, all rows and each of the largest sources"),
    "experts": ("Experts", "Mean probability of every expert by layer, relative to an even share"),
    "entropy": ("Entropy of the routing", "How evenly rows spread over the experts, by layer; 1 is even"),
    "lengths": ("Lengths", "Tokens of rows and answers, and what was cut, by source"),
    "scores": ("Scores", "Distribution of every score, by source"),
    "work": ("Work", "Seconds of every piece of work by its tokens"),
}


def page(numbers: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        numbers: of `inspect_data.numbers`.
        plots: PNG by name.
    """
    tables = {"gates": _layers(numbers), "scores": _agreement(numbers), "work": _work(numbers["work"])}
    if "gates" not in plots:
        tables = {"experts": _layers(numbers), **tables}
    sections = [("Sources", table(*_known(*source_table(numbers)), "By source; scores are medians", MOST))]
    for name, (title, text) in TITLES.items():
        if name in plots or (name == "work" and tables["work"]):
            shown = image(uri(plots[name]), text) if name in plots else ""
            sections.append((title, f"<p>{escape(text)}.</p>{shown}{tables.get(name, '')}"))
    body = "".join(f"<section><h2>{escape(title)}</h2>{text}</section>" for title, text in sections)
    judge = f"{numbers['layers']} layers of {numbers['experts']} experts" if numbers["layers"] else "no routers"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{CSP}"><meta name="viewport" content="width=device-width"><title>Router data</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Router data: {numbers['rows']:,} rows of "
        f"{len(numbers['sources'])} sources; {judge}</h1>{body}</main></body></html>\n"
    )


def _known(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> tuple[Sequence[str], list[list[Any]]]:
    return head, [["–" if cell is None else cell for cell in line] for line in lines]


def _layers(numbers: Mapping[str, Any]) -> str:
    if not (numbers["gate"] or numbers["entropy"]):
        return ""
    caption = "By layer: gate and entropy are medians over rows; of the mean: of the mean of all rows"
    return table(*_known(*layer_table(numbers)), caption, MOST)


def _agreement(numbers: Mapping[str, Any]) -> str:
    names = list(numbers["agreement"])
    lines = [[a, *(numbers["agreement"][a][b] for b in names)] for a in names]
    return table(*_known(["", *names], lines), "Rank correlation of scores (high is good) and length")


def _work(work: Mapping[str, Any]) -> str:
    text = ""
    if plan := work["plan"]:
        text += f"<p>{plan['batches']:,} batches, {plan['tokens']:,} tokens, padding {plan['padding']:.2%} of them.</p>"
    if work["units"]:
        text += table(*_known(*slowest_table(work["slowest"])), "The slowest pieces of work")
    return text
