r"""Stage 2: the judge reads a pool once and says, per row and layer, how good it is and which experts it takes.

    selectmoe route selector_model.path=out/convert model_checkpoint_path=out/warmup data=out/ingest \
        output_dir=out/route
    torchrun --nproc-per-node 4 -m selectmoe.cli route ...      # the same bytes, by all GPUs of a node

In: a Select-MoE checkpoint with the router weights that `warmup` trained, or a plain mixture of experts, or a dense model
(`selectmoe.families`); a pool, or one dataset of it. Out: `router_data/` (formats and shapes: `selectmoe.router_data`;
with `export_legacy=true` also in the predecessor's form, `selectmoe.legacy_router_data`),
`plan.json` (batches, rows, tokens, and the plan's digest) and `units.jsonl` (how long each piece of work took).

Dataset by dataset, rows are tokenised (`selectmoe.token_store`) and the batches planned, from pool and configuration alone
(`selectmoe.batching`). A shard (`shard.index`, `shard.count`) takes every count-th piece of the plan and `selectmoe merge`
puts the shards together; the processes of torchrun share a shard in the same way: same bytes as one process. The next piece
is prepared while one is computed. Pooled results are committed every 15 seconds, and a restart goes on from there.
Every dataset's router data are an output of their own; `reuse=` takes those over that an earlier run has made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe import allowed_code, distributed, ingested, stage
from selectmoe import manifest as mf
from selectmoe.batching import Plan, Unit, share
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.errors import UserError
from selectmoe.legacy_router_data import EXPORTED, export_all
from selectmoe.pool import datasets, locate, row_ids
from selectmoe.router_data import FOLDER, SHARD, STAGE, TENSORS, Arrays, Ints
from selectmoe.router_data_writing import write_dataset
from selectmoe.routing import Results, Source, Work, plan_all, route_units, source_of
from selectmoe.sources import DatasetConfig

VERSION = 3
PLAN = "plan.json"
UNITS = "units.jsonl"
BOOKKEEPING = (UNITS, EXPORTED)


@dataclass
class SelectorModel:
    """The judge."""

    path: str = input_(
        doc="Select-MoE checkpoint, from `convert`; or a plain MoE (no scores), or a dense model (embeddings)"
    )
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
    data: str = input_("", doc="the pool: ingest's output, the pool/ in it, or one dataset of that; default: dataset.*")
    dataset: DatasetConfig = group(DatasetConfig)
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
    export_legacy: bool = identity(
        False, doc="also NAME_router_data.pt per dataset, the predecessor's form (with shards: merge writes it)"
    )
    shard: Shard = group(Shard)
    reuse: list[str] = execution(
        [], doc="finished outputs of route: datasets that they hold, routed in the same way, are taken over"
    )
    allow_code: list[str] = execution([], doc="import path of your own trash expert, that it may be called")

    def validate(self) -> None:
        """Check lengths, budget and shard.

        Raises:
            UserError: a value is out of its range.
        """
        ingested.check(self)
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
        if self.reuse and self.shard.count > 1:
            raise UserError("reuse= goes with shard.count=1: route new datasets by themselves (data=POOL/NAME) instead")
        if not 0 <= self.shard.index < self.shard.count:
            raise UserError(
                f"shard.index={self.shard.index} must be from 0 to shard.count - 1 = {self.shard.count - 1}"
            )


def run(config: RouteConfig) -> Path:
    """Route the pool, or one shard of it; under torchrun, together with the other processes.

    Returns:
        The output directory.

    Raises:
        UserError: an input is missing or does not fit the others, no row has a token, or the largest batch does not
            fit into memory.
    """
    config.validate()
    with distributed.together("ddp" if distributed.world() > 1 else "single"):
        return _run(config)


def _run(config: RouteConfig) -> Path:
    pool = locate(ingested.pool_of(config))
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
        sources = [source_of(name, folder) for name, folder in datasets(pool).items()]
        taken = distributed.from_first(lambda: take_over(config.reuse, sources, out))
        todo = [source for source in sources if source.name not in taken]
        from selectmoe.judge import Judge  # torch: only where there is work to do

        judge = Judge.load(config) if todo else None
        if judge and config.export_legacy:
            judge.family.check_exportable()
        work = plan_all(config, todo, judge, out) if judge else []
        mine = share([one.plan for one in work], index, count)
        results = Results(out.work, mf.digest([one.digest for one in work]))
        if judge:
            route_units(judge, work, mine, results, out)
        distributed.wait()
        if out.leads:
            results.look()
            finish(out, config, work, mine, results, taken)
    return out.path


def weights_input(path: str) -> Path:
    """The output that router weights belong to: a file and its folder are the same input."""
    place = Path(path)
    if not place.exists():
        raise UserError(
            f"model_checkpoint_path={path} does not exist; expected warmup's output or its full_rank_weights.pt"
        )
    return place.parent if place.is_file() and (place.parent / mf.NAME).is_file() else place


def part_config(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity fields of the stage that change one dataset's router data."""
    return {name: value for name, value in identity.items() if name not in ("export_legacy", "dataset")}


def part_inputs(out: stage.Output, source: Source) -> dict[str, dict[str, str]]:
    """What one dataset's router data are made from: the stage's inputs, and of the pool this dataset only."""
    return {**out.inputs, "pool": {"uri": str(source.folder), "identity": source.identity}}


def take_over(places: Sequence[str], sources: Sequence[Source], out: stage.Output) -> list[str]:
    """Copy what earlier outputs hold of these datasets, where it was made from the same by the same means.

    Returns:
        The datasets that need not be routed.

    Raises:
        UserError: a place holds no finished output of `route`, or a damaged one.
    """
    taken = []
    for place in places:
        manifest = mf.read_manifest(place)
        if manifest.stage != STAGE:
            raise UserError(f"reuse={place} is an output of stage {manifest.stage!r}, not of route")
        for source in sources:
            folder = Path(place, FOLDER, source.name)
            if source.name in taken or f"{FOLDER}/{source.name}" not in manifest.parts:
                continue
            ids = {name: entry["identity"] for name, entry in part_inputs(out, source).items()}
            if mf.read_manifest(folder, verify=False).key == mf.work_key(
                STAGE, VERSION, part_config(out.roles["identity"]), ids
            ):
                shutil.copytree(folder, out.staging / FOLDER / source.name)
                taken.append(source.name)
    return taken


def finish(
    out: stage.Output,
    config: RouteConfig,
    work: Sequence[Work],
    mine: Sequence[Unit],
    results: Results,
    taken: Sequence[str],
) -> None:
    """Assemble the router data of every dataset from committed results, and commit the output.

    Raises:
        UserError: the pool was changed meanwhile.
    """
    (out.staging / FOLDER).mkdir(exist_ok=True)
    rows_out, empty, plans = 0, 0, {}
    for name in taken:
        manifest = mf.read_manifest(out.staging / FOLDER / name)
        rows_out, empty = rows_out + manifest.rows["out"], empty + sum(manifest.rows["dropped"].values())
        plans[name] = json.loads((out.staging / FOLDER / name / PLAN).read_text(encoding="utf-8"))
    for one in work:
        units_here = [unit for unit in mine if unit.plan is one.plan]
        routed, without = assemble(out, config, one, units_here, results)
        rows_out, empty = rows_out + routed, empty + without
        plans[one.source.name] = describe(one.plan, one.digest)
        mf.read_manifest(one.source.folder)  # what was routed is what lies there
        one.tokens.close()
    write_json(out.staging / PLAN, summary(plans))
    with open(out.staging / UNITS, "w", encoding="utf-8") as file:
        for unit in sorted(mine, key=lambda unit: unit.number):
            file.write(json.dumps(timing(unit, float(results.get(unit.number)["seconds"][0]))) + "\n")
    parts = [f"{FOLDER}/{path.name}" for path in sorted((out.staging / FOLDER).iterdir())]
    if config.export_legacy and config.shard.count == 1:
        export_all(out.staging)
    dropped = {"no_valid_token": empty}
    out.commit(rows_in=rows_out + empty, rows_out=rows_out, dropped=dropped, bookkeeping=BOOKKEEPING, parts=parts)


def assemble(
    out: stage.Output, config: RouteConfig, one: Work, mine: Sequence[Unit], results: Results
) -> tuple[int, int]:
    """Write one dataset's router data, rows by id, and its manifest.

    Returns:
        Rows that were routed here, and rows without a token: the shard with the dataset's first unit counts them, and the
        first one where there is no unit.
    """
    plan, known = one.plan, one.tokens.rows
    counts = any(unit.index == 0 for unit in mine) if len(plan.order) else config.shard.index == 0
    empty = int((known.tokens == 0).sum()) if counts else 0
    if not mine:
        return 0, empty
    chosen = np.sort(np.concatenate([unit.rows for unit in mine]))
    folder = out.staging / FOLDER / one.source.name
    folder.mkdir()
    wanted = np.zeros(len(known.tokens), dtype=bool)
    wanted[chosen] = True
    ids = [row for row, here in zip(row_ids(one.source.folder), wanted, strict=True) if here]
    shapes = {name: a.shape[1:] for name, a in results.get(mine[0].number).items() if name in TENSORS}
    batch = np.full(len(known.tokens), -1)
    batch[plan.order] = np.repeat(np.arange(len(plan.starts) - 1), np.diff(plan.starts))
    columns = {**{name: array[chosen] for name, array in vars(known).items()}, "batch": batch[chosen]}
    ordered = sorted(mine, key=lambda unit: results.done[unit.number])

    def blocks(window: range) -> Iterator[tuple[Ints, Arrays]]:
        for unit in ordered:
            rows = np.searchsorted(chosen, unit.rows)
            if ((rows >= window.start) & (rows < window.stop)).any():
                yield rows, results.get(unit.number)

    write_dataset(folder, one.source.name, ids, shapes, columns, blocks)
    write_json(folder / PLAN, describe(plan, one.digest))
    out.part(
        f"{FOLDER}/{one.source.name}",
        rows_in=len(chosen) + empty,
        rows_out=len(chosen),
        dropped={"no_valid_token": empty},
        config=part_config(out.roles["identity"]),
        inputs=part_inputs(out, one.source),
    )
    return len(chosen), empty


def describe(plan: Plan, digest: str) -> dict[str, Any]:
    """What a dataset's `plan.json` holds; the same for every shard."""
    return {
        "digest": digest,
        "batches": len(plan.starts) - 1,
        "rows": len(plan.order),
        "tokens": int(plan.tokens.sum()),
        "padded_tokens": int(plan.padded.sum()),
    }


def summary(plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the `plan.json` of the whole holds."""
    names = sorted(plans)
    totals = {key: sum(plans[n][key] for n in names) for key in ("batches", "rows", "tokens", "padded_tokens")}
    return {"digest": mf.digest([[n, plans[n]["digest"]] for n in names]), **totals, "datasets": plans}


def timing(unit: Unit, seconds: float) -> dict[str, Any]:
    """A line of `units.jsonl`."""
    plan, batches = unit.plan, unit.batches
    return {
        "dataset": plan.dataset,
        "batches": [batches.start, batches.stop - 1],
        "rows": len(unit.rows),
        "tokens": int(plan.tokens[unit.rows].sum()),
        "padded_tokens": int(plan.padded[batches.start : batches.stop].sum()),
        "seconds": round(seconds, 4),
    }


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
