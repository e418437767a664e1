"""Pools of rows on disk: a folder of Parquet files per dataset, rows sorted by id, the same bytes for the same rows.

No command runs this module; `ingest` writes pools, every other stage reads them. A row is keyed by (dataset, id)
everywhere; an id is the source's own or comes from the content, and is never a position.

    pool/manifest.json         its inputs are the datasets below
    pool/NAME/manifest.json    an output of its own: its identity depends on this dataset alone
    pool/NAME/00000.parquet    rows sorted by id over all files: 00001.parquet goes on where 00000.parquet ends

A holdout is laid out in the same way. Columns: dataset (string), id (string), messages (list of {role: string, content:
string}). Rows stream in and out: a row group is the most that is in memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError, unwritable
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import canonical_json, read_manifest

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

ROLES = ("system", "user", "assistant")
DATASET_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}")
"""What a dataset may be called, since the name becomes a file name."""

ROW_GROUP = 5_000
"""Rows per Parquet row group, at most; fixed like the other sizes, since they show in the bytes."""
GROUP_TEXT = 4 << 20
"""Bytes of text (UTF-8, contents only) per row group, at most; a row is never split."""
FILE_ROWS = 500_000
"""Rows per file, at most."""
FILE_TEXT = 64 << 20
"""Bytes of text per file, at most."""
FILE = re.compile(r"[0-9]{5,}\.parquet")
"""Names of a dataset's files."""
COLUMNS = ["dataset", "id", "messages"]
READ_ROWS = 1000
"""Rows that are read at once, at most."""


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


def text_bytes(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of the contents."""
    return sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)


@dataclass
class Cut:
    """Cuts rows in their order into pieces; a piece has one row at least, whatever its size."""

    rows: int
    """Rows of a piece, at most."""
    text: int
    """Bytes of text of a piece, at most."""
    _rows: int = 0
    _text: int = 0

    def begins(self, size: int) -> bool:
        """Whether the next row, of so many bytes of text, begins a piece; the first does."""
        begins = not self._rows or self._rows == self.rows or self._text + size > self.text
        if begins:
            self._rows = self._text = 0
        self._rows += 1
        self._text += size
        return begins


def pieces(rows: Iterable[Row], cut: Cut) -> Iterator[Iterator[Row]]:
    """The pieces of a stream of rows, themselves streams: each ends where the next is asked for."""
    number = 0

    def piece(row: Row) -> int:
        nonlocal number
        number += cut.begins(text_bytes(row.messages))
        return number

    return (group for _, group in groupby(rows, piece))


def file_cut() -> Cut:
    """What goes into one file."""
    return Cut(FILE_ROWS, FILE_TEXT)


def group_cut() -> Cut:
    """What goes into one row group of a file."""
    return Cut(ROW_GROUP, GROUP_TEXT)


def write_dataset(folder: Path, rows: Iterable[Row]) -> int:
    """Write the rows of one dataset as `00000.parquet` and on; equal rows give equal bytes.

    Args:
        folder: created where it does not exist; holds no such files yet.
        rows: of one dataset, in ascending order of their ids.

    Returns:
        How many they are.

    Raises:
        ValueError: the ids do not ascend, the rows are of several datasets, or their name is no file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for number, file in enumerate(pieces(_ascending(rows), file_cut())):
        groups = (list(group) for group in pieces(file, group_cut()))
        batches = (record_batch(g[0].dataset, [r.id for r in g], [r.messages for r in g]) for g in groups)
        written += write_file(file_name(folder, number), batches)
    return written


def _ascending(rows: Iterable[Row]) -> Iterator[Row]:
    before: Row | None = None
    for row in rows:
        if before is None and not DATASET_NAME.fullmatch(row.dataset):
            raise ValueError(f"dataset name {row.dataset!r} cannot be a file name")
        if before is not None and before.dataset != row.dataset:
            raise ValueError(f"rows of {before.dataset} and {row.dataset} in one dataset")
        if before is not None and before.id >= row.id:
            which = "two rows have" if before.id == row.id else f"after {before.id!r} comes"
            raise ValueError(f"{row.dataset}: {which} the id {row.id!r}")
        before = row
        yield row


def file_name(folder: Path, number: int) -> Path:
    """The path of a dataset's n-th file."""
    return folder / f"{number:05d}.parquet"


def _schema() -> Any:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema([("dataset", pa.string()), ("id", pa.string()), ("messages", pa.list_(message))])


def record_batch(dataset: str, ids: Any, messages: Sequence[Sequence[Message]]) -> Any:
    """Rows of one dataset as an Arrow record batch.

    Args:
        dataset: its name.
        ids: of the rows, as a sequence of texts or an Arrow array.
        messages: of the rows.
    """
    import pyarrow as pa

    schema = _schema()
    column = schema.field("messages").type
    flat = [m for row in messages for m in row]
    texts = [pa.array([m[key] for m in flat], pa.string()) for key in ("role", "content")]
    structs = pa.StructArray.from_arrays(texts, fields=list(column.value_type))
    ends = pa.array([0, *accumulate(map(len, messages))], pa.int32())
    lists = pa.ListArray.from_arrays(ends, structs, type=column)
    names = pa.repeat(pa.scalar(dataset, pa.string()), len(messages))
    return pa.record_batch([names, pa.array(ids, pa.string()), lists], schema=schema)


def write_file(path: Path, batches: Iterable[Any]) -> int:
    """Write record batches as one file of a dataset, a row group each; returns the number of rows.

    Raises:
        Unavailable: the disk is full.
    """
    import pyarrow.parquet as pq

    written = 0
    options: dict[str, Any] = {"compression": "zstd", "version": "2.6", "store_schema": False}
    options |= {"use_dictionary": ["dataset", "messages.list.element.role"], "write_statistics": ["id"]}
    try:
        with pq.ParquetWriter(path, _schema(), **options) as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=max(1, len(batch)))
                written += len(batch)
    except OSError as error:
        raise unwritable(path, error) from None
    return written


def write_pool(directory: Path, rows: Iterable[Row]) -> None:
    """Write rows in memory as a pool, a folder per dataset; manifests are left to the caller.

    Args:
        directory: created where it does not exist.
        rows: in any order.

    Raises:
        ValueError: two rows have the same (dataset, id), or a dataset's name is no file name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, group in groupby(sorted(rows, key=lambda row: row.key), key=lambda row: row.dataset):
        if not DATASET_NAME.fullmatch(name):
            raise ValueError(f"dataset name {name!r} cannot be a file name")
        write_dataset(directory / name, group)


def iter_rows(folder: Path | str) -> Iterator[Row]:
    """The rows of one dataset, in ascending order of their ids, streamed.

    Args:
        folder: of one dataset (see `datasets`).

    Raises:
        UserError: it holds no dataset, or a file of it is not a pool's.
    """
    for batch in _batches(Path(folder), COLUMNS):
        yield from _rows(batch)


def row_ids(folder: Path | str) -> Iterator[str]:
    """The ids of one dataset's rows, in their order, streamed; their texts are not read.

    Args:
        folder: of one dataset (see `datasets`).

    Raises:
        UserError: as `iter_rows`.
    """
    for batch in _batches(Path(folder), ["id"]):
        yield from batch.column("id").to_pylist()


def _batches(folder: Path, columns: list[str]) -> Iterator[Any]:
    """The record batches of a dataset's files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in _files(folder):
        try:
            with pq.ParquetFile(path) as file:
                if file.schema_arrow.names != COLUMNS:
                    has = f"has the columns {file.schema_arrow.names}"
                    raise UserError(f"{path} {has}; a pool has {', '.join(COLUMNS)}")
                yield from file.iter_batches(READ_ROWS, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a pool's Parquet file: {str(error).splitlines()[0]}") from None


def _rows(batch: Any) -> Iterator[Row]:
    lists = batch.column("messages")
    structs = lists.flatten()
    roles, contents = (structs.field(name).to_pylist() for name in ("role", "content"))
    at = 0
    names, ids, lengths = (c.to_pylist() for c in (batch.column("dataset"), batch.column("id"), lists.value_lengths()))
    for dataset, row_id, n in zip(names, ids, lengths, strict=True):
        turns = zip(roles[at : at + n], contents[at : at + n], strict=True)
        yield Row(dataset, row_id, [{"role": role, "content": content} for role, content in turns])
        at += n


def _files(folder: Path) -> list[Path]:
    """A dataset's files in their order."""
    files = sorted(folder.glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UserError(f"{folder} holds no 00000.parquet: it is not a dataset of a pool (ingest writes one)")
    if wrong := [path.name for path in files if not FILE.fullmatch(path.name)]:
        raise UserError(f"{folder} holds {wrong[0]}, which is not a pool's Parquet file of this version: ingest again")
    return files


def datasets(path: Path | str) -> dict[str, Path]:
    """Name -> folder of every dataset of a pool, by name; of one dataset's folder, itself.

    Args:
        path: a pool's folder (see `locate`), or one dataset's.

    Raises:
        UserError: it holds no pool, or a dataset that its manifest names is not there.
    """
    path = Path(path)
    if any(path.glob("*.parquet")):
        first = next(iter_rows(path), None)
        return {first.dataset if first else path.name: path}
    names = _parts(path) or sorted({file.parent.name for file in path.glob("*/*.parquet")})
    found = {name: path / name for name in names}
    if missing := [name for name, folder in found.items() if not folder.is_dir()]:
        raise UserError(f"{path}: {missing[0]} is missing (its manifest lists it)")
    if not found:
        raise UserError(f"{path} holds no NAME/00000.parquet: it is not a pool (ingest writes one)")
    return found


def _parts(path: Path) -> list[str]:
    """The datasets that a pool's manifest names; none where it has no manifest."""
    return read_manifest(path, verify=False).parts if (path / MANIFEST).is_file() else []


def read_pool(path: Path | str) -> list[Row]:
    """Every row of a pool, or of one dataset, sorted by (dataset, id).

    Args:
        path: as for `datasets`.

    Raises:
        UserError: the folder holds no pool, or a file of it is not one.
    """
    return sorted((row for folder in datasets(path).values() for row in iter_rows(folder)), key=lambda row: row.key)


def locate(data: Path | str, part: str = "pool") -> Path:
    """The folder of a pool, a holdout or one dataset of it, from that folder itself or from ingest's output around it.

    Args:
        data: ingest's output_dir, its `pool` or `holdout` folder, or a dataset's folder in there.
        part: which of the two is meant where `data` is ingest's output_dir.

    Raises:
        UserError: it is none of them.
    """
    path = Path(data)
    if (path / part / MANIFEST).is_file() and not _parts(path):  # a dataset may be called pool
        return path / part
    if (path / MANIFEST).is_file() and (any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))):
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist: name ingest's output_dir, or its {part} folder")
    raise UserError(f"{path} is neither ingest's output_dir nor its {part} folder (run ingest on your rows first)")
