"""Datasets in, a normalised pool and a clean holdout out; what is rejected is kept with its reason.

    selectmoe ingest data=path/to/rows.jsonl output_dir=out/ingest
    selectmoe ingest dataset.local.data_dir=dataset/train/processed dataset.local.dataset_names=[cot,dolly] output_dir=out/ingest

In: a file, or a folder with one dataset per subfolder or file (`DIR/NAME/*.jsonl`, `DIR/NAME.jsonl`; see `records`), here or
at s3:// (`sources_s3`); or datasets of the hub (`sources_hf`).
Out: `pool/` and `holdout/` (NAME/00000.parquet, a manifest per dataset; see `pool`), `rejected.jsonl` (dataset, file, line,
reason, record), `sources.json` (what every file was found to hold, and numbers of the pool's datasets) and, when corrupted
copies are planted, `planted.jsonl` (dataset, id, kind).

    datasets -> pieces -> workers: records -> messages -> spool (texts on disk, 70 bytes a row in memory)
             -> per dataset: subset, ids, what goes (workers), holdout, order by id -> workers: Parquet

The order of files and rows and the number of workers change nothing: ids come from the source or from the content, rows are
sorted by id, subset and holdout are drawn by hashes of the content. Everything is decided per dataset, so that another
dataset in the same folder leaves the pool of this one as it is, its bytes and its identity. Three settings look at all
datasets: a holdout that is a number of rows (the default's 200, too, below 10,000 rows), `dataset.weights`, and
`decontaminate.holdout`.

Corrupted copies are planted after the holdout is split off, which stays clean; every row then has an id made from its
content, so that nothing in the pool tells copies from originals.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe import pool_files, screening, source_report, spool, stage
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.corruption import CORRUPTIONS, check_kinds
from selectmoe.decontamination import DecontaminateConfig, Index
from selectmoe.division import Part, check_known, divide
from selectmoe.errors import UserError
from selectmoe.estimate import Pool
from selectmoe.intake import UNREADABLE, UNUSABLE, Intake, Settings, take_in
from selectmoe.memory import give_back
from selectmoe.near_duplicates import NearDuplicatesConfig
from selectmoe.planting import plant
from selectmoe.pool import content_hash, write_dataset
from selectmoe.pool_statistics import Statistics
from selectmoe.pool_statistics import table as statistics_table
from selectmoe.progress import transfer
from selectmoe.sources import Dataset, DatasetConfig, Source, find
from selectmoe.table import duplicates
from selectmoe.workers import Workers, cores

STAGE = "ingest"
VERSION = 2
MAX_PLANTED = 0.9
NOT_DRAWN = "not drawn (subset_ratio, limit or weights)"
HELD_OUT = "held out"
IN_HOLDOUT = "exact duplicate of a row of the holdout"
WORKER_BYTES = 32 << 20
"""Of input that make one more worker worth its start."""


@dataclass
class PlantConfig:
    """Corrupted copies of every dataset's own rows, to see whether a judge finds them."""

    share: float = identity(0.0, doc="share of the final pool that is corrupted copies; 0 plants nothing")
    kinds: list[str] = identity(list(CORRUPTIONS), doc="kinds of corruption, planted in turn")
    seed: int = identity(0, doc="seed of which rows are copied and how; added to seed")


@dataclass
class IngestConfig(StageConfig):
    """Configuration of `ingest`."""

    data: str = input_(
        "",
        doc="rows: a file, a folder of datasets, s3://bucket/prefix or hf://OWNER/NAME[@REVISION]; instead of dataset.*",
    )
    dataset: DatasetConfig = group(DatasetConfig)
    holdout: float | None = identity(
        None,
        doc="kept for evaluation: a share of the contents, below 1, or a number; 0: none; default: 2 % or 200, at most a fifth",
    )
    max_rejected: float = identity(0.01, doc="share of rows that may be rejected before it is an error")
    near_duplicates: NearDuplicatesConfig = group(NearDuplicatesConfig)
    decontaminate: DecontaminateConfig = group(DecontaminateConfig)
    plant: PlantConfig = group(PlantConfig)
    workers: int = execution(0, doc="processes that read and write; 0: one per core, where there is so much to read")

    def validate(self) -> None:
        """Check ranges and names.

        Raises:
            UserError: a value is out of its range or unknown.
        """
        self.dataset.validate()
        if self.holdout is not None and (self.holdout < 0 or (self.holdout > 1 and self.holdout != int(self.holdout))):
            raise UserError(f"holdout={self.holdout} must be a share below 1, a whole number of rows, or 0")
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"max_rejected={self.max_rejected} must be a share from 0 to 1")
        if not 0 <= self.plant.share <= MAX_PLANTED:
            raise UserError(f"plant.share={self.plant.share} must be from 0 to {MAX_PLANTED}")
        check_kinds(self.plant.kinds, "plant.kinds")
        self.near_duplicates.validate()
        self.decontaminate.validate()
        if self.workers < 0:
            raise UserError(f"workers={self.workers} must be at least 1, or 0")

    @property
    def screens(self) -> bool:
        """Whether rows have to be read again to know which of them stay."""
        wanted = self.decontaminate
        return bool(self.near_duplicates.threshold or wanted.tasks or wanted.holdout)

    @property
    def draw(self) -> str:
        """Salt of the hash that draws subsets."""
        return f"draw {self.seed}" if self.dataset.shuffle else "draw"


def find_datasets(config: IngestConfig) -> dict[str, Dataset]:
    """The datasets that are asked for, by name.

    Raises:
        UserError: as `sources.find`, or a schema is given for a dataset that is not there.
    """
    found = find(config.data, config.dataset)
    check_known("schemas", config.dataset.schemas, found)
    return found


def take(config: IngestConfig, datasets: Mapping[str, Dataset], folder: Path, workers: Workers, texts: bool) -> Intake:
    """Read the datasets into a spool, and refuse them where too much cannot be used.

    Args:
        config: of the stage.
        datasets: by name.
        folder: for the spool.
        workers: who reads.
        texts: whether the texts are kept.

    Raises:
        UserError: a file is damaged, more was rejected than `max_rejected`, or no row is left.
    """
    settings = Settings(folder, texts, own_ids=not config.plant.share, draw=config.draw.encode())
    schemas = {name: config.dataset.schemas.get(name, config.dataset.schema) for name in datasets}
    intake = take_in(datasets, schemas, settings, workers)
    check_rejected(intake, config.max_rejected, config.dataset.place(config.data))
    return intake


def check_rejected(intake: Intake, most: float, place: str) -> None:
    """Refuse a pool of which too much was rejected, with the first ten reasons.

    Args:
        intake: what was read.
        most: share that may be rejected.
        place: where it was read, for the message.

    Raises:
        UserError: more than that was rejected, or no row is left.
    """
    seen, rejected = intake.seen, len(intake.rejects)
    reasons = "; ".join(f"{r.dataset}/{r.file} line {r.line}: {r.reason}" for r in intake.rejected(10))
    if rejected > most * seen:
        allowed = f"max_rejected={most:g} allows {int(most * seen)}"
        raise UserError(f"{place}: {rejected} of {seen} rows cannot be used ({allowed}): {reasons}")
    if rejected == seen:
        why = (
            f"every row was rejected: {reasons}" if rejected else "no file holds a row, expected one JSON object a line"
        )
        raise UserError(f"{place}: the pool is empty: {why}")


def survey(config: IngestConfig) -> Pool:
    """Sizes of the data, read as `run` will read them; nothing is kept.

    Raises:
        UserError: what `run` would raise.
    """
    datasets = find_datasets(config)
    with tempfile.TemporaryDirectory() as scratch, Workers(_workers(config, datasets)) as workers:
        folder = Path(scratch)
        try:
            index = screening.task_index(config.decontaminate)
            parts, _ = divide(take(config, datasets, folder, workers, texts=config.screens), config, index, workers)
        finally:
            spool.release(folder)
    tables = [part.table for part in parts.values()]
    rows, pooled = sum(map(len, tables)), sum(len(part.split.pool) for part in parts.values())
    text, answers = (sum(int(t.rows[name].sum(dtype="u8")) for t in tables) for name in ("text", "answers"))
    return Pool(rows, text, answers, rows - pooled)


def _workers(config: IngestConfig, datasets: Mapping[str, Dataset]) -> int:
    found = [source for data in datasets.values() for source in data.sources]
    size = sum(source.size for source in found if isinstance(source, Source))
    streams = sum(not isinstance(source, Source) for source in found)
    return config.workers or max(1, min(cores(config.threads), streams + size // WORKER_BYTES))


def run(config: IngestConfig) -> Path:
    """Read, check, split, plant and write.

    Returns:
        The output folder.

    Raises:
        UserError: see `find_datasets`, `take`, `divide`, `planting.plant`.
        Unavailable: a server does not answer, or a worker was killed.
        OSError: the disk is full.
    """
    datasets = find_datasets(config)
    index = screening.task_index(config.decontaminate)
    inputs: dict[str, Any] = {f"data.{name}": found.entry for name, found in datasets.items()}
    if index:
        inputs["decontaminate.tasks"] = {"uri": " ".join(config.decontaminate.tasks), "identity": index.identity}
    with stage.begin(STAGE, VERSION, config, inputs) as out:
        if out.done:
            return out.path
        folder = out.path / ".work" / "spool"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        give_back()
        try:
            with Workers(_workers(config, datasets)) as workers:
                intake = take(config, datasets, folder, workers, texts=True)
                parts, depends = divide(intake, config, index, workers)
                _plant(parts, depends, config, folder)
                statistics = _write_rows(out, parts, folder, workers)
            _write_lists(out, intake, parts, config)
            _write_sources(out, intake, statistics, index)
        finally:
            spool.release(folder)
            shutil.rmtree(folder, ignore_errors=True)
        _commit(out, intake, parts, depends, config)
    return out.path


def _plant(parts: Mapping[str, Part], depends: Mapping[str, str], config: IngestConfig, folder: Path) -> None:
    wanted = config.plant
    for name, part in parts.items() if wanted.share else ():
        rows = pool_files.read_rows(folder, part.rows(part.split.pool))
        seed = f"plant {name} {config.seed} {wanted.seed}"
        below = int(depends["holdout_below"], 16)
        part.planted, part.kinds = plant(rows, wanted.share, wanted.kinds, seed, below)


def _write_rows(out: stage.Output, parts: Mapping[str, Part], folder: Path, workers: Workers) -> dict[str, Statistics]:
    """Write the Parquet files of pool and holdout; returns the numbers of the pool's datasets."""
    statistics = {name: Statistics() for name in parts}
    places = [
        (out.staging / place / name, part, order)
        for name, part in parts.items()
        for place, order in (("pool", part.split.pool), ("holdout", part.split.holdout))
        if len(order)
    ]
    for target, part, order in places:
        if part.planted and order is part.split.pool:
            rows = [*pool_files.read_rows(folder, part.rows(order)), *part.planted]
            write_dataset(target, sorted(rows, key=lambda row: row.id))
            for row in rows:
                statistics[target.name].add(bytes.fromhex(content_hash(row.messages)), row.messages)
    left = [(target, part, order) for target, part, order in places if not target.exists()]
    tasks = (
        task
        for target, part, order in left
        for task in pool_files.file_tasks(target, folder, part.table, order, measured=order is part.split.pool)
    )
    text = sum(int(part.table.rows["text"][order].sum(dtype="u8")) for _, part, order in left)
    written = 0
    with transfer("ingest: writing", text) as moved:
        for result in workers.map(pool_files.write, tasks):
            moved(result.text)
            written += result.rows
            if result.statistics:
                statistics[result.dataset].merge(result.statistics)
    if written != (wanted := sum(len(order) for *_, order in left)):
        raise RuntimeError(f"{wanted} rows were to be written, {written} were: rows were lost")
    return statistics


def _write_lists(out: stage.Output, intake: Intake, parts: Mapping[str, Part], config: IngestConfig) -> None:
    """Write what a person reads: rejected and planted rows, and what the sources were found to hold."""
    with (out.staging / "rejected.jsonl").open("w", encoding="ascii") as file:
        file.writelines(rejected.line_of_json() for rejected in intake.rejected())
        for part in parts.values():
            copies = part.rows(part.split.copies)
            went = [(copies, [IN_HOLDOUT] * len(copies)), *((gone.table, gone.reasons) for gone in part.gone)]
            for table, reasons in went:
                for row, reason in zip(pool_files.read_rows(intake.folder, table), reasons, strict=True):
                    entry = {"dataset": row.dataset, "id": row.id, "reason": reason}
                    file.write(json.dumps(entry | {"record": {"messages": row.messages}}, sort_keys=True) + "\n")
    if config.plant.share:
        planted = [
            {"dataset": row.dataset, "id": row.id, "kind": kind}
            for part in parts.values()
            for row, kind in zip(part.planted, part.kinds, strict=True)
        ]
        lines = (json.dumps(p, sort_keys=True) + "\n" for p in sorted(planted, key=lambda p: (p["dataset"], p["id"])))
        (out.staging / "planted.jsonl").write_text("".join(lines), encoding="ascii")


def _write_sources(
    out: stage.Output, intake: Intake, statistics: Mapping[str, Statistics], index: Index | None
) -> None:
    """Write what the sources were found to hold, and the pool's datasets; show it."""
    datasets = {name: found.result() for name, found in statistics.items()}
    report = {"files": source_report.report(intake.sources), "datasets": datasets}
    if index:
        report["decontamination"] = index.summary()
    text = json.dumps(report, indent=1, sort_keys=True) + "\n"
    (out.staging / source_report.NAME).write_text(text, encoding="utf-8")
    print(source_report.table(intake.sources), statistics_table(datasets), sep="\n", file=sys.stderr)


def _commit(
    out: stage.Output, intake: Intake, parts: Mapping[str, Part], depends: Mapping[str, str], config: IngestConfig
) -> None:
    """Write the manifests: of every dataset in pool and holdout, of both, and of the whole."""
    for place in ("pool", "holdout"):
        (out.staging / place).mkdir(exist_ok=True)
        inputs: dict[str, dict[str, str]] = {}
        total = Counter[str]()
        for name, part in parts.items():
            rows_out, dropped = _counted(place, part)
            rows_in = rows_out + sum(dropped.values())
            total += Counter(dropped) + Counter({"in": rows_in, "out": rows_out})
            if rows_out:
                made = out.part(
                    f"{place}/{name}",
                    rows_in=rows_in,
                    rows_out=rows_out,
                    dropped=dropped,
                    config=_concerning(name, place, part, depends, intake, config),
                    inputs={key: out.inputs[key] for key in sorted(f"data.{n}" for n in intake.origins[name])},
                )
                inputs[name] = {"uri": name, "identity": made.identity}
        rows_in, rows_out = total.pop("in", 0), total.pop("out", 0)
        counts: dict[str, Any] = {"rows_in": rows_in, "rows_out": rows_out, "dropped": total}
        out.part(place, **counts, config={"part": place}, inputs=inputs, parts=inputs)
    _commit_whole(out, intake, parts)


def _counted(place: str, part: Part) -> tuple[int, dict[str, int]]:
    """Rows of a dataset that are in the pool, or in the holdout, and those that are not, by reason."""
    held, copies = len(part.split.holdout), len(part.split.copies)
    if place == "holdout":
        return held, {IN_HOLDOUT: copies}
    return part.pooled, {NOT_DRAWN: part.taken - part.drawn, HELD_OUT: held + copies, **part.reasons}


def _concerning(
    name: str, place: str, part: Part, depends: Mapping[str, str], intake: Intake, config: IngestConfig
) -> dict[str, Any]:
    """The configuration that a dataset in pool or holdout depends on."""
    data, planted, near = config.dataset, config.plant, config.near_duplicates
    schemas = {read.schema for read in intake.sources if read.dataset.name in intake.origins[name]}
    draws = data.subset_ratio < 1 or part.limit is not None
    return {
        "part": place,
        "dataset": name,
        "schema": sorted(schemas - {""}),
        "subset_ratio": data.subset_ratio,
        "limit": part.limit,
        "draw": config.draw if draws else None,
        **depends,
        "near_duplicates": [near.threshold, near.ngram] if near.threshold else None,
        "decontaminate_ngram": config.decontaminate.ngram if "tasks" in depends or "holdout" in depends else None,
        "plant": {"share": planted.share, "kinds": planted.kinds, "seed": [config.seed, planted.seed]}
        if planted.share
        else None,
    }


def _commit_whole(out: stage.Output, intake: Intake, parts: Mapping[str, Part]) -> None:
    sums = Counter[str]()
    for part in parts.values():
        sums += Counter(planted=len(part.planted), pool=part.pooled, holdout=len(part.split.holdout))
        sums += Counter({NOT_DRAWN: part.taken - part.drawn, IN_HOLDOUT: len(part.split.copies)}) + part.reasons
    planted, pooled, held = (sums.pop(name, 0) for name in ("planted", "pool", "holdout"))
    rejected, unreadable = len(intake.rejects), sum(read.tally.unreadable for read in intake.sources)
    dropped = {UNREADABLE: unreadable, UNUSABLE: rejected - unreadable, **sums}
    again = duplicates({name: part.table for name, part in parts.items()})
    for name, value in (("duplicates", again), ("planted", planted), ("rejected", rejected)):
        out.metric(name, value)
    out.commit(rows_in=intake.seen + planted, rows_out=pooled + held, dropped=dropped)
    left = "".join(f", {n} {reason}" for reason, n in sums.items())
    sizes = f"{pooled} in the pool ({planted} planted), {held} in the holdout"
    print(f"ingest: {sizes}, {rejected} rejected, {again} exact duplicates{left}", file=sys.stderr)
