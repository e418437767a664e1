r"""Stage 2: the judge reads a pool once and says, per row and layer, how good it is and which experts it takes.

    selectmoe route selector_model.path=out/convert model_checkpoint_path=out/warmup data=out/ingest \
        output_dir=out/route

In: a Select-MoE checkpoint, the router weights that `warmup` trained, a pool. Out: `router_data/` (formats and shapes:
`selectmoe.router_data`) and `plan.json` (batches, rows, tokens, and the plan's digest).

The batches are planned first, from pool and configuration alone (`selectmoe.batching`). A shard (`shard.index`,
`shard.count`) takes every count-th piece of the plan and `selectmoe merge` puts the shards together: same bytes as one
unsharded run. Pooled results are committed every `COMMIT_SECONDS`, and a restart goes on from there. The lm_head is not computed
unless `nll=true`, and then on answer positions only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe import allowed_code, stage
from selectmoe.batching import Batch, Unit, plan_batches, plan_digest, share, units
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.progress import progress
from selectmoe.router_data import FOLDER, SHARD, STAGE, TENSORS, RouterData, write_router_data

if TYPE_CHECKING:
    from selectmoe.judge import Judge
    from selectmoe.pool import Row
    from selectmoe.storage import Store
    from selectmoe.template import Encoded

VERSION = 2
PLAN = "plan.json"
COMMIT_SECONDS = 15.0
"""A kill costs at most this much finished work, and the batch under way."""

PLAN_ROWS = 1024
"""Rows that are tokenised at once while planning."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class SelectorModel:
    """The judge."""

    path: str = input_(doc="Select-MoE checkpoint, from `convert`")
    trash_expert: str = execution("", doc="import path of a custom trash expert (in allow_code too); default: its own")


@dataclass
class Shard:
    """One of several processes that share a pool; the result is the same for any number of them."""

    index: int = execution(0, doc="which shard this is, from 0")
    count: int = execution(1, doc="number of shards; `selectmoe merge` puts them together")


@dataclass
class RouteConfig(StageConfig):
    """Configuration of `route`."""

    selector_model: SelectorModel = group(SelectorModel)
    model_checkpoint_path: str = input_(
        "",
        doc="router weights from `warmup`: full_rank_weights.pt or its folder; without it the checkpoint's own gates",
    )
    data: str = input_(doc="the pool: ingest's output, or the pool/ in it")
    max_length: int = identity(1024, doc="tokens of a row that are read; the rest is cut off")
    token_budget: int = identity(
        16384, doc="padded tokens per batch; lower it when memory is short (results then differ in their last bits)"
    )
    batch_size: int | None = identity(None, doc="rows per batch at most; default: as many as token_budget allows")
    nll: bool = identity(
        False, doc="also the answer's negative log-likelihood (scores nll; costs the lm_head on answers)"
    )
    ifd: bool = identity(
        False, doc="also that of the answer without its question (score ifd; a second pass); needs nll"
    )
    shard: Shard = group(Shard)
    allow_code: list[str] = execution([], doc="import path of your own trash expert, that it may be called")

    def validate(self) -> None:
        """Check lengths, budget and shard.

        Raises:
            UserError: a value is out of its range.
        """
        if self.max_length < 1:
            raise UserError(f"max_length={self.max_length}: at least 1 token is needed")
        if self.token_budget < self.max_length:
            raise UserError(f"token_budget={self.token_budget} holds no row of max_length={self.max_length} tokens")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: at least 1 row is needed")
        if self.ifd and not self.nll:
            raise UserError("ifd=true needs nll=true: IFD is the ratio of the two")
        named = [self.selector_model.trash_expert] if self.selector_model.trash_expert else []
        if self.allow_code != named:
            raise UserError(f"allow_code={self.allow_code} must be what is named and no more: {named}")
        if not 0 <= self.shard.index < self.shard.count:
            raise UserError(
                f"shard.index={self.shard.index} must be from 0 to shard.count - 1 = {self.shard.count - 1}"
            )


@dataclass(frozen=True)
class Plan:
    """What is to be computed: the pool's rows, their lengths, and the batches of all shards."""

    rows: list[Row]
    tokens: npt.NDArray[np.int64]
    answer_tokens: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    batches: list[Batch]
    digest: str


def run(config: RouteConfig) -> Path:
    """Route the pool, or one shard of it.

    Returns:
        The output directory.

    Raises:
        UserError: an input is missing or does not fit the others, no row has a token, or the largest batch does not
            fit into memory.
    """
    from selectmoe.pool import locate, read_pool

    config.validate()
    pool = locate(config.data)
    index, count = config.shard.index, config.shard.count
    name = STAGE if count == 1 else f"{SHARD}{index}-of-{count}"
    allowed_code.allow(config.allow_code)
    inputs: dict[str, Any] = {
        "selector_model": config.selector_model.path,
        "router_weights": str(weights_input(config.model_checkpoint_path)) if config.model_checkpoint_path else "",
        "pool": str(pool),
    }
    for path in config.allow_code:  # what it does is part of the identity, not where it lies
        inputs["trash_expert"] = {"uri": path, "identity": allowed_code.source_digest(path)}
    with stage.begin(name, VERSION, config, inputs=inputs) as out:
        if out.done:
            return out.path
        from selectmoe.judge import Judge  # torch: only where there is work to do

        judge = Judge.load(config)
        plan = make_plan(config, read_pool(pool), judge.tokenizer)
        answers = plan.answer_tokens.tolist() if config.ifd else None
        mine = share(units(plan.batches, answers), index, count)
        results = Results(out.work, plan.digest)
        started, computed = time.monotonic(), 0
        todo = [at for at in range(len(mine)) if at not in results.done]
        for at in progress(todo, desc=f"route {index + 1}/{count}", unit="unit"):
            results.add(at, compute(judge, plan, mine[at], first=at == 0))
            computed += sum(batch.padded for batch in mine[at])
        results.flush()
        (out.staging / FOLDER).mkdir()
        for data in assemble(plan, mine, results):
            write_router_data(out.staging / FOLDER, data)
        (out.staging / PLAN).write_text(json.dumps(summary(plan), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if computed:
            out.metric("padded_tokens_per_second", computed / (time.monotonic() - started))
        routed = sum(len(rows_of(unit)) for unit in mine)
        empty = int((plan.tokens == 0).sum()) if index == 0 else 0
        out.commit(rows_in=routed + empty, rows_out=routed, dropped={"no_valid_token": empty})
    return out.path


def weights_input(path: str) -> Path:
    """The output that router weights belong to: a file and its folder are the same input."""
    place = Path(path)
    if not place.exists():
        raise UserError(
            f"model_checkpoint_path={path} does not exist; expected warmup's output or its full_rank_weights.pt"
        )
    return place.parent if place.is_file() and (place.parent / MANIFEST).is_file() else place


def make_plan(config: RouteConfig, rows: list[Row], tokenizer: Any) -> Plan:
    """Tokenise the pool's rows for their lengths and cut them into batches.

    Raises:
        UserError: no row of the pool has a token.
    """
    from selectmoe.template import encode_many

    tokens = np.zeros(len(rows), dtype=np.int64)
    answers = np.zeros(len(rows), dtype=np.int64)
    truncated = np.zeros(len(rows), dtype=bool)
    for start in progress(range(0, len(rows), PLAN_ROWS), desc="plan", unit="1024 rows"):
        for i, encoded in enumerate(encode_many(rows[start : start + PLAN_ROWS], tokenizer, config.max_length), start):
            tokens[i], answers[i], truncated[i] = len(encoded.input_ids), sum(encoded.answer), encoded.truncated
    if not tokens.any():
        raise UserError(f"{config.data}: none of {len(rows)} rows has a token to read")
    keys = [(row.dataset, row.id) for row in rows]
    batches = plan_batches(keys, tokens.tolist(), config.token_budget, config.batch_size)
    return Plan(rows, tokens, answers, truncated, batches, plan_digest(keys, batches))


def summary(plan: Plan) -> dict[str, Any]:
    """What `plan.json` holds; the same for every shard."""
    return {
        "digest": plan.digest,
        "batches": len(plan.batches),
        "rows": sum(len(batch.rows) for batch in plan.batches),
        "tokens": int(plan.tokens.sum()),
        "padded_tokens": sum(batch.padded for batch in plan.batches),
    }


class Results:
    """Results per unit, committed in groups; positions count in the order in which this shard computes."""

    def __init__(self, work: Store, plan: str) -> None:
        self.work = work
        self.prefix = f"{plan[:16]}/"
        self.done: dict[int, str] = {}
        self._open: Arrays = {}
        self._positions: list[int] = []
        self._committed = time.monotonic()
        self._read: tuple[str, Arrays] = ("", {})
        for name in work.names():
            if found := re.fullmatch(re.escape(self.prefix) + r"(\d+)-(\d+)\.safetensors", name):
                self.done |= dict.fromkeys(range(int(found[1]), int(found[2]) + 1), name)

    def add(self, position: int, arrays: Arrays) -> None:
        """Take one unit's results; positions come in ascending order."""
        if self._positions and position != self._positions[-1] + 1:
            self.flush()
        self._positions.append(position)
        self._open |= {f"{position}/{name}": array for name, array in arrays.items()}
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what has been added since the last time."""
        from safetensors.numpy import save

        if self._positions:
            name = f"{self.prefix}{self._positions[0]:08d}-{self._positions[-1]:08d}.safetensors"
            self.work.put_bytes(name, save(self._open))
            self.done |= dict.fromkeys(self._positions, name)
        self._open, self._positions, self._committed = {}, [], time.monotonic()

    def get(self, position: int) -> Arrays:
        """One committed unit's results."""
        from safetensors.numpy import load

        name = self.done[position]
        if self._read[0] != name:
            data = self.work.get(name)
            if data is None:
                raise RuntimeError(f"committed work {name} has vanished from the work root: start again")
            self._read = (name, load(data))
        start = f"{position}/"
        return {key.removeprefix(start): array for key, array in self._read[1].items() if key.startswith(start)}


def rows_of(unit: Unit) -> list[int]:
    """Positions of a unit's rows in the pool, in the order of its results."""
    return [i for batch in unit for i in batch.rows]


def compute(judge: Judge, plan: Plan, unit: Unit, first: bool) -> Arrays:
    """The results of one unit's rows.

    Raises:
        UserError: it is the first, which has the largest batch, and a batch does not fit into memory.
    """
    from selectmoe.template import encode_many

    parts = []
    for batch in unit:
        encoded = encode_many([plan.rows[i] for i in batch.rows], judge.tokenizer, judge.config.max_length)
        parts.append(_read(judge, encoded, batch.length, first))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if judge.config.ifd:
        chosen = rows_of(unit)
        arrays["nll_unconditional"] = judge.read_answers([plan.rows[i] for i in chosen], plan.answer_tokens[chosen])
    return arrays


def _read(judge: Judge, encoded: Sequence[Encoded], length: int, first: bool) -> Arrays:
    from selectmoe.judge import fitting_rows, out_of_memory

    try:
        return judge.read(encoded, length)
    except RuntimeError as error:
        if not (first and out_of_memory(error)):
            raise
    fits = fitting_rows(judge, encoded, length)  # not in the handler, whose error holds on to the batch's memory
    if not fits:
        advice = "not even one row does: lower max_length"
    elif fits * length >= judge.config.max_length:
        advice = f"token_budget={fits * length} fits"
    else:
        advice = f"batch_size={fits} fits"
    raise UserError(f"the largest batch ({len(encoded)} rows of {length} tokens) does not fit into memory; {advice}")


def assemble(plan: Plan, mine: Sequence[Unit], results: Results) -> Iterator[RouterData]:
    """Router data from committed results, one dataset after the other."""
    for dataset in sorted({unit[0].dataset for unit in mine}):
        positions = [at for at, unit in enumerate(mine) if unit[0].dataset == dataset]
        parts = [results.get(at) for at in positions]
        rows = [i for at in positions for i in rows_of(mine[at])]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        absent = np.full(len(rows), np.nan)
        answer_bytes = [sum(len(text.encode("utf-8", "surrogatepass")) for text in plan.rows[i].answers) for i in rows]
        yield RouterData(
            dataset=[dataset] * len(rows),
            id=[plan.rows[i].id for i in rows],
            tokens=plan.tokens[rows],
            answer_tokens=plan.answer_tokens[rows],
            truncated=plan.truncated[rows],
            nll=arrays.get("nll", absent),
            nll_unconditional=arrays.get("nll_unconditional", absent),
            answer_bytes=np.array(answer_bytes, np.int64),
            **{name: arrays[name] for name in TENSORS},
        )
