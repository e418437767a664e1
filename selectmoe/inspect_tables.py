"""The numbers of `selectmoe inspect` as tables, for the screen and for its page.

No command runs this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LINES = 30
"""Sources and layers on the screen at most; the page and the file have more."""

Numbers = Mapping[str, Any]
Table = tuple[list[str], list[list[Any]]]
"""Head and lines; None where a number is not known."""


def summary(numbers: Numbers) -> str:
    """The numbers that a person wants first, as text."""
    judge = []
    if numbers["layers"]:
        judge.append(f"{numbers['layers']} layers of {numbers['experts']} experts")
    if numbers["embedding"]:
        judge.append(f"embeddings of {numbers['embedding']} dimensions")
    scores = ", ".join(numbers["scores"]) or "none"
    lines = [f"{numbers['rows']:,} rows of {len(numbers['sources'])} sources; {'; '.join(judge)}; scores: {scores}"]
    lines += ["", *_table(*source_table(numbers))]
    if numbers["layers"] or numbers["gate"]:
        lines += ["", *_table(*layer_table(numbers))]
    if numbers["use"]:
        dead, rare = (len(numbers["use"][name]) for name in ("dead", "rare"))
        total = numbers["layers"] * numbers["experts"]
        lines += [
            "",
            f"{dead} of {total} experts are dead, {rare} rare (mean probability below 1 %, 10 % of an even share)",
        ]
    return "\n".join([*lines, *_work(numbers["work"])])


def _work(work: Numbers) -> list[str]:
    lines = []
    if work["plan"]:
        plan = work["plan"]
        lines += ["", f"{plan['batches']:,} batches, {plan['tokens']:,} tokens, padding {plan['padding']:.2%} of them"]
    if work["units"]:
        speed = work["padded_tokens_per_second"]
        lines.append(
            f"{work['units']:,} pieces of work in {work['seconds']:.1f} s, {speed or 0:,.0f} padded tokens a second"
        )
        lines += _table(*slowest_table(work["slowest"][:5]))
    return lines


def source_table(numbers: Numbers) -> Table:
    """A line per source."""
    scores = list(numbers["scores"])
    head = ["source", "rows", "median tokens", "p95", "truncated", "no answer", "padding", *scores]
    lines = []
    for name, one in numbers["sources"].items():
        tokens = one["tokens"] or {}
        share = [one[key] if one[key] is None else f"{one[key]:.1%}" for key in ("truncated", "padding")]
        whole = [None if tokens.get(key) is None else round(tokens[key]) for key in ("median", "p95")]
        line = [name, one["rows"], *whole, share[0], one["without_answer"], share[1]]
        lines.append([*line, *(one["scores"][score]["median"] for score in scores)])
    return head, lines


def layer_table(numbers: Numbers) -> Table:
    """A line per layer."""
    gate = numbers["gate"]["layers"] if numbers["gate"] else None
    entropy, use = numbers["entropy"], numbers["use"]
    head: list[str] = ["layer"]
    columns: list[list[Any]] = []
    if gate:
        head += ["gate", "p5", "p95"]
        columns += [[layer[key] for layer in gate] for key in ("median", "p5", "p95")]
    if entropy:
        head += ["entropy", "of the mean", "dead", "rare"]
        columns += [[layer[key] for layer in entropy] for key in ("median", "of_mean")]
        for name in ("dead", "rare"):
            columns.append([sum(at == layer for at, _ in use[name]) for layer in range(len(entropy))])
    return head, [[layer, *line] for layer, line in enumerate(zip(*columns, strict=True))]


def slowest_table(slowest: Sequence[Numbers]) -> Table:
    """A line per piece of work."""
    head = ["slowest", "batches", "rows", "tokens", "padded", "seconds"]
    keys = ("rows", "tokens", "padded_tokens", "seconds")
    return head, [[u["dataset"], f"{u['batches'][0]}-{u['batches'][1]}", *(u[key] for key in keys)] for u in slowest]


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    """Columns of text; numbers to the right, what is not known as a dash."""
    shown = [[_cell(value) for value in line] for line in lines[:LINES]]
    widths = [max(len(cell) for cell in column) for column in zip(head, *shown)]
    text = [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (head, *shown)
    ]
    return [*text, f"and {len(lines) - LINES} more"] if len(lines) > LINES else text


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
