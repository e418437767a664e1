"""The rows of a dataset in memory without their texts: some seventy bytes each; ids, subsets and the holdout are decided here.

No command runs this module; `ingest` and `check` do. Everything depends on the rows' contents and own ids alone, never on
the order in which they were read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe import spool
from selectmoe.spool import Place, Rows

Order = npt.NDArray[np.int64]
"""Positions of rows in a table."""
HASHES = 1 << 64
"""Values of a salted hash."""


@dataclass(frozen=True)
class Table:
    """Rows of one dataset."""

    name: str
    workers: npt.NDArray[np.uint16]
    """In whose spool files each lies."""
    rows: Rows
    ids: Any
    """An Arrow array of texts: the source's own ids, empty where it gives none; after `identified` the rows' ids."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, order: Order) -> Table:
        """The rows at these positions, in their order."""
        import pyarrow as pa

        return Table(self.name, self.workers[order], self.rows[order], self.ids.take(pa.array(order)))


def tables(folder: Path, places: Sequence[Place]) -> dict[str, Table]:
    """The datasets of a spool, by name.

    Args:
        folder: of the spool.
        places: of the rows of every piece that was read.

    Raises:
        RuntimeError: the pieces are not the spool's rows.
    """
    import pyarrow as pa

    sizes = Counter[str]()
    for place in places:
        sizes.update(place.rows)
    names = sorted(sizes)
    workers, rows = ({name: np.empty(sizes[name], kind) for name in names} for kind in (np.uint16, spool.ROW))
    ids: dict[str, list[Any]] = {name: [] for name in names}
    filled = dict.fromkeys(names, 0)
    for place in places:
        found, texts = spool.rows_at(folder, place)
        ends = np.concatenate([[0], np.cumsum(found["id"], dtype=np.int64)])
        own = pa.LargeStringArray.from_buffers(len(found), pa.py_buffer(ends), pa.py_buffer(texts))
        for name, number in place.numbers.items():
            at = np.flatnonzero(found["dataset"] == number)
            mine = slice(filled[name], filled[name] + len(at))
            workers[name][mine], rows[name][mine] = place.worker, found[at]
            ids[name].append(own.take(pa.array(at)))
            filled[name] += len(at)
    if filled != sizes:
        raise RuntimeError(f"{sizes.total()} rows were read, the spool holds {sum(filled.values())}: rows were lost")
    return {name: Table(name, workers[name], rows[name], pa.concat_arrays(ids[name])) for name in names}


def drawn(table: Table, ratio: float, limit: int | None) -> Table:
    """A subset of a table's rows, by a hash of their contents.

    Args:
        table: before `identified`.
        ratio: of the contents, about: those whose hash is below it; every copy of a content has the same fate.
        limit: rows at most: those with the smallest hashes; of equal contents those with the smallest own ids.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if ratio < 1:
        table = table.take(np.flatnonzero(table.rows["drawn"] < np.uint64(int(ratio * HASHES))))
    if limit is None or limit >= len(table):
        return table
    keys = {"drawn": table.rows["drawn"], "high": table.rows["content"][:, 0], "low": table.rows["content"][:, 1]}
    columns = {name: pa.array(values.astype(np.uint64)) for name, values in keys.items()} | {"id": table.ids}
    order = pc.sort_indices(pa.table(columns), sort_keys=[(name, "ascending") for name in columns])
    return table.take(np.sort(order.to_numpy()[:limit].astype(np.int64)))


def identified(table: Table) -> Table:
    """The rows with their ids, in the order of these: a row's own, else its content's; the k-th (k > 1) of an id gets `-k`.

    Rows that share an id are numbered in the order of their contents.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(table):
        return table
    base = _base_ids(table)
    order = pc.sort_indices(base).to_numpy().astype(np.int64)
    base = base.take(pa.array(order))
    again = np.concatenate([[False], pc.equal(base[1:], base[:-1]).to_numpy(zero_copy_only=False)])
    table = Table(table.name, table.workers[order], table.rows[order], base)
    if again.any():
        table = table.take(_by_content(table, again))
        ids = pc.replace_with_mask(base, pa.array(again), pa.array(_numbered(base, again), base.type))
        order = pc.sort_indices(ids).to_numpy().astype(np.int64)
        table = Table(table.name, table.workers, table.rows, ids).take(order)
    pa.default_memory_pool().release_unused()
    return table


def _by_content(table: Table, again: npt.NDArray[np.bool_]) -> Order:
    """The order of the rows when those that share an id are sorted by their contents; `again` as in `_numbered`."""
    order = np.arange(len(table))
    shares = np.flatnonzero(again | np.append(again[1:], False))
    content = table.rows["content"][shares]
    order[shares] = shares[np.lexsort((content[:, 1], content[:, 0], np.cumsum(~again)[shares]))]
    return order


def _base_ids(table: Table) -> Any:
    """A row's own id, else `NAME-` and 16 hex digits of its content."""
    import pyarrow as pa
    import pyarrow.compute as pc

    nibbles = np.frombuffer(table.rows["content"][:, 0].astype(">u8").tobytes(), np.uint8)
    digits = np.empty(2 * len(nibbles), np.uint8)
    hexadecimal = np.frombuffer(b"0123456789abcdef", np.uint8)
    digits[0::2], digits[1::2] = hexadecimal[nibbles >> 4], hexadecimal[nibbles & 15]
    ends = pa.py_buffer(np.arange(0, len(digits) + 1, 16, dtype=np.int64))
    texts = pa.LargeStringArray.from_buffers(len(table), ends, pa.py_buffer(digits))
    parts = [pa.scalar(part, pa.large_string()) for part in (table.name, "-")]
    made = pc.binary_join_element_wise(parts[0], texts, parts[1])
    own = pc.not_equal(table.ids, "")
    return pc.if_else(own, table.ids, made) if pc.any(own).as_py() else made


def _numbered(base: Any, again: npt.NDArray[np.bool_]) -> list[str]:
    """The ids of the rows that repeat the one before: `-2`, `-3` and so on, past those that are somebody's own.

    Args:
        base: ids in their order.
        again: whether a row has the id of the one before.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    repeated = base.filter(pa.array(again)).to_pylist()
    shared = set(repeated)
    numbered = base.filter(pc.match_substring_regex(base, r"-[0-9]+$")).to_pylist()
    taken = {name for name in numbered if name.rpartition("-")[0] in shared}
    made = []
    for name, same in groupby(repeated):
        k = 2
        for _ in same:
            while f"{name}-{k}" in taken:
                k += 1
            taken.add(f"{name}-{k}")
            made.append(f"{name}-{k}")
    return made


@dataclass(frozen=True)
class Split:
    """A table's rows after the holdout was taken, each as positions in ascending order."""

    pool: Order
    holdout: Order
    copies: Order
    """Rows whose content is in the holdout already."""


def split(found: Mapping[str, Table], below: int) -> dict[str, Split]:
    """Split tables by a hash of the rows' contents, with one threshold for all of them.

    Whether a row stays in the pool depends on its content alone, never on the other datasets'. In the holdout a content
    stands once: the first row by dataset and id that has it.

    Args:
        found: by name, sorted, `identified`.
        below: contents whose salted hash is below this go.
    """
    gone = {name: np.flatnonzero(_below(table.rows["held"], below)) for name, table in found.items()}
    contents = [found[name].rows["content"][at].astype(np.uint64) for name, at in gone.items()]
    whole = np.concatenate([np.empty((0, 2), np.uint64), *contents])
    order = np.lexsort((whole[:, 1], whole[:, 0]))  # stable: of equal contents the first comes first
    first = np.ones(len(order), bool)
    first[order[1:]] = (whole[order[1:]] != whole[order[:-1]]).any(axis=1)
    out: dict[str, Split] = {}
    at = 0
    for name, rows in gone.items():
        mine = first[at : at + len(rows)]
        at += len(rows)
        stays = np.ones(len(found[name]), bool)
        stays[rows] = False
        out[name] = Split(np.flatnonzero(stays), rows[mine], rows[~mine])
    return out


def _below(hashes: npt.NDArray[Any], below: int) -> npt.NDArray[np.bool_]:
    return np.ones(len(hashes), bool) if below >= HASHES else hashes < np.uint64(below)


def threshold(found: Mapping[str, Table], contents: int) -> int:
    """The threshold below which the salted hashes of so many different contents lie, over all tables.

    Contents whose 64 bits agree (of ten million, some pair does in one of three million cases) count as one.
    """
    if not contents:
        return 0
    hashes = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(t.rows["held"].astype(np.uint64) for t in found.values())])
    )
    return int(hashes[contents]) if contents < len(hashes) else HASHES


def duplicates(found: Mapping[str, Table]) -> int:
    """Rows whose content another row has, too, the first of them left out."""
    whole = np.concatenate(
        [np.empty((0, 2), np.uint64), *(t.rows["content"].astype(np.uint64) for t in found.values())]
    )
    order = np.lexsort((whole[:, 1], whole[:, 0]))
    return int((whole[order[1:]] == whole[order[:-1]]).all(axis=1).sum())
