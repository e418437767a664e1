"""`selectmoe.report_markdown`: pytest tests/unit/test_report_markdown.py"""

from __future__ import annotations

from selectmoe.report_markdown import ROWS, summary
from selectmoe.verdict import Arm, Verdict


def verdict(*names: str) -> Verdict:
    """A verdict with these arms; the last one is the control."""
    arms = [
        Arm(name, "no_evidence", 0.01, (-0.1, 0.1), 0.5, 4.0, 0.2, name == names[-1], 3, "more seeds") for name in names
    ]
    return Verdict("no_evidence", "bits", arms, 3, 40)


def test_it_holds_sentence_intervals_and_aucs() -> None:
    judged = verdict("selected", "oracle")
    text = summary(judged, {"auc": {"held_out": {"any": {"answer": 0.75, "nll": 0.5}, "swapped": {"answer": 1.0}}}})
    assert "**No evidence that selected differs from random" in text
    assert "could not have seen an effect" in text
    assert "| selected | no evidence | +0.0100 | -0.1000 to +0.1000 | 0.5 | 0.2000 |" in text
    assert "| oracle (control) |" in text
    assert "| any | 0.750 | 0.500 |" in text
    assert "| swapped | 1.000 |  |" in text


def test_nothing_planted_is_said() -> None:
    assert "No planted row" in summary(verdict("selected"), {"auc": {}})


def test_names_are_plain_text_and_tables_are_bounded() -> None:
    hostile = "<img src=x> | [a](http://b) `c` **d**\n# e " + "x" * 10_000
    text = summary(verdict("selected", *[f"{hostile}{i}" for i in range(5000)]), {"auc": {}})
    assert f"and {5001 - ROWS} more" in text
    assert "<img" not in text
    assert "[a](" not in text.replace("\\[", "")
    assert "\n# e" not in text
    assert len(text) < 20_000
