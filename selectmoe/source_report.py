"""What every file was found to hold, and by what it was told: `sources.json`, and a table for the screen.

No command runs this module; `ingest` writes both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from selectmoe.formats import FORMATS, schema
from selectmoe.intake import ReadSource
from selectmoe.sources import Source

NAME = "sources.json"
MOST = 40
"""Files in the table; the others are added up."""


def report(sources: Sequence[ReadSource]) -> list[dict[str, Any]]:
    """One entry per file, in the order of datasets and files.

    Each has: dataset, file, kind (`.jsonl`, `.json`, `.parquet`, or stream), compression, bytes, schema (the one that was
    asked for, or empty), formats ({name: {records, keys: those that told it}}), records, rows, rejected ({kind: records}).
    """
    out = []
    for read in sources:
        bytes_of = read.source if isinstance(read.source, Source) else None
        tally = read.tally
        out.append(
            {
                "dataset": read.dataset.name,
                "file": read.source.place,
                "kind": bytes_of.kind if bytes_of else "stream",
                "compression": bytes_of.compression if bytes_of else "",
                "bytes": bytes_of.size if bytes_of else None,
                "schema": read.schema,
                "formats": {
                    name: {"records": n, "keys": list(_keys(name))} for name, n in sorted(tally.formats.items())
                },
                "records": tally.records,
                "rows": tally.rows,
                "rejected": dict(sorted(tally.rejected.items())),
            }
        )
    return out


def _keys(name: str) -> tuple[str, ...]:
    return (FORMATS.get(name) or schema(name, "schema")).keys


def table(sources: Sequence[ReadSource]) -> str:
    """The same for the screen, a line per file."""
    lines: list[tuple[str, ...]] = [("dataset/file", "bytes", "records", "rows", "rejected", "format, by its keys")]
    for read in sources[:MOST]:
        lines.append(_line(f"{read.dataset.name}/{read.source.place}", [read]))
    if rest := sources[MOST:]:
        lines.append(_line(f"and {len(rest)} more", rest))
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if n in (0, len(widths) - 1) else text.rjust(width)
            for n, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(place: str, reads: Sequence[ReadSource]) -> tuple[str, ...]:
    size = sum(read.source.size for read in reads if isinstance(read.source, Source))
    records, rows = (sum(getattr(read.tally, name) for read in reads) for name in ("records", "rows"))
    rejected, formats = Counter[str](), Counter[str]()
    for read in reads:
        rejected += read.tally.rejected
        formats += read.tally.formats
    why = ", ".join(f"{n} {kind}" for kind, n in rejected.most_common(3))
    found = [
        f"{name} ({', '.join(_keys(name))}{f': {n}' if len(formats) > 1 else ''})" for name, n in formats.most_common()
    ]
    asked = {read.schema for read in reads} - {""}
    told = "; ".join([*found, *(["asked for"] if asked else [])]) or "nothing"
    return (place, f"{size:,}", f"{records:,}", f"{rows:,}", f"{rejected.total():,}{f' ({why})' if why else ''}", told)
