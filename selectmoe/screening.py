"""Rows looked at before they go into a pool: near-duplicates of others, and rows that give an evaluation away.

No command runs this module; `ingest near_duplicates.* decontaminate.*` does. Workers read the rows' texts from the spool, a
slice per task; what they find is put together here, and is the same in whatever order and by however many it is found.
"""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selectmoe import pool_files, spool
from selectmoe.decontamination import HOLDOUT, DecontaminateConfig, Document, Index, Overlap, task_documents
from selectmoe.errors import unwritable
from selectmoe.near_duplicates import NearDuplicates, NearDuplicatesConfig, sketch
from selectmoe.pool import Row
from selectmoe.progress import transfer
from selectmoe.table import Order, Table
from selectmoe.workers import Workers

NEAR = "near-duplicate of another row of its dataset"
CONTAMINATED = "shares words with an evaluation task"
NEAR_HOLDOUT = "shares words with a row of the holdout"
SLICE = 5000
"""Rows that one task looks at."""


@dataclass(frozen=True)
class Look:
    """Rows that a worker looks at."""

    spool: Path
    table: Table
    first: int
    """The first row's number in its dataset."""
    near: NearDuplicatesConfig | None
    """What to sketch them for, if at all."""
    index: Path | None
    """What to compare them with, if at all: a file of `save`."""


@dataclass(frozen=True)
class Looked:
    """What a worker found."""

    first: int
    contents: bytes
    """Hashes of the rows' contents, 16 bytes each."""
    sketches: list[bytes]
    overlaps: dict[int, Overlap]
    """By the row's number in its dataset."""
    text: int
    """Bytes of text that were looked at."""


@dataclass(frozen=True)
class Gone:
    """Rows of a dataset that go."""

    table: Table
    reasons: list[str]
    """Why each goes, for whoever reads it."""
    kinds: Counter[str]
    """The same in few words -> rows."""


def save(index: Index, path: Path) -> Path:
    """Write an index where the workers find it; returns its path.

    Raises:
        Unavailable: the disk is full.
    """
    try:
        path.write_bytes(pickle.dumps(index, protocol=5))
    except OSError as error:
        raise unwritable(path, error) from None
    return path


@functools.lru_cache(maxsize=1)
def _index(path: Path) -> Index:
    index: Index = pickle.loads(path.read_bytes())  # this run's own file
    return index


def look(task: Look) -> Looked:
    """Look at some rows."""
    messages = spool.texts(task.spool).messages(task.table.workers, task.table.rows)
    sketches = [sketch(turns, task.near) for turns in messages] if task.near else []
    found = _index(task.index).find(messages) if task.index else {}
    overlaps = {task.first + n: overlap for n, overlap in found.items()}
    contents = task.table.rows["content"].astype(">u8").tobytes()
    return Looked(task.first, contents, sketches, overlaps, int(task.table.rows["text"].sum(dtype="u8")))


def task_index(config: DecontaminateConfig) -> Index | None:
    """The index of the tasks that are named; None where none is.

    Raises:
        UserError: as `decontamination.task_documents`.
    """
    if not config.tasks:
        return None
    return Index(task_documents(config.tasks, config.include_path, config.include_digest), config.ngram)


def screen(
    table: Table, near: NearDuplicatesConfig, index: Path | None, folder: Path, workers: Workers
) -> tuple[Table, Gone]:
    """Find the rows of a dataset that go before the holdout is drawn.

    Args:
        table: its rows with their ids, in the order of these.
        near: threshold 0: near-duplicates stay.
        index: of evaluation tasks (a file of `save`), or None.
        folder: of the spool.
        workers: who looks.

    Returns:
        The rows that stay, and those that go.
    """
    if not near.threshold and not index:
        return table, _part(table, {}, "", {}, "")[1]
    search = NearDuplicates(near, folder / "near") if near.threshold else None
    overlaps: dict[int, str] = {}
    for found in _look_at(table, np.arange(len(table)), near if search else None, index, folder, workers):
        overlaps |= {row: overlap.reason for row, overlap in found.overlaps.items()}
        for n, sketched in enumerate(found.sketches):
            if search and found.first + n not in found.overlaps:
                search.add(found.first + n, found.contents[16 * n : 16 * n + 16], sketched)
    alike = {
        one.row: f"near-duplicate of {table.ids[one.kept].as_py()} (similarity {one.similarity:.3f})"
        for one in (search.find() if search else ())
    }
    return _part(table, overlaps, CONTAMINATED, alike, NEAR)


def _part(table: Table, first: dict[int, str], kind: str, second: dict[int, str], other: str) -> tuple[Table, Gone]:
    """A table without some of its rows, and these: row -> reason, and the kind of all of these reasons, twice."""
    reasons = first | second
    rows = sorted(reasons)
    went = Gone(
        table.take(np.array(rows, np.int64)),
        [reasons[row] for row in rows],
        +Counter({kind: len(first)}) + Counter({other: len(second)}),
    )
    if not rows:
        return table, went
    stays = np.ones(len(table), bool)
    stays[rows] = False
    return table.take(np.flatnonzero(stays)), went


@dataclass(frozen=True)
class Held:
    """The index of the holdout, where the workers find it."""

    path: Path
    identity: str
    """Digest of the holdout."""


def holdout_index(holdouts: Mapping[str, Table], ngram: int, folder: Path) -> Held:
    """What the pool is compared with, to clear it of the words of the holdout.

    Args:
        holdouts: rows by dataset.
        ngram: words that must be shared.
        folder: of the spool.
    """
    rows = (row for name in sorted(holdouts) for row in pool_files.read_rows(folder, holdouts[name]))
    index = Index(map(_document, rows), ngram)
    return Held(save(index, folder / "holdout.index"), index.identity)


def screen_pool(table: Table, pool: Order, held: Held, folder: Path, workers: Workers) -> tuple[Order, Gone]:
    """Find the rows of a dataset's pool that share words with rows of the holdout, of any dataset.

    Args:
        table: the dataset's rows.
        pool: which of them are in the pool.
        held: the holdout.
        folder: of the spool.
        workers: who looks.

    Returns:
        The rows of the pool that stay, and those that go.
    """
    overlaps: dict[int, str] = {}
    for found in _look_at(table, pool, None, held.path, folder, workers):
        overlaps |= {row: overlap.reason for row, overlap in found.overlaps.items()}
    went = sorted(overlaps)
    stays = np.ones(len(pool), bool)
    stays[went] = False
    gone = Gone(table.take(pool[went]), [overlaps[row] for row in went], +Counter({NEAR_HOLDOUT: len(went)}))
    return pool[stays], gone


def _document(row: Row) -> Document:
    return Document(HOLDOUT, f"{row.dataset}/{row.id}", ("\n".join(m["content"] for m in row.messages),))


def _look_at(
    table: Table,
    order: Order,
    near: NearDuplicatesConfig | None,
    index: Path | None,
    folder: Path,
    workers: Workers,
) -> Iterator[Looked]:
    """Look at rows; their numbers are places in `order`."""
    tasks = (Look(folder, table.take(order[at : at + SLICE]), at, near, index) for at in range(0, len(order), SLICE))
    with transfer(f"ingest: comparing {table.name}", int(table.rows["text"][order].sum(dtype="u8"))) as moved:
        for found in workers.map(look, tasks):
            yield found
            moved(found.text)
