"""The report in a few lines of Markdown, for viewers that show Markdown beside a task or a run.

No command runs this module; `selectmoe report` writes `summary.md`. It holds no text of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from selectmoe.verdict import Verdict

ROWS = 30
"""Rows of a table at most."""
CELL = 100
"""Characters of a cell at most."""


def summary(verdict: Verdict, results: dict[str, Any]) -> str:
    """The answer, the arms with their intervals, and the ranking of planted rows.

    Args:
        verdict: the answer.
        results: the numbers of `results.json`.
    """
    arms = [
        (
            arm.name + (" (control)" if arm.control else ""),
            arm.verdict.replace("_", " "),
            f"{arm.effect:+.4f}",
            f"{arm.ci95[0]:+.4f} to {arm.ci95[1]:+.4f}",
            f"{arm.p:.2g}",
            f"{arm.smallest_visible_effect:.4f}",
        )
        for arm in verdict.arms
    ]
    head = ["arm", "verdict", "effect", "95 % interval", "p", "smallest visible effect"]
    kinds = results["auc"].get("held_out", {})
    names = sorted({name for by in kinds.values() for name in by})
    aucs = [(kind, *[f"{by[name]:.3f}" if name in by else "" for name in names]) for kind, by in kinds.items()]
    ranking = _table(["planted kind", *names], aucs) if aucs else "No planted row was held out.\n"
    return (
        f"# Did the selection beat a random one?\n\n**{_plain(verdict.sentence, 2000)}**\n\n"
        f"## Against {_plain(verdict.baseline)}: {_plain(verdict.metric)}; positive is better\n\n{_table(head, arms)}\n"
        f"## AUC: planted rows ranked below the others; rows that the warm-up did not see\n\n{ranking}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    every = [[_plain(cell) for cell in row] for row in rows]
    lines = [[_plain(name) for name in head], ["---"] * len(head), *every[:ROWS]]
    more = f"\nand {len(every) - ROWS} more\n" if len(every) > ROWS else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + more


def _plain(text: str, limit: int = CELL) -> str:
    """`text` in one line that Markdown and HTML read as plain text."""
    words = " ".join(text.split())
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", escape(words, quote=False))
