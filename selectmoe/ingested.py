"""The rows of a stage that takes `data=` or, in its place, `dataset.*`: then they are ingested first.

No command runs this module; `warmup` and `route` find their pool with it, and the predecessor's commands (`seed_commands`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from selectmoe import distributed, ingest
from selectmoe.config import load, values
from selectmoe.errors import UserError
from selectmoe.sources import DatasetConfig


class Given(Protocol):
    """The configuration of such a stage."""

    data: str
    dataset: DatasetConfig
    output_dir: str


def check(config: Given) -> None:
    """Refuse what would not be read.

    Raises:
        UserError: both are given.
    """
    if config.data and config.dataset != DatasetConfig():
        raise UserError("dataset.* is read without data= only: leave out one of them")


def pool_of(config: Given) -> str:
    """`data=`, or the pool of `dataset.*`, made below the output's work: it is gone when the stage is done.

    Raises:
        UserError: there are no such rows, or several processes would each make it.
    """
    if config.data:
        return config.data
    if distributed.world() > 1:
        raise UserError("several processes need data=: run `selectmoe ingest dataset.*` first and give its output_dir")
    return str(make(config.dataset, Path(config.output_dir) / ".work" / "ingest"))


def make(dataset: DatasetConfig, place: Path) -> Path:
    """Ingest datasets without a holdout: all their rows are in the pool.

    Args:
        dataset: which.
        place: the output.

    Returns:
        The output.

    Raises:
        UserError: there are no such rows.
    """
    datasets = values(dataset, "identity", "execution", "input")
    return ingest.run(load(ingest.IngestConfig, {"dataset": datasets, "holdout": 0}, output_dir=str(place)))
