"""What the study tries: its sizes, and the grid of cells (one trained or untrained judge each).

No command runs this module. A cell is named by its settings, so a restarted study knows what it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.judge.foreign import NAME as OTHER_LANGUAGE
from selectmoe.corruption import CORRUPTIONS
from selectmoe.losses import LOSSES

KINDS = (*(kind for kind in CORRUPTIONS if kind != OTHER_LANGUAGE), OTHER_LANGUAGE)
BIASES = (0.0, 3.0)
WARM = ("clean", "contaminated")
UNTRAINED = "none"


@dataclass(frozen=True)
class Cell:
    """One judge.

    Attributes:
        pool: whose warm-up rows it was trained on (and, unless said otherwise, whose rows it scores).
        mode: `observer` or `applied`.
        loss: a name in `LOSSES`, or `none`: untrained.
        bias: initial bias of the gates.
        seed: of the gates' initial weights, of the order of rows and of the copies.
        warm: `clean`, or `contaminated` with planted rows like the pool.
        rows: warm-up rows.
        rate: peak learning rate.
        left_out: kinds of corruption that it has not seen as copies (`contrastive`).
        unseen: a source of which it has seen no row.
        weight: quality_loss_weight.
        permuted: labels of rows and copies were permuted: a control.
    """

    pool: str
    mode: str
    loss: str
    bias: float
    seed: int
    warm: str = "clean"
    rows: int = 0
    rate: float = 0.0
    left_out: tuple[str, ...] = ()
    unseen: str = ""
    weight: float = 1.0
    permuted: bool = False

    @property
    def name(self) -> str:
        """A file name."""
        parts = [self.pool, self.mode, self.loss, f"b{self.bias:g}", f"s{self.seed}"]
        if self.loss != UNTRAINED:
            parts += [self.warm, f"n{self.rows}", f"lr{self.rate:g}"]
        parts += ["without_" + "+".join(self.left_out)] if self.left_out else []
        parts += [f"unseen_{self.unseen}"] if self.unseen else []
        parts += [f"w{self.weight:g}"] if self.weight != 1 else []
        return "-".join([*parts, *(["permuted"] if self.permuted else [])])

    @property
    def group(self) -> Cell:
        """The configuration: the same cell without its seed and without which kind was left out."""
        return dataclasses.replace(self, seed=0, left_out=("each",) if self.left_out else ())


@dataclass(frozen=True)
class Design:
    """Sizes. The full study's are the defaults; `smoke()` runs everything in less than a minute."""

    sources: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("A", ("docs", "radio", "real_estate", "security")),
        ("B", ("dialog", "medicine", "occupations")),
    )
    row_tokens: int = 100
    max_length: int = 128
    clean: int = 220
    planted: int = 40
    warm: int = 120
    share: float = 0.35
    row_counts: tuple[int, ...] = (15, 30, 60)
    seeds: int = 5
    few_seeds: int = 3
    untrained: int = 40
    permuted: int = 20
    rates: tuple[float, ...] = (3e-4, 3e-3)
    rate: float = 3e-2
    epochs: int = 2
    batch: int = 8
    applied_rows: int = 32
    applied_clean: int = 72
    applied_planted: int = 12
    applied_rate: float = 2e-2
    applied_losses: tuple[str, ...] = tuple(LOSSES)
    applied_seeds: int = 3
    token_budget: int = 2048
    replicates: int = 2000
    kinds: tuple[str, ...] = KINDS
    threads: int = 0
    tiny: bool = False

    @property
    def spoiled(self) -> int:
        """Planted rows in a contaminated warm-up of `warm` rows."""
        return round(self.share * self.warm)

    @property
    def digest(self) -> str:
        """Equal for equal designs, kinds and losses."""
        what = [dataclasses.asdict(self), list(LOSSES)]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def names(self, pool: str) -> tuple[str, ...]:
        """The sources of a pool."""
        return dict(self.sources)[pool]


def smoke() -> Design:
    """Everything on a tiny model, as small as it gets."""
    return Design(
        sources=(("A", ("docs", "radio")), ("B", ("dialog", "occupations"))),
        row_tokens=64,
        max_length=512,
        clean=12,
        planted=4,
        warm=8,
        row_counts=(4,),
        seeds=2,
        few_seeds=2,
        untrained=20,
        permuted=2,
        rates=(3e-3,),
        applied_rows=8,
        applied_clean=6,
        applied_planted=3,
        applied_losses=("sigmoid", "contrastive"),
        applied_seeds=1,
        replicates=100,
        kinds=("shuffled", OTHER_LANGUAGE),
        threads=1,
        tiny=True,
    )


def folds(d: Design) -> tuple[tuple[str, ...], ...]:
    """The kinds in two halves: an applied gate is judged on the half that it has not seen."""
    return d.kinds[::2], d.kinds[1::2]


def leave_out(cell: Cell, parts: Sequence[tuple[str, ...]]) -> Iterator[Cell]:
    """The cell, once for every part of the kinds that its copies leave out (`contrastive`; others have no copies)."""
    if cell.loss != "contrastive":
        yield cell
    else:
        yield from (dataclasses.replace(cell, left_out=part) for part in parts)


def each_kind(d: Design) -> list[tuple[str, ...]]:
    """Every kind by itself."""
    return [(kind,) for kind in d.kinds]


def observer_cells(d: Design) -> list[Cell]:
    """The observers of pool A, in the order in which they are trained."""
    cells: list[Cell] = []
    for loss, bias, warm, seed in itertools.product(LOSSES, BIASES, WARM, range(d.seeds)):
        cell = Cell("A", "observer", loss, bias, seed, warm, d.warm, d.rate)
        cells += [*leave_out(cell, each_kind(d)), *([cell] if loss == "contrastive" else [])]
    for loss, seed in itertools.product(LOSSES, range(d.few_seeds)):
        for rate in d.rates:
            cells += leave_out(Cell("A", "observer", loss, 0.0, seed, "clean", d.warm, rate), each_kind(d))
        for rows in d.row_counts:
            cells += leave_out(Cell("A", "observer", loss, 0.0, seed, "clean", rows, d.rate), each_kind(d))
    for source, seed in itertools.product(d.names("A"), range(d.few_seeds)):
        cell = Cell("A", "observer", "contrastive", 0.0, seed, "clean", d.warm, d.rate, unseen=source)
        cells += leave_out(cell, each_kind(d))
    for seed in range(d.permuted):
        cells.append(Cell("A", "observer", "contrastive", 0.0, seed, "clean", d.warm, d.rate, permuted=True))
    return cells


def untrained_cells(d: Design, pool: str) -> list[Cell]:
    """Gates as they are initialised."""
    return [Cell(pool, "observer", UNTRAINED, bias, seed) for bias in BIASES for seed in range(d.untrained)]


def applied_cells(d: Design) -> list[Cell]:
    """The applied gates of pool A, those of one initialisation after the other."""
    cells: list[Cell] = []
    for bias, seed in itertools.product(BIASES, range(d.applied_seeds)):
        cells.append(Cell("A", "applied", UNTRAINED, bias, seed))
        base = Cell("A", "applied", "sigmoid", bias, seed, "clean", d.applied_rows, d.applied_rate)
        for loss in d.applied_losses:
            cells += leave_out(dataclasses.replace(base, loss=loss), folds(d))
            if bias and loss in ("sigmoid", "contrastive"):
                cells += leave_out(dataclasses.replace(base, loss=loss, warm="contaminated"), folds(d))
        cells.append(dataclasses.replace(base, rate=SEED_RATE))
        if bias:
            cells.append(dataclasses.replace(base, weight=100.0))
    return cells


SEED_RATE = 3e-4
"""The learning rate of the predecessor's recipe."""


def confirming_cells(d: Design, chosen: Cell) -> list[Cell]:
    """The chosen configuration and the predecessor's recipe, trained on pool B."""
    cells: list[Cell] = []
    if chosen.mode == "observer":
        for warm, seed in itertools.product(WARM, range(d.seeds)):
            cell = dataclasses.replace(chosen, pool="B", seed=seed, warm=warm, left_out=())
            cells += leave_out(cell, each_kind(d))
    seeds = range(d.applied_seeds)
    applied = [Cell("B", "applied", "sigmoid", 0.0, seed, "clean", d.applied_rows, d.applied_rate) for seed in seeds]
    for cell in applied:
        cells.append(cell)
        if chosen.mode == "applied" and chosen.group != dataclasses.replace(cell, pool="A").group:
            again = dataclasses.replace(chosen, pool="B", seed=cell.seed, left_out=())
            cells += leave_out(again, folds(d))
    return cells
