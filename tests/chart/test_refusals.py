"""Values that the chart refuses, each with a message that names the place: bad_values/, one mistake a file.

.venv/bin/python -m pytest tests/chart/test_refusals.py

The first line of a file says what of the message has to be there. The same file is refused by install, template and lint.
"""

from __future__ import annotations

from pathlib import Path

import chart
import pytest
import yaml
from chart import CHART, HELM

CORPUS = sorted((Path(__file__).parent / "bad_values").glob("*.yaml"))
LONGEST = 12
"""Lines that a person reads; helm's own heading takes two of them."""


def expected(path: Path) -> str:
    """What the message must say, from the file's first line."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    assert first.startswith("# refused: "), f"{path.name} does not say how it is refused"
    return first.removeprefix("# refused: ")


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_refused(path: Path) -> None:
    done = chart.run(HELM, "template", "demo", str(CHART), "--values", str(path), check=False)
    assert done.returncode != 0, "it was taken"
    assert expected(path) in done.stderr
    assert not done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) <= LONGEST, done.stderr
    assert "nil pointer" not in done.stderr
    assert "error calling" not in done.stderr or "fail" in done.stderr


@pytest.mark.parametrize("path", CORPUS[::10], ids=lambda path: path.stem)
def test_refused_by_lint_too(path: Path) -> None:
    done = chart.run(HELM, "lint", "--strict", str(CHART), "--values", str(path), check=False)
    assert done.returncode != 0
    assert expected(path) in done.stdout + done.stderr


def test_the_corpus_holds_one_mistake_each() -> None:
    assert len(CORPUS) >= 30
    assert len({path.read_text(encoding="utf-8").partition("\n")[2] for path in CORPUS}) == len(CORPUS)
    for path in CORPUS:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
