"""The work of routing: every dataset tokenised and planned, units computed and committed, results found again.

No command runs this module; `selectmoe route` does its work with it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe import distributed, stage, token_store
from selectmoe import manifest as mf
from selectmoe.batching import Plan, Unit, make_plan
from selectmoe.errors import UserError
from selectmoe.pool import iter_rows
from selectmoe.progress import progress

if TYPE_CHECKING:
    from selectmoe.judge import Batch, Judge
    from selectmoe.route import RouteConfig
    from selectmoe.storage import Store
    from selectmoe.token_store import TokenStore

COMMIT_SECONDS = 15.0
"""A kill costs at most this much finished work, and the batch under way."""
RUNS = 8
"""Runs of units in one committed object, whose name lists them."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """One dataset that is to be routed."""

    name: str
    folder: Path
    identity: str
    rows: int


@dataclass(frozen=True)
class Work:
    """A dataset's plan, and its rows as tokens."""

    source: Source
    plan: Plan
    tokens: TokenStore
    digest: str


def source_of(name: str, folder: Path) -> Source:
    """A dataset of a pool that was proved."""
    manifest = mf.read_manifest(folder, verify=False)  # the pool was, and its parts with it
    return Source(name, folder, manifest.identity, int(manifest.rows["out"]))


def plan_all(config: RouteConfig, sources: Sequence[Source], judge: Judge, out: stage.Output) -> list[Work]:
    """Tokenise and plan every dataset; the first process writes, the others read what it has written.

    Raises:
        UserError: no row has a token.
    """
    key = mf.digest([config.max_length, out.inputs["selector_model"]["identity"]])
    folders = {source.name: out.path / ".work" / "tokens" / source.name for source in sources}

    def write() -> None:
        with parallel_tokenizer(config.threads):
            for source in progress(sources, desc="plan", unit="datasets"):
                _tokenise(source, folders[source.name], mf.digest([key, source.identity]), judge, config.max_length)

    distributed.from_first(write)
    work = []
    for source in sources:
        tokens = token_store.find(folders[source.name], mf.digest([key, source.identity]))
        if tokens is None:
            raise RuntimeError(f"{folders[source.name]} is gone: every process of a node must see the same output_dir")
        rows = tokens.rows
        again = rows.answer_tokens if config.ifd else None
        plan = make_plan(source.name, rows.tokens, config.token_budget, config.batch_size, again)
        digest = mf.digest([source.identity, *(a.tolist() for a in (plan.starts, plan.unit_starts, plan.lengths))])
        work.append(Work(source, plan, tokens, digest))
    if not any(len(one.plan.order) for one in work):
        raise UserError(f"{config.data}: none of {sum(one.rows for one in sources)} rows has a token to read")
    return work


def _tokenise(source: Source, folder: Path, key: str, judge: Judge, max_length: int) -> None:
    found = token_store.find(folder, key)
    if found is None:
        rows = progress(iter_rows(source.folder), desc=f"tokens of {source.name}", total=source.rows, unit="rows")
        found = token_store.write(folder, key, rows, source.rows, judge.tokenizer, max_length)
    found.close()


@contextmanager
def parallel_tokenizer(threads: int) -> Iterator[None]:
    """Let the tokenizer use the cores while nothing else does; what it gives does not depend on it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads != 1 else "false"
    if threads:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


class Results:
    """Results per unit, committed in groups; units are known by their numbers in the plan of the whole pool."""

    def __init__(self, work: Store, plan: str) -> None:
        self.work = work
        self.prefix = f"{plan[:16]}/"
        self.done: dict[int, str] = {}
        self._open: Arrays = {}
        self._runs: list[range] = []
        self._committed = time.monotonic()
        self._read: tuple[str, Arrays] = ("", {})
        self.look()

    def look(self) -> None:
        """Find what has been committed, by this process, an earlier one, or another of the same shard."""
        self.done = {}
        for name in self.work.names():
            if found := re.fullmatch(re.escape(self.prefix) + r"((?:_?\d+-\d+-\d+)+)\.safetensors", name):
                for run in found[1].split("_"):
                    first, last, step = map(int, run.split("-"))
                    self.done |= dict.fromkeys(range(first, last + 1, step), name)

    def add(self, unit: int, arrays: Arrays) -> None:
        """Take one unit's results."""
        run = self._runs[-1] if self._runs else range(0)
        if len(run) == 1 or (run and unit == run[-1] + run.step):
            step = unit - run[-1]
        else:
            step = 0
        if step > 0:
            self._runs[-1] = range(run[0], unit + 1, step)
        else:
            if len(self._runs) == RUNS:
                self.flush()
            self._runs.append(range(unit, unit + 1))
        self._open |= {f"{unit}/{name}": array for name, array in arrays.items()}
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what has been added since the last time."""
        from safetensors.numpy import save

        if self._runs:
            name = "_".join(f"{run[0]}-{run[-1]}-{run.step}" for run in self._runs)
            name = f"{self.prefix}{name}.safetensors"
            self.work.put_bytes(name, save(self._open))
            self.done |= {unit: name for run in self._runs for unit in run}
        self._open, self._runs, self._committed = {}, [], time.monotonic()

    def get(self, unit: int) -> Arrays:
        """One committed unit's results."""
        from safetensors.numpy import load

        name = self.done.get(unit)
        if name is None:
            raise RuntimeError(f"unit {unit} of the plan has no result: start again")
        if self._read[0] != name:
            data = self.work.get(name)
            if data is None:
                raise RuntimeError(f"committed work {name} has vanished from the work root: start again")
            self._read = (name, load(data))
        start = f"{unit}/"
        return {key.removeprefix(start): array for key, array in self._read[1].items() if key.startswith(start)}


@dataclass(frozen=True)
class Prepared:
    """A unit on its way to the judge: its batches, and those of its answers alone where they are read."""

    unit: Unit
    batches: list[Batch]
    answers: list[tuple[npt.NDArray[np.int64], Batch]]


def prepare(judge: Judge, tokens: TokenStore, unit: Unit) -> Prepared:
    """Read and pad the rows of a unit."""
    batches, rows = [], []
    for batch in unit.batches:
        found = [tokens.read(row) for row in unit.plan.rows(batch).tolist()]
        batches.append(judge.batch(found, int(unit.plan.lengths[batch])))
        rows += found
    return Prepared(unit, batches, judge.answer_batches(rows) if judge.config.ifd else [])


def route_units(judge: Judge, work: Sequence[Work], mine: Sequence[Unit], results: Results, out: stage.Output) -> None:
    """Compute what is not there yet of this shard (of these, every process takes its share), and commit it."""
    stores = {one.source.name: one.tokens for one in work}
    todo = [unit for unit in mine if unit.number not in results.done]
    ours = todo[distributed.rank() :: distributed.world()] if not distributed.alone() else todo
    started, computed = time.monotonic(), 0
    with ThreadPoolExecutor(1, "prepare") as pool:
        ahead = [pool.submit(prepare, judge, stores[unit.plan.dataset], unit) for unit in ours[:1]]
        for at, unit in enumerate(progress(ours, desc="route", unit="unit")):
            prepared = ahead.pop().result()
            ahead += [pool.submit(prepare, judge, stores[u.plan.dataset], u) for u in ours[at + 1 : at + 2]]
            begun = time.monotonic()
            arrays = compute(judge, prepared, first=unit is mine[0])
            results.add(unit.number, arrays | {"seconds": np.array([time.monotonic() - begun])})
            computed += int(unit.plan.padded[unit.batches.start : unit.batches.stop].sum())
    results.flush()
    if computed:
        out.metric("padded_tokens_per_second", computed / (time.monotonic() - started))


def compute(judge: Judge, prepared: Prepared, first: bool) -> Arrays:
    """The results of one unit's rows.

    Raises:
        UserError: it is the first, which has the largest batch, and a batch does not fit into memory.
    """
    parts = [_read(judge, batch, first) for batch in prepared.batches]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if judge.config.ifd:
        alone = np.full(len(prepared.unit.rows), np.nan)
        for rows, batch in prepared.answers:
            alone[rows] = judge.read_answers(batch)
        arrays["nll_unconditional"] = alone
    return arrays


def _read(judge: Judge, batch: Batch, first: bool) -> Arrays:
    from selectmoe.judge import fitting_rows, out_of_memory

    try:
        return judge.read(batch)
    except RuntimeError as error:
        if not (first and out_of_memory(error)):
            raise
    fits, (rows, length) = fitting_rows(judge, batch), batch.ids.shape  # not in the handler, whose error holds memory
    if not fits:
        advice = "not even one row does: lower max_length"
    elif fits * length >= judge.config.max_length:
        advice = f"token_budget={fits * length} fits"
    else:
        advice = f"batch_size={fits} fits"
    raise UserError(f"the largest batch ({rows} rows of {length} tokens) does not fit into memory; {advice}")
