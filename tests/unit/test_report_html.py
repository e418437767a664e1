"""`selectmoe.report_html`: escaped whatever a row says, small whatever the run holds: pytest tests/unit/test_report_html.py"""

from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe import report_html
from selectmoe.pool import Row
from selectmoe.report import LIMIT
from selectmoe.report_data import Findings
from selectmoe.verdict import Arm, Verdict

HOSTILE = '</td></title></style><script>alert(1)</script><img src=x onerror="a">\'"&amp;<!-- ]]>'
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="<>&\"'/!-=;#x \n\0\u202e\ud800", max_size=60),
    st.sampled_from([HOSTILE, "<b>", "&lt;script&gt;", "<![CDATA[", "<!--", "-->", "<svg/onload=x>"]),
)


class Markup(HTMLParser):
    """The tags of a page with their attributes, its comments, and the texts of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.markup: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.cells: list[str] = []
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        self.markup.append((tag, tuple(attrs)))
        if tag == "td":
            self.in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        """What comes after a cell's or a row's end is not the cell's."""
        self.in_cell = self.in_cell and tag not in ("td", "tr", "table")

    def handle_data(self, data: str) -> None:
        """Collect."""
        if self.in_cell:
            self.cells[-1] += data

    def handle_comment(self, data: str) -> None:
        """There must be none."""
        self.markup.append(("comment", ()))

    handle_decl = handle_pi = unknown_decl = handle_comment


def findings(text: str, name: str = "a") -> Findings:
    """One row with this text, shown as the best and the worst."""
    keys = [(name, name)]
    found: Any = SimpleNamespace(
        rows={keys[0]: Row(name, name, [{"role": "user", "content": text}])},
        router=SimpleNamespace(keys=keys),
        scores={"answer": np.array([0.5]), "nll": np.array([1.0])},
        planted={keys[0]: name},
        clusters={"dataset": [name], "id": [name], "cluster": [None], "selected_rank": [1], "x": [0.5], "y": [0.5]},
    )
    return cast(Findings, found)


def results(name: str = "a", n: int = 1) -> dict[str, Any]:
    """Numbers of a run in which there are `n` of everything, all called `name`."""
    names = [f"{name}{i}" for i in range(n)]
    bits = dict.fromkeys(names, [1.0] * n)
    few = dict.fromkeys(names[:3], 1)
    entry = {
        "stage": name, "arm": name, "seed": name, "seconds": 1.0, "peak_rss_mib": 1, "rows_in": 1, "rows_out": 1,
        "dropped": name, "bytes": 1, "identity": name, "inputs": name, "files": [[name, 1, name]] * 5, "command": name,
    }  # fmt: skip
    arms = dict.fromkeys(names, 1)
    row = {"dataset": name, "id": name, "score": 0.5, "kind": name}
    return {
        "seeds": list(range(n)),
        "bits_per_byte": bits,
        "summary": {arm: {"mean": 1.0, "low": 0.5, "high": 1.5} for arm in names},
        "auc": {part: {kind: {"answer": 0.5} for kind in names} for part in ("held_out", "in_sample")},
        "composition": {
            "rows": {"pool": n, **arms},
            "sources": [{"name": source, "pool": 1, "arms": few} for source in names],
            "clusters": [{"name": i or None, "pool": 1, "arms": {}} for i in range(n)],
            "cells": [
                {"cluster": i or None, "source": source, "pool": 1, "arms": {}} for i, source in enumerate(names)
            ],
        },
        "planted_share": {"pool": 0.5, **dict.fromkeys(names, 0.5)},
        "examples": {"best": [row], "worst": [row] * min(n, 5)},
        "stages": [entry] * n,
    }


def verdict(name: str = "a", n: int = 1) -> Verdict:
    """A verdict of `n` arms."""
    arms = [Arm(f"{name}{i}", "no_evidence", 0.0, (-1.0, 1.0), 1.0, 2.0, 1.0, i > 0, 3, name) for i in range(n)]
    return Verdict("no_evidence", name[:20], arms, 3, 40)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_whatever_a_row_says_is_text_and_never_markup(text: str) -> None:
    shown = report_html._examples(findings(text), results())
    plain = report_html._examples(findings("plain"), results())
    parsed = Markup(shown.encode("utf-8", "replace").decode())
    assert parsed.markup == Markup(plain).markup
    assert parsed.cells[3] == f"user: {text}".encode("utf-8", "replace").decode()


@settings(max_examples=300, deadline=None)
@given(text=texts, limit=st.integers(10, 100))
def test_clipped_text_is_a_beginning_within_its_bytes(text: str, limit: int) -> None:
    cut = report_html.clip(text, limit).encode("utf-8", "replace")
    assert len(cut) <= limit
    parsed = Markup(f"<td>{cut.decode()}</td>")
    assert [tag for tag, _ in parsed.markup] == ["td"]
    assert text.encode("utf-8", "replace").decode().startswith(parsed.cells[0].removesuffix("…"))


@pytest.mark.parametrize("show_text", [True, False])
def test_no_name_anywhere_in_a_run_becomes_markup(show_text: bool) -> None:
    pages = [
        report_html.page(findings(text, text), verdict(text), results(text), show_text=show_text)
        for text in (HOSTILE, "plain")
    ]
    hostile, plain = ([tag for tag, _ in Markup(page).markup] for page in pages)
    assert hostile == plain
    assert "script" not in hostile
    assert not any("onerror" in dict(attributes) for _, attributes in Markup(pages[0]).markup)


def test_thousands_of_everything_with_huge_texts_stay_below_the_limit() -> None:
    n, name = 5000, '"' * 3000
    page = report_html.page(findings(HOSTILE * 10_000, name), verdict(name, n), results(name, n), show_text=True)
    assert len(page.encode()) < LIMIT
    for more in (
        f"and {n - report_html.ROWS} more",  # arms, sources, clusters
        f"and {n - report_html.OUTPUTS} more",
        f"and {5 * n - report_html.FILES} more",
        f"# and {n - report_html.COMMANDS} more",
        f"the first {report_html.SEEDS} of {n} seeds",
        f"{report_html.ARMS} of {n} arms",
    ):
        assert more in page, more


def test_small_sources_are_added_up_so_that_shares_give_the_whole() -> None:
    n = report_html.ROWS + 10
    cells = Markup(report_html._shares("source", results("s", n)["composition"]["sources"], {"pool": n})).cells
    assert cells[0] == str(n)
    assert sum(float(cell.rstrip("%")) for cell in cells[1:]) == pytest.approx(100)


def test_a_control_that_did_not_beat_random_is_said_before_the_plot() -> None:
    page = report_html.page(findings("x"), verdict(n=2), results(n=2), show_text=True)
    assert page.index('class="verdict') < page.index("could not have seen an effect") < page.index("<img")
