"""The study's rows: real ones from installed packages, planted bad copies of others, warm-up rows and their copies.

No command runs this module. The two pools have no source in common. Within a pool four parts have no original in common:
clean rows and planted rows, which are scored; warm-up rows; the originals of what contaminates a warm-up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.judge.design import Cell, Design
from selectmoe import demo, ingest
from selectmoe.config import load
from selectmoe.corruption import corrupt
from selectmoe.errors import UserError
from selectmoe.pool import Row, content_id

Key = tuple[str, str]
"""(dataset, id)."""

TRIES = 5
"""Donors (and draws) that are tried for one copy."""


@dataclass(frozen=True)
class StudyPool:
    """One pool.

    Attributes:
        clean: rows that are scored, as they are.
        planted: corrupted rows that are scored, and their kinds.
        warm: warm-up rows, as they are.
        spoiled: corrupted rows that take the place of the last warm-up rows in a contaminated warm-up.
        bank: corrupted copies of warm and spoiled rows: (key of the row, kind) -> copy.
    """

    clean: list[Row]
    planted: list[tuple[Row, str]]
    warm: list[Row]
    spoiled: list[Row]
    bank: dict[tuple[Key, str], Row]

    @property
    def scored(self) -> list[Row]:
        """Clean and planted rows, sorted by key as router data are."""
        return sorted([*self.clean, *(row for row, _ in self.planted)], key=lambda row: row.key)

    @property
    def kinds(self) -> dict[Key, str]:
        """Kind of every planted row."""
        return {row.key: kind for row, kind in self.planted}

    def warm_rows(self, warm: str, rows: int, share: float, unseen: str = "") -> list[Row]:
        """The rows of a warm-up: the first ones, the last `share` of them spoiled if it is contaminated."""
        spoiled = round(share * rows) if warm == "contaminated" else 0
        chosen = [*self.warm[: rows - spoiled], *self.spoiled[:spoiled]]
        return sorted((row for row in chosen if row.dataset != unseen), key=lambda row: row.key)


def originals(d: Design, pool: str) -> list[Row]:
    """As many rows as a pool needs, the sources evenly spread: any stretch of them is like the whole.

    Raises:
        UserError: the packages hold too few.
    """
    wanted = d.clean + d.planted * len(d.kinds) + d.warm + d.spoiled
    enough = 2 * wanted // len(d.names(pool))
    pairs = {name: demo.telling(demo.usable(demo.SOURCES[name](), d.row_tokens, 0), enough) for name in d.names(pool)}
    placed = []
    for name, quota in demo.quotas({name: len(found) for name, found in pairs.items()}, wanted).items():
        for n, (question, answer) in enumerate(pairs[name][:quota]):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            placed.append(((n + 0.5) / quota, Row(name, content_id(name, messages), messages)))
    rows = [row for _, row in sorted(placed, key=lambda pair: (pair[0], pair[1].key))]
    if len({row.key for row in rows}) != wanted:
        raise UserError(f"pool {pool}: {len(rows)} different rows, {wanted} are needed")
    return rows


def make_pool(d: Design, pool: str) -> StudyPool:
    """The rows of one pool; the same for the same design."""
    rows = originals(d, pool)
    bad = d.planted * len(d.kinds)
    clean, planted, warm, spoiled = (
        rows[: d.clean],
        rows[d.clean : d.clean + bad],
        rows[d.clean + bad :][: d.warm],
        rows[d.clean + bad + d.warm :],
    )
    contaminated = [row for row, _ in spoil(spoiled, d.kinds, -(-len(spoiled) // len(d.kinds)), f"{pool}:spoiled")]
    bank = {}
    for row in [*warm, *contaminated]:
        for kind in d.kinds:
            if (copy := attempt(kind, row, warm, f"{pool}:bank:{row.id}:{kind}")) is not None:
                bank[row.key, kind] = copy
    return StudyPool(clean, spoil(planted, d.kinds, d.planted, f"{pool}:planted"), warm, contaminated, bank)


def attempt(kind: str, row: Row, donors: Sequence[Row], seed: str) -> Row | None:
    """A corrupted copy, or None where this kind has nothing to change in this row."""
    rng = random.Random(seed)
    for _ in range(TRIES):
        if (copy := corrupt(kind, row, rng.choice(donors), rng)) is not None:
            return copy
    return None


def spoil(rows: Sequence[Row], kinds: Sequence[str], per_kind: int, seed: str) -> list[tuple[Row, str]]:
    """Corrupt every row, the kinds in turn; where one would not change a row, the next that is not used up takes it."""
    out: list[tuple[Row, str]] = []
    left = dict.fromkeys(kinds, per_kind)
    for n, row in enumerate(rows):
        for kind in (*kinds[n % len(kinds) :], *kinds[: n % len(kinds)]):
            copy = attempt(kind, row, rows, f"{seed}:{row.id}:{kind}") if left[kind] else None
            if copy is not None:
                out.append((copy, kind))
                left[kind] -= 1
                break
    return out


def steps(d: Design, pool: StudyPool, cell: Cell) -> list[list[tuple[Row, int]]]:
    """The rows of every optimizer step of a cell, with their labels: 1 warm-up row, 0 corrupted copy.

    As in `warmup`, except that a row's copy of one kind is the same in every epoch and for every seed (so that it is read
    once); which kind is taken is drawn anew.
    """
    rows = pool.warm_rows(cell.warm, cell.rows, d.share, cell.unseen)
    kinds = [kind for kind in d.kinds if kind not in cell.left_out]
    out = []
    for epoch in range(d.epochs):
        order = list(range(len(rows)))
        random.Random(f"{cell.seed}:{epoch}").shuffle(order)
        for start in range(0, len(order), d.batch):
            chosen = [rows[i] for i in order[start : start + d.batch]]
            step = [(row, 1) for row in chosen]
            if cell.loss == "contrastive":
                for row in chosen:
                    first = random.Random(f"{cell.seed}:{epoch}:{row.id}").randrange(len(kinds))
                    copies = (pool.bank.get((row.key, kind)) for kind in (*kinds[first:], *kinds[:first]))
                    step += [(copy, 0) for copy in copies if copy is not None][:1]
            if cell.permuted:
                labels = [label for _, label in step]
                random.Random(f"permuted:{cell.seed}:{epoch}:{start}").shuffle(labels)
                step = [(row, label) for (row, _), label in zip(step, labels, strict=True)]
            out.append(step)
    return out


def publish(rows: Sequence[Row], folder: Path) -> Path:
    """The rows as a pool that the stages take (ingest's output), in their own datasets and under their own ids."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row.dataset, []).append(json.dumps({"id": row.id, "messages": row.messages}) + "\n")
    for name, text in lines.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("".join(text), encoding="utf-8")
    config = load(ingest.IngestConfig, {"holdout": 0}, data=str(folder / "data"), output_dir=str(folder / "ingest"))
    return ingest.run(config)
