"""The first rows of an output's Parquet files as CSV, which MLflow's artifact viewer can show (Parquet it cannot).

No command runs this module. `SELECTMOE_SHOW_TEXT=false` keeps the rows' text out (the report's `show_text`).
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from selectmoe.manifest import RESERVED

SHOW_TEXT = "SELECTMOE_SHOW_TEXT"
"""Environment variable: `false` keeps the rows' text out of previews."""
TEXT = ("messages", "text", "content", "prompt", "completion", "instruction", "response")
"""Columns that hold what people wrote."""
ROWS = 200
FILES = 30
"""How many files of one output get a preview, at most: the first by name."""


def previews(output: Path, folder: Path) -> list[Path]:
    """Write the previews of an output's Parquet files.

    Args:
        output: a finished output.
        folder: where to write, in the same sub-folders.

    Returns:
        The files.
    """
    import pyarrow.parquet as pq

    found = [p for p in sorted(output.rglob("*.parquet")) if not RESERVED & set(p.relative_to(output).parts)]
    made = []
    for path in found[:FILES]:
        target = folder / path.relative_to(output).with_suffix(".csv")
        target.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetFile(path) as file:
            columns = [c for c in file.schema_arrow.names if shows_text() or c not in TEXT]
            batch = next(file.iter_batches(ROWS, columns=columns), None)
        with open(target, "w", encoding="utf-8", errors="replace", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            for row in batch.to_pylist() if batch is not None else []:
                writer.writerow({c: json.dumps(v) if isinstance(v, list | dict) else v for c, v in row.items()})
        made.append(target)
    return made


def shows_text() -> bool:
    """Whether rows' text may be seen by whoever can see MLflow."""
    return os.environ.get(SHOW_TEXT, "true").lower() != "false"
