"""What the pool and the selections consist of: rows by source, by cluster, and by both.

No command runs this module; `selectmoe report` does. The draws of an arm (`random-0`, `random-1`, ...) count as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from selectmoe.report_data import Findings, Key

POOL = "pool"


def arms(found: Findings) -> dict[str, list[Key]]:
    """Arm -> the rows of all its draws; `selected` first, then `random`, then by name."""
    rows: dict[str, list[Key]] = {}
    for folder, selected in sorted(found.selections.items()):
        rows.setdefault(found.arms[folder], []).extend(item.row.key for item in selected)
    return {arm: rows[arm] for arm in sorted(rows, key=lambda a: (a != "selected", a != "random", a))}


def composition(found: Findings) -> dict[str, Any]:
    """Numbers of rows of the pool and of every arm.

    Returns:
        ``rows`` {pool or arm: n}; ``sources`` and ``clusters`` [{name, pool: n, arms: {arm: n}}], most rows of the pool
        first, cluster null being the rows that were not clustered; ``cells`` the same by cluster and source.
    """
    cluster = dict(zip(zip(found.clusters["dataset"], found.clusters["id"], strict=True), found.clusters["cluster"]))
    everything = {POOL: list(found.rows), **arms(found)}
    of_source = {name: Counter(key[0] for key in keys) for name, keys in everything.items()}
    of_cluster = {name: Counter(cluster.get(key) for key in keys) for name, keys in everything.items()}
    of_both = {name: Counter((cluster.get(key), key[0]) for key in keys) for name, keys in everything.items()}
    return {
        "rows": {name: len(keys) for name, keys in everything.items()},
        "sources": [{"name": name, **counts} for name, counts in _sorted(of_source)],
        "clusters": [{"name": name, **counts} for name, counts in _sorted(of_cluster)],
        "cells": [{"cluster": c, "source": source, **counts} for (c, source), counts in _sorted(of_both)],
    }


def _sorted(counters: dict[str, Counter[Any]]) -> Iterable[tuple[Any, dict[str, Any]]]:
    pool = counters[POOL]
    names = sorted(set().union(*counters.values()), key=lambda name: (-pool[name], _place(name)))
    chosen = [arm for arm in counters if arm != POOL]
    return [(n, {POOL: pool[n], "arms": {arm: counters[arm][n] for arm in chosen if counters[arm][n]}}) for n in names]


def _place(name: Any) -> tuple[Any, ...]:
    """A sort key for a source, a cluster (or None), or a pair of them."""
    if isinstance(name, tuple):
        return tuple(part for item in name for part in _place(item))
    return (-1 if name is None else name,)


def planted_share(found: Findings) -> dict[str, float]:
    """Share of planted rows in the pool and in every arm."""
    total = {POOL: len(found.planted) / max(1, len(found.rows))}
    for arm, keys in arms(found).items():
        total[arm] = sum(key in found.planted for key in keys) / max(1, len(keys))
    return total
