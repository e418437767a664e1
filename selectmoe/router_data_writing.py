"""Router data written: gathered in memory from results that come in any order, a file's bytes in one go.

No command runs this module; `selectmoe route` and `selectmoe merge` write with it. The format: `selectmoe.router_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import Unavailable
from selectmoe.router_data import NUMBERS, TENSORS, Arrays, Floats, Ints, RouterData
from selectmoe.shards import Planned, write

PART_BYTES = 256 * 2**20
"""Bytes of float32 per safetensors file, at most (a single row is never split)."""
WINDOW_BYTES = 2**29
"""Bytes of float32 that are gathered in memory before they are written, at most (one file's at least)."""

Blocks = Callable[[range], Iterable[tuple[Ints, Arrays]]]
"""For a window of a dataset's rows: positions [n] in the dataset, and tensors [n, ...] and numbers [n], for all rows of
the window in any order; other rows may be among them."""


def write_dataset(
    folder: Path,
    dataset: str,
    ids: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    columns: Arrays,
    blocks: Blocks,
) -> None:
    """Write one dataset's router data from results that come in any order.

    Rows are gathered in memory, a window of `WINDOW_BYTES` at a time, and written from there in one go: writing every row
    to its place in the file costs several times as much.

    Args:
        folder: an existing, empty folder.
        dataset: its name.
        ids: of the N rows, ascending.
        shapes: tensor -> its shape for one row.
        columns: [N] tokens, answer_tokens, truncated, answer_bytes, batch.
        blocks: gives the results; asked once for every window.

    Raises:
        Unavailable: the disk is full.
        RuntimeError: a row comes twice or not at all.
    """
    shapes = {name: tuple(shapes[name]) for name in TENSORS if name in shapes}
    row_bytes = max(1, 4 * sum(math.prod(shape) for shape in shapes.values()))
    step = max(1, PART_BYTES // row_bytes)
    window = step * max(1, WINDOW_BYTES // (step * row_bytes))
    room = {name: np.empty((min(window, len(ids)), *shape), np.float32) for name, shape in shapes.items()}
    for start in range(0, len(ids), window):
        here = range(start, min(len(ids), start + window))
        tensors = {name: array[: len(here)] for name, array in room.items()}
        numbers = {name: np.full(len(here), np.nan) for name in ("nll", "nll_unconditional")}
        _gather({**tensors, **numbers}, here, dataset, ids, blocks(here))
        for first in range(0, len(here), step):
            rows = slice(first, min(len(here), first + step))
            name = f"{(start + first) // step:05d}"
            _write_tensors(folder / f"{name}.safetensors", {key: array[rows] for key, array in tensors.items()})
            whole = slice(start + rows.start, start + rows.stop)
            index = {key: array[whole] for key, array in columns.items()}
            index |= {key: array[rows] for key, array in numbers.items()}
            _write_index(folder / f"{name}.parquet", dataset, ids[whole], index)


def _gather(
    targets: Mapping[str, npt.NDArray[Any]],
    here: range,
    dataset: str,
    ids: Sequence[str],
    blocks: Iterable[tuple[Ints, Arrays]],
) -> None:
    """Put the results of a window's rows into arrays, in their order."""
    came = np.zeros(len(here), dtype=bool)
    for rows, arrays in blocks:
        inside = (rows >= here.start) & (rows < here.stop)
        chosen = slice(None) if inside.all() else np.flatnonzero(inside)
        at = rows[chosen] - here.start
        if came[at].any():
            raise RuntimeError(f"{dataset}: row {ids[here.start + int(at[came[at]][0])]!r} came twice")
        came[at] = True
        for name, target in targets.items():
            if name in arrays:
                target[at] = arrays[name][chosen]
    if not came.all():
        raise RuntimeError(f"{dataset}: row {ids[here.start + int(np.argmin(came))]!r} has no result")


def _write_tensors(path: Path, tensors: Mapping[str, Floats]) -> None:
    write(path, [Planned(n, "F32", a.shape, a.nbytes, partial(_bytes, a)) for n, a in tensors.items()])


def _bytes(array: Floats) -> list[Any]:
    return [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data]


def _write_index(path: Path, dataset: str, ids: Sequence[str], columns: Arrays) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"dataset": pa.array([dataset] * len(ids), pa.string()), "id": pa.array(ids, pa.string())}
    for name, kind in NUMBERS.items():
        table[name] = pa.array(np.asarray(columns[name], kind), from_pandas=True)
    try:
        pq.write_table(pa.table(table), path, compression="zstd", version="2.6", store_schema=False)
    except OSError as error:
        raise Unavailable(f"{path} cannot be written ({error.strerror}); the same command goes on from here") from None


def write_router_data(directory: Path, data: RouterData) -> list[str]:
    """Write router data that is in memory, one folder per dataset; equal data give equal bytes.

    Args:
        directory: an existing folder without these datasets.
        data: rows in any order.

    Returns:
        The datasets.
    """
    keys = data.keys
    rows_of: dict[str, list[int]] = {}
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        rows_of.setdefault(keys[i][0], []).append(i)
    shapes = {name: getattr(data, name).shape[1:] for name in TENSORS if getattr(data, name).size}
    for dataset, rows in rows_of.items():
        (directory / dataset).mkdir()
        part = data.take(rows)
        every = np.arange(len(rows))
        arrays = {name: getattr(part, name) for name in (*shapes, "nll", "nll_unconditional")}
        columns = {name: getattr(part, name) for name in NUMBERS}
        write_dataset(directory / dataset, dataset, part.id, shapes, columns, lambda _, a=(every, arrays): [a])  # type: ignore[misc]
    return list(rows_of)
