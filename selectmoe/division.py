"""Where every row goes: drawn or not, out of the pool for a reason, held out, or into the pool; decided dataset by dataset.

No command runs this module; `ingest` and `check` decide through it, from the rows' index in memory (`selectmoe.table`).
Rows are read again only where near-duplicates or overlaps with an evaluation are looked for (`selectmoe.screening`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import screening
from selectmoe.decontamination import Index
from selectmoe.errors import UserError
from selectmoe.intake import Intake
from selectmoe.pool import Row
from selectmoe.sources import DatasetConfig
from selectmoe.table import HASHES, Order, Split, Table, drawn, identified, split, threshold
from selectmoe.workers import Workers

if TYPE_CHECKING:
    from selectmoe.ingest import IngestConfig

HOLDOUT_ROWS, HOLDOUT_SHARE, HOLDOUT_MOST = 200, 0.02, 0.2
"""The default holdout: the larger of this many rows and this share, at most this share."""


def check_known(key: str, given: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a setting for a dataset that is not there.

    Args:
        key: of the setting, below `dataset.`.
        given: dataset -> value.
        found: the datasets, by name.

    Raises:
        UserError: one is not there.
    """
    if unknown := sorted(set(given) - set(found)):
        raise UserError(f"dataset.{key}.{unknown[0]}: there is no such dataset; there are: {', '.join(found)}")


def choose(tables: Mapping[str, Table], config: DatasetConfig) -> tuple[dict[str, Table], dict[str, int | None]]:
    """The subset of every dataset that is asked for.

    Args:
        tables: by name.
        config: its `subset_ratio`, limits and weights.

    Returns:
        The tables, and the number of rows that each was limited to (None: not).

    Raises:
        UserError: a dataset is named that is not there, or has no weight, or is left without a row.
    """
    for key in ("limits", "weights"):
        check_known(key, getattr(config, key), tables)
    limits = {name: config.limits.get(name, config.limit) for name in tables}
    chosen = {name: drawn(table, config.subset_ratio, limits[name]) for name, table in tables.items()}
    if config.weights:
        limits = weighted({name: len(table) for name, table in chosen.items()}, config.weights)
        chosen = {name: drawn(table, 1, limits[name]) for name, table in chosen.items()}
    if empty := [name for name, table in chosen.items() if not len(table)]:
        raise UserError(f"dataset {empty[0]}: not one of its {len(tables[empty[0]])} rows was drawn: raise its share")
    return chosen, limits


def weighted(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int | None]:
    """Rows per dataset in the proportion of the weights, as many as the datasets have.

    Raises:
        UserError: a dataset has no weight.
    """
    if missing := sorted(set(sizes) - set(weights)):
        raise UserError(f"dataset.weights names no weight for {missing[0]}: give every dataset one, or leave it out")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    scale = min(sizes[name] / exact[name] for name in sizes)
    return {name: int(exact[name] * scale) for name in sizes}


def holdout_size(holdout: float | None, rows: int) -> int:
    """Number of rows to hold out; where the holdout is a share, about.

    Raises:
        UserError: the holdout would leave no pool.
    """
    if holdout is None:
        return int(min(max(HOLDOUT_ROWS, HOLDOUT_SHARE * rows), HOLDOUT_MOST * rows))
    size = max(1, round(holdout * rows)) if 0 < holdout < 1 else int(holdout)
    if size >= rows:
        raise UserError(f"holdout={holdout:g} would take all of the {rows} rows: give a smaller one")
    return size


def holdout_below(holdout: float | None, tables: Mapping[str, Table]) -> int:
    """The threshold of the salted content hash (from 0 to 2^64) below which contents are held out.

    A share is the same threshold whatever the pool; a number of rows takes the smallest hashes of all datasets.

    Raises:
        UserError: the holdout would leave no pool.
    """
    rows = sum(map(len, tables.values()))
    size = holdout_size(holdout, rows)
    if holdout is None and size > HOLDOUT_ROWS:
        return int(HOLDOUT_SHARE * HASHES)
    if holdout is not None and 0 < holdout < 1:
        return int(holdout * HASHES)
    return threshold(tables, size)


@dataclass
class Part:
    """One dataset on its way into pool and holdout."""

    taken: int
    """Its rows before a subset was drawn."""
    drawn: int
    """Rows that were drawn."""
    limit: int | None
    table: Table
    """Those of them that are neither near-duplicates nor give an evaluation task away, by id."""
    split: Split
    gone: list[screening.Gone]
    """The others; and those that give the holdout away."""
    planted: list[Row] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """Why rows went -> how many."""
        return sum((gone.kinds for gone in self.gone), Counter[str]())

    @property
    def pooled(self) -> int:
        """Rows of the pool, planted ones included."""
        return len(self.split.pool) + len(self.planted)

    def rows(self, order: Order) -> Table:
        """The rows at these positions."""
        return self.table.take(order)


def divide(
    intake: Intake, config: IngestConfig, index: Index | None, workers: Workers
) -> tuple[dict[str, Part], dict[str, str]]:
    """Decide of every row where it goes.

    Args:
        intake: what was read; its tables are used up.
        config: of the stage.
        index: of the evaluation tasks whose words no row may hold, or None.
        workers: who reads the rows again, where that is needed.

    Returns:
        The datasets, and what they depend on beyond their own rows: the holdout's threshold, and digests of the documents
        that rows were compared with.

    Raises:
        UserError: as `choose` and `holdout_below`; or nothing is left for the pool, or for the holdout.
    """
    taken = {name: len(table) for name, table in intake.tables.items()}
    chosen, limits = choose(intake.tables, config.dataset)
    intake.tables.clear()  # a row is in memory once
    sizes = {name: len(table) for name, table in chosen.items()}
    tables: dict[str, Table] = {}
    gone: dict[str, screening.Gone] = {}
    tasks = screening.save(index, intake.folder / "tasks.index") if index else None
    for name in sorted(chosen):
        table = identified(chosen.pop(name))
        tables[name], gone[name] = screening.screen(table, config.near_duplicates, tasks, intake.folder, workers)
    if not any(map(len, tables.values())):
        raise UserError(f"the pool is empty: {_went(found.kinds for found in gone.values())}")
    below = holdout_below(config.holdout, tables)
    splits = split(tables, below)
    parts = {n: Part(taken[n], sizes[n], limits[n], tables[n], splits[n], [gone[n]]) for n in tables}
    depends = {"holdout_below": f"{below:017x}"} | ({"tasks": index.identity} if index else {})
    if config.decontaminate.holdout:
        depends["holdout"] = _clear_of_holdout(parts, config.decontaminate.ngram, intake.folder, workers)
    _check_left(parts, config)
    return parts, depends


def _clear_of_holdout(parts: Mapping[str, Part], ngram: int, folder: Path, workers: Workers) -> str:
    """Let the rows of the pool go that share words with the holdout; returns the holdout's digest."""
    held = screening.holdout_index({name: part.rows(part.split.holdout) for name, part in parts.items()}, ngram, folder)
    for part in parts.values():
        stay, gone = screening.screen_pool(part.table, part.split.pool, held, folder, workers)
        part.split = replace(part.split, pool=stay)
        part.gone.append(gone)
    return held.identity


def _went(kinds: Iterable[Counter[str]]) -> str:
    return "; ".join(f"{n} rows went: {kind}" for kind, n in sum(kinds, Counter[str]()).items())


def _check_left(parts: Mapping[str, Part], config: IngestConfig) -> None:
    rows = sum(len(part.table) for part in parts.values())
    if not any(len(part.split.pool) for part in parts.values()):
        also = [why] if (why := _went(part.reasons for part in parts.values())) else []
        raise UserError(
            "; ".join(["the pool is empty: every row has the content of one in the holdout (give holdout=0)", *also])
        )
    if config.holdout and not any(len(part.split.holdout) for part in parts.values()):
        raise UserError(f"holdout={config.holdout:g} draws none of {rows} rows: give a number of rows")
