"""Pools as `ingest` leaves them and router data as `route` does, made in memory: what tests of other stages read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from selectmoe.manifest import write_manifest
from selectmoe.pool import Row, datasets, write_pool
from selectmoe.router_data import FOLDER, RouterData
from selectmoe.router_data_writing import write_router_data


def make_pool(folder: Path, rows: Iterable[Row]) -> Path:
    """Write a pool with its manifests, one per dataset and one around them."""
    rows = list(rows)
    write_pool(folder, rows)
    counts = {name: sum(row.dataset == name for row in rows) for name in datasets(folder)}
    for name, count in counts.items():
        _manifest("ingest", folder / name, count)
    _manifest("ingest", folder, len(rows), list(counts))
    return folder


def make_router_data(output: Path, data: RouterData, stage: str = "route") -> Path:
    """Write an output of `route` with its manifests, one per dataset and one around them."""
    (output / FOLDER).mkdir(parents=True)
    names = write_router_data(output / FOLDER, data)
    for name in names:
        _manifest(stage, output / FOLDER / name, data.dataset.count(name))
    _manifest(stage, output, len(data), [f"{FOLDER}/{name}" for name in names])
    return output


def _manifest(stage: str, folder: Path, rows: int, parts: Iterable[str] = ()) -> None:
    write_manifest(
        folder,
        stage=stage,
        version=1,
        config={"identity": {"seed": 42}, "execution": {"output_dir": folder.name}},
        inputs={},
        rows={"in": rows, "out": rows, "dropped": {}},
        environment={"seconds": 1.5, "peak_rss_bytes": 2**20},
        created="2020-01-01T00:00:00+00:00",
        parts=list(parts),
    )
