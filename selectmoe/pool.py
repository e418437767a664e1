"""Pools of rows on disk: one Parquet file per dataset, rows sorted by id, the same bytes for the same rows.

No command runs this module; `ingest` writes pools, every other stage reads them. A row is keyed by (dataset, id)
everywhere; an id is the source's own or comes from the content, and is never a position.

Columns of `NAME.parquet`: dataset (string), id (string), messages (list of {role: string, content: string}).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import canonical_json

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

ROLES = ("system", "user", "assistant")
DATASET_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
"""What a dataset may be called, since the name becomes a file name."""

ROW_GROUP = 10_000
"""Rows per Parquet row group; fixed, since it shows in the bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction row."""

    dataset: str
    id: str
    messages: list[Message]

    @property
    def key(self) -> tuple[str, str]:
        """(dataset, id): what every join goes by."""
        return (self.dataset, self.id)

    @property
    def answers(self) -> list[str]:
        """The texts of the assistant, in order."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"]


def content_hash(messages: Sequence[Message]) -> str:
    """SHA-256 (hex) of the canonical messages: equal for exact duplicates, and for nothing else."""
    return hashlib.sha256(canonical_json([{"role": m["role"], "content": m["content"]} for m in messages])).hexdigest()


def content_id(dataset: str, messages: Sequence[Message]) -> str:
    """The id of a row whose source gives none: the dataset's name and 16 hex digits of its content's hash."""
    return f"{dataset}-{content_hash(messages)[:16]}"


def write_pool(directory: Path, rows: Iterable[Row]) -> None:
    """Write rows as one Parquet file per dataset.

    Args:
        directory: created where it does not exist.
        rows: in any order; the files are sorted by id.

    Raises:
        ValueError: two rows have the same (dataset, id), or a dataset's name is no file name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("dataset", pa.string()), ("id", pa.string()), ("messages", pa.list_(message))])
    directory.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: row.key)
    for before, after in pairwise(ordered):
        if before.key == after.key:
            raise ValueError(f"two rows of the pool have the key {after.key}")
    for name, group in groupby(ordered, key=lambda row: row.dataset):
        if not DATASET_NAME.fullmatch(name):
            raise ValueError(f"dataset name {name!r} cannot be a file name")
        table = pa.Table.from_pylist(
            [{"dataset": r.dataset, "id": r.id, "messages": r.messages} for r in group], schema
        )
        pq.write_table(
            table,
            directory / f"{name}.parquet",
            row_group_size=ROW_GROUP,
            compression="zstd",
            version="2.6",
            store_schema=False,
        )


def read_pool(path: Path | str) -> list[Row]:
    """Every row of a pool, sorted by (dataset, id).

    Args:
        path: a folder of `NAME.parquet` files (see `locate`).

    Raises:
        UserError: the folder holds no pool, or a file of it is not one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    files = sorted(Path(path).glob("*.parquet"))
    if not files:
        raise UserError(f"{path} holds no NAME.parquet: it is not a pool (ingest writes one)")
    for file in files:
        try:
            table = pq.read_table(file, columns=["dataset", "id", "messages"])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{file} is not a pool's Parquet file: {str(error).splitlines()[0]}") from None
        if table.column_names != ["dataset", "id", "messages"]:
            raise UserError(f"{file} has the columns {table.column_names}; a pool has dataset, id, messages")
        rows += [Row(r["dataset"], r["id"], r["messages"]) for r in table.to_pylist()]
    return sorted(rows, key=lambda row: row.key)


def locate(data: Path | str, part: str = "pool") -> Path:
    """The folder of a pool or holdout, from that folder itself or from ingest's output around it.

    Args:
        data: ingest's output_dir, or its `pool` or `holdout` folder.
        part: which of the two is meant where `data` is ingest's output_dir.

    Raises:
        UserError: it is neither.
    """
    path = Path(data)
    if (path / part / MANIFEST).is_file():
        return path / part
    if (path / MANIFEST).is_file() and any(path.glob("*.parquet")):
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist: name ingest's output_dir, or its {part} folder")
    raise UserError(f"{path} is neither ingest's output_dir nor its {part} folder (run ingest on your rows first)")
