"""A pool's files written from the spool, each by one worker; nothing but a row group is in memory.

No command runs this module; `ingest` writes through it. What goes into which file is cut from the rows' order and sizes
before it is shared out, so that the bytes are those of `pool.write_dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe import spool
from selectmoe.pool import Cut, Row, file_cut, file_name, group_cut, record_batch, write_file
from selectmoe.pool_statistics import Statistics
from selectmoe.table import Order, Table


@dataclass(frozen=True)
class FileTask:
    """One file to be written."""

    path: Path
    spool: Path
    table: Table
    """Its rows, in their order."""
    measured: bool = False
    """Whether lengths and languages are wanted."""

    @property
    def text(self) -> int:
        """Bytes of text in it."""
        return int(self.table.rows["text"].sum(dtype="u8"))


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: Path
    rows: int
    text: int
    """Bytes of text (UTF-8)."""
    dataset: str
    statistics: Statistics | None
    """Of its rows, where they are wanted."""


def file_tasks(folder: Path, texts: Path, table: Table, order: Order, measured: bool = False) -> Iterator[FileTask]:
    """The files of a dataset, one by one, so that a task is in memory only while it is done.

    Args:
        folder: of the dataset; created.
        texts: folder of the spool.
        table: the dataset's rows.
        order: those that are written, by id, as positions in the table.
        measured: whether lengths and languages are wanted.
    """
    folder.mkdir(parents=True)
    for number, piece in enumerate(_pieces(table.rows["text"][order], file_cut())):
        yield FileTask(file_name(folder, number), texts, table.take(order[piece]), measured)


def _pieces(sizes: npt.NDArray[Any], cut: Cut) -> Iterator[slice]:
    starts = [at for at, size in enumerate(sizes.tolist()) if cut.begins(size)]
    return (slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True))


def write(task: FileTask) -> Written:
    """Write one file.

    Raises:
        OSError: the disk is full.
        RuntimeError: a row is not what was read from its source.
    """
    groups = _pieces(task.table.rows["text"], group_cut())
    parts = (task.table.take(np.arange(group.start, group.stop)) for group in groups)
    statistics = Statistics() if task.measured else None
    rows = write_file(task.path, (_batch(task.spool, part, statistics) for part in parts))
    return Written(task.path, rows, task.text, task.table.name, statistics)


def _batch(texts: Path, table: Table, statistics: Statistics | None) -> Any:
    messages = spool.texts(texts).messages(table.workers, table.rows)
    if statistics:
        contents = table.rows["content"].astype(">u8").tobytes()
        for n, turns in enumerate(messages):
            statistics.add(contents[16 * n : 16 * n + 16], turns)
    return record_batch(table.name, table.ids, messages)


def read_rows(texts: Path, table: Table) -> list[Row]:
    """A table's rows with their texts."""
    messages = spool.texts(texts).messages(table.workers, table.rows)
    return [Row(table.name, row_id, turns) for row_id, turns in zip(table.ids.to_pylist(), messages, strict=True)]
