"""Write the table of values into the chart's README, from the comments in values.yaml.

    .venv/bin/python helm/readme.py

A comment that begins with two dashes (`# -- What it is`) documents the value below it, `## Title` begins a section of the
table, `# -- (free) ...` says that a mapping's keys are the user's. Everything between the two markers in README.md is
generated; a test says when it is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "select-moe"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->"
FREE = "(free) "


@dataclass(frozen=True)
class Value:
    """One key of values.yaml."""

    path: str
    default: Any
    doc: str
    """Its comment; empty: it has none."""
    section: str
    is_group: bool
    """A mapping with keys of the chart's own: its keys are values themselves."""

    @property
    def is_free(self) -> bool:
        """Whether it is a mapping whose keys are the user's."""
        return self.doc.startswith(FREE)


def read(path: Path) -> list[Value]:
    """Every key of a values file with its comment, in the file's order."""
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode), f"{path} is no mapping"
    return list(_walk(node, "", text.splitlines()))


def _walk(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = f"{prefix}.{key.value}" if prefix else key.value
        doc = _comment(lines, key.start_mark.line)
        default = yaml.safe_load(yaml.serialize(value))
        is_group = isinstance(value, yaml.MappingNode) and bool(value.value) and not doc.startswith(FREE)
        yield Value(path, default, doc, _section(lines, key.start_mark.line), is_group)
        if is_group:
            yield from _walk(value, path, lines)


def _comment(lines: list[str], at: int) -> str:
    """The comment right above a line."""
    found: list[str] = []
    while at > 0 and lines[at - 1].lstrip().startswith("#") and not lines[at - 1].startswith("## "):
        at -= 1
        found.insert(0, lines[at].lstrip()[1:].strip())
    text = " ".join(found)
    return text[3:].strip() if text.startswith("-- ") else ""


def _section(lines: list[str], at: int) -> str:
    """The title that a line stands under."""
    return next((line[3:].strip() for line in reversed(lines[:at]) if line.startswith("## ")), "")


def table(values: list[Value]) -> str:
    """The values as Markdown, one table for each section."""
    parts, section = [], None
    for value in values:
        if value.section != section:
            section = value.section
            parts.append(f"\n### {section}\n\n| value | default | what |\n|---|---|---|\n")
        default = "" if value.is_group else f"`{json.dumps(value.default)}`"
        name = f"**{value.path}**" if value.is_group else f"`{value.path}`"
        parts.append(f"| {name} | {_cell(default)} | {_cell(value.doc.removeprefix(FREE))} |\n")
    return "".join(parts) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def generated(chart: Path = CHART) -> str:
    """What README.md should be.

    Raises:
        SystemExit: README.md lacks the markers.
    """
    text = (chart / "README.md").read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{chart / 'README.md'}: the lines {BEGIN.strip()} and {END} are missing")
    return before + begin + table(read(chart / "values.yaml")) + end + after


if __name__ == "__main__":
    (CHART / "README.md").write_text(generated(), encoding="utf-8")
