"""Datasets in, a normalised pool and a clean holdout out; what is rejected is kept with its reason.

    selectmoe ingest data=path/to/rows.jsonl output_dir=out/ingest
    selectmoe ingest dataset.local.data_dir=dataset/train/processed dataset.local.dataset_names=[cot,dolly] output_dir=out/ingest

In: a file, or a folder with one dataset per subfolder or file (`DIR/NAME/*.jsonl`, `DIR/NAME.jsonl`; see `formats`).
Out: `pool/` and `holdout/` (NAME.parquet, each with a manifest), `rejected.jsonl` (dataset, file, line, reason, record)
and, when corrupted copies are planted, `planted.jsonl` (dataset, id, kind).

The order of files and rows changes nothing: ids come from the source or from the content, rows are sorted by id, the
holdout is drawn by a hash of the content. Corrupted copies are planted after the holdout is split off, which stays clean;
every row then has an id made from its content, so that nothing in the pool tells copies from originals.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectmoe import cache, stage
from selectmoe.config import StageConfig, group, identity, input_
from selectmoe.corruption import CORRUPTIONS, check_kinds, corrupt
from selectmoe.errors import UserError
from selectmoe.formats import FormatError, kind_of, own_id, read_records, stem_of, to_messages
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.pool import DATASET_NAME, Message, Row, content_hash, content_id, write_pool
from selectmoe.progress import progress

STAGE = "ingest"
VERSION = 1
HOLDOUT_ROWS, HOLDOUT_SHARE, HOLDOUT_MOST = 200, 0.02, 0.2
"""The default holdout: the larger of this many rows and this share, at most this share."""
MAX_PLANTED = 0.9
UNREADABLE, UNUSABLE = "not readable as JSON", "not convertible into messages"
IN_HOLDOUT = "exact duplicate of a row of the holdout"


@dataclass
class LocalConfig:
    """Datasets on this machine."""

    data_dir: str = input_("dataset/train/processed", doc="folder with one dataset per subfolder or file; unless data=")
    dataset_names: list[str] = identity([], doc="datasets to take; default: every one there is, by name")


@dataclass
class DatasetConfig:
    """Which datasets."""

    dataset_from: str = identity("local", doc="where the datasets lie: local")
    local: LocalConfig = group(LocalConfig)


@dataclass
class PlantConfig:
    """Corrupted copies of the pool's own rows, to see whether a judge finds them."""

    share: float = identity(0.0, doc="share of the final pool that is corrupted copies; 0 plants nothing")
    kinds: list[str] = identity(list(CORRUPTIONS), doc="kinds of corruption, planted in turn")
    seed: int = identity(0, doc="seed of which rows are copied and how; added to seed")


@dataclass
class IngestConfig(StageConfig):
    """Configuration of `ingest`."""

    data: str = input_(
        "", doc="a file of rows, or a folder of datasets, here or at s3://; takes the place of dataset.local.data_dir"
    )
    dataset: DatasetConfig = group(DatasetConfig)
    holdout: float | None = identity(
        None,
        doc="rows kept for evaluation: a share below 1, or a number; 0: none; default: 2 % or 200, at most a fifth",
    )
    max_rejected: float = identity(0.01, doc="share of rows that may be rejected before it is an error")
    plant: PlantConfig = group(PlantConfig)

    def validate(self) -> None:
        """Check ranges and names.

        Raises:
            UserError: a value is out of its range or unknown.
        """
        if self.dataset.dataset_from != "local":
            raise UserError(f"dataset.dataset_from={self.dataset.dataset_from} is unknown; known: local")
        if self.holdout is not None and (self.holdout < 0 or (self.holdout > 1 and self.holdout != int(self.holdout))):
            raise UserError(f"holdout={self.holdout} must be a share below 1, a whole number of rows, or 0")
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"max_rejected={self.max_rejected} must be a share from 0 to 1")
        if not 0 <= self.plant.share <= MAX_PLANTED:
            raise UserError(f"plant.share={self.plant.share} must be from 0 to {MAX_PLANTED}")
        check_kinds(self.plant.kinds, "plant.kinds")


@dataclass
class Intake:
    """What reading gave: rows without final ids, and the rejected records."""

    rows: list[tuple[str, str, list[Message]]] = field(default_factory=list)
    """(dataset, the source's own id or empty, messages)."""
    rejected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Records that were read."""
        return len(self.rows) + len(self.rejected)


def find_datasets(config: IngestConfig) -> dict[str, Path]:
    """Name -> file or folder of every dataset that is asked for.

    Raises:
        UserError: nothing is there, a dataset that is named is not, a name cannot be a file name, two have one name, or
            the folder is an output of `ingest` already.
    """
    given = config.data or config.dataset.local.data_dir
    key = "data" if config.data else "dataset.local.data_dir"
    root = cache.locate(given, key)[0] if given.startswith("s3://") else Path(given)
    if not root.exists():
        raise UserError(f"{key}={root} does not exist: name a file of rows, or a folder of datasets")
    if (root / MANIFEST).is_file():
        raise UserError(f"{key}={root} is an output of Select-MoE already: give it to the next stage as data=")
    if root.is_file() and not kind_of(root):
        raise UserError(f"{key}={root} is none of .jsonl, .json (either also .gz or .zst) and .parquet")
    entries = [root] if root.is_file() else [p for p in sorted(root.iterdir()) if not p.name.startswith(".")]
    found: dict[str, Path] = {}
    for entry in entries:
        if entry.is_file() and not kind_of(entry):
            continue
        name = stem_of(entry) if entry.is_file() else entry.name
        if name in found:
            raise UserError(f"{found[name]} and {entry} are both called {name}: rename one")
        found[name] = entry
    wanted = config.dataset.local.dataset_names or sorted(found)
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"dataset {missing[0]!r} is not in {root}; there are: {', '.join(sorted(found)) or 'none'}")
    if bad := [name for name in wanted if not DATASET_NAME.fullmatch(name)]:
        raise UserError(
            f"dataset name {bad[0]!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and not begin with a dot: rename it"
        )
    if not wanted:
        raise UserError(
            f"{key}={root} holds no dataset: expected NAME/*.jsonl or NAME.jsonl (also .json, .parquet, .gz)"
        )
    return {name: found[name] for name in sorted(set(wanted))}


def read_dataset(name: str, path: Path, intake: Intake) -> None:
    """Read a dataset's files into `intake`.

    Raises:
        UserError: there is no file, or one is damaged or not JSON at all.
    """
    files = [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise UserError(f"{path} holds no .jsonl, .json or .parquet file")
    for file in files:
        place = file.name if path.is_file() else file.relative_to(path).as_posix()
        for record in progress(read_records(file), desc=f"{name}/{place}", unit="rows"):
            reason, dataset = record.error, name
            if not reason:
                try:
                    messages = to_messages(record.value)
                    row_id = own_id(record.value)
                    dataset = own_dataset(record.value, name) if path.is_file() else name
                except FormatError as error:
                    reason = str(error)
                else:
                    intake.rows.append((dataset, row_id, messages))
            if reason:
                rejected = {
                    "dataset": name,
                    "file": place,
                    "line": record.line,
                    "reason": reason,
                    "record": record.value,
                }
                intake.rejected.append(rejected)


def own_dataset(record: dict[str, Any], default: str) -> str:
    """The dataset that a row in a file of several says it is from.

    Raises:
        FormatError: what it says cannot be a dataset's name.
    """
    name = record.get("dataset", default)
    if not isinstance(name, str) or not DATASET_NAME.fullmatch(name):
        raise FormatError(f"dataset {str(name)[:80]!r} cannot be a dataset's name (A-Z a-z 0-9 . _ -, at most 64)")
    return name


def check_rejected(rejected: list[dict[str, Any]], seen: int, most: float, place: str) -> None:
    """Refuse a pool of which too much was rejected, with the first ten reasons.

    Args:
        rejected: the records that were rejected.
        seen: how many were read.
        most: share that may be rejected.
        place: where they were read, for the message.

    Raises:
        UserError: more than that was rejected, or no row is left.
    """
    reasons = "; ".join(f"{r['dataset']}/{r['file']} line {r['line']}: {r['reason']}" for r in rejected[:10])
    if len(rejected) > most * seen:
        allowed = f"max_rejected={most:g} allows {int(most * seen)}"
        raise UserError(f"{place}: {len(rejected)} of {seen} rows cannot be used ({allowed}): {reasons}")
    if len(rejected) == seen:
        raise UserError(
            f"{place}: the pool is empty: "
            + (
                f"every row was rejected: {reasons}"
                if rejected
                else "no file holds a row, expected one JSON object a line"
            )
        )


def assign_ids(rows: Iterable[tuple[str, str, list[Message]]]) -> list[Row]:
    """Give every row its exact id: its own, else its content's; the k-th row with an id (k > 1) gets `-k`.

    Rows that share an id are ordered by content, so that the order of the files plays no part.

    Returns:
        The rows, sorted by (dataset, id).
    """
    wanted: defaultdict[tuple[str, str], list[tuple[str, list[Message]]]] = defaultdict(list)
    for dataset, row_id, messages in rows:
        wanted[dataset, row_id or content_id(dataset, messages)].append((content_hash(messages), messages))
    taken = set(wanted)
    out: list[Row] = []
    for (dataset, base), same in sorted(wanted.items()):
        out.append(Row(dataset, base, min(same, key=lambda pair: pair[0])[1]))
        k = 2
        for _, messages in sorted(same, key=lambda pair: pair[0])[1:]:
            while (dataset, f"{base}-{k}") in taken:
                k += 1
            taken.add((dataset, f"{base}-{k}"))
            out.append(Row(dataset, f"{base}-{k}", messages))
    return sorted(out, key=lambda row: row.key)


def holdout_size(holdout: float | None, rows: int) -> int:
    """Number of rows to hold out.

    Raises:
        UserError: the holdout would leave no pool.
    """
    if holdout is None:
        return int(min(max(HOLDOUT_ROWS, HOLDOUT_SHARE * rows), HOLDOUT_MOST * rows))
    size = max(1, round(holdout * rows)) if 0 < holdout < 1 else int(holdout)
    if size >= rows:
        raise UserError(f"holdout={holdout:g} would take all of the {rows} rows: give a smaller one")
    return size


def split(rows: list[Row], size: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Split rows by a hash of their content.

    The hash is salted: by the plain one, which ids show, the rows that stay would be recognisable by their ids.

    Args:
        rows: sorted by (dataset, id).
        size: contents to hold out.

    Returns:
        pool, holdout (each content once), and the rows that go because their content is in the holdout.
    """
    by_content: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_content[hashlib.sha256(b"holdout" + content_hash(row.messages).encode()).hexdigest()].append(row)
    drawn = sorted(by_content)[:size]
    holdout = [by_content[content][0] for content in drawn]
    copies = [row for content in drawn for row in by_content[content][1:]]
    gone = {row.key for row in (*holdout, *copies)}
    return [row for row in rows if row.key not in gone], holdout, copies


def plant(pool: list[Row], holdout: list[Row], config: PlantConfig, seed: int) -> tuple[list[Row], list[str]]:
    """Make corrupted copies of rows of the pool, kinds in turn, until they are `share` of pool and copies together.

    Args:
        pool: the clean rows.
        holdout: rows whose content no copy may have.
        config: share, kinds, seed.
        seed: the stage's seed.

    Returns:
        The copies, and the kind of each.

    Raises:
        UserError: the pool's rows do not give so many different copies.
    """
    wanted = round(config.share * len(pool) / (1 - config.share))
    rng = random.Random(f"plant {seed} {config.seed}")
    known = {content_hash(row.messages) for row in (*pool, *holdout)}
    copies: list[Row] = []
    kinds: list[str] = []
    order: list[Row] = []
    failures = 0
    while len(copies) < wanted:
        if not order:
            order = rng.sample(pool, len(pool))
        row, kind = order.pop(), config.kinds[len(copies) % len(config.kinds)]
        copy = corrupt(kind, row, rng.choice(pool), rng)
        content = content_hash(copy.messages) if copy else ""
        if copy is None or content in known:
            failures += 1
            if failures > 20 * (wanted + len(pool)):
                raise UserError(
                    f"plant.share={config.share:g} needs {wanted} copies ({kind}); the pool gives {len(copies)}"
                )
            continue
        known.add(content)
        copies.append(copy)
        kinds.append(kind)
    return copies, kinds


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as strict JSON lines in ASCII, since a rejected record may hold text that UTF-8 cannot."""
    with path.open("w", encoding="ascii") as file:
        for record in records:
            try:
                line = json.dumps(record, sort_keys=True, default=str, allow_nan=False)
            except ValueError:  # a table's NaN
                line = json.dumps(record | {"record": repr(record["record"])}, sort_keys=True)
            file.write(line + "\n")


def run(config: IngestConfig) -> Path:
    """Read, check, split, plant and write.

    Returns:
        The output folder.

    Raises:
        UserError: see `find_datasets`, `read_dataset`, `check_rejected`, `holdout_size`, `plant`.
    """
    datasets = find_datasets(config)
    with stage.begin(STAGE, VERSION, config, inputs={f"data.{name}": str(p) for name, p in datasets.items()}) as out:
        if out.done:
            return out.path
        intake = Intake()
        for name, path in datasets.items():
            read_dataset(name, path, intake)
        place = config.data or config.dataset.local.data_dir
        check_rejected(intake.rejected, intake.seen, config.max_rejected, place)
        planting = config.plant.share > 0
        rows = assign_ids((name, "" if planting else row_id, messages) for name, row_id, messages in intake.rows)
        pool, holdout, copies = split(rows, holdout_size(config.holdout, len(rows)))
        planted, kinds = plant(pool, holdout, config.plant, config.seed) if planting else ([], [])
        if not pool:
            raise UserError("the pool is empty: every row has the content of one in the holdout (give holdout=0)")
        dropped = Counter(UNREADABLE if isinstance(r["record"], str) else UNUSABLE for r in intake.rejected)
        dropped[IN_HOLDOUT] += len(copies)
        _write(out, pool, holdout, planted, kinds, intake.rejected, copies)
        duplicates = len(rows) - len({content_hash(row.messages) for row in rows})
        out.metric("duplicates", duplicates)
        out.metric("planted", len(planted))
        out.metric("rejected", len(intake.rejected))
        out.commit(
            rows_in=intake.seen + len(planted), rows_out=len(pool) + len(planted) + len(holdout), dropped=dropped
        )
    sizes = f"{len(pool) + len(planted)} in the pool ({len(planted)} planted), {len(holdout)} in the holdout"
    print(f"ingest: {sizes}, {len(intake.rejected)} rejected, {duplicates} exact duplicates", file=sys.stderr)
    return out.path


def _write(
    out: stage.Output,
    pool: list[Row],
    holdout: list[Row],
    planted: list[Row],
    kinds: list[str],
    rejected: list[dict[str, Any]],
    copies: list[Row],
) -> None:
    """Stage the files; pool and holdout with their own manifests."""
    final = [*pool, *planted]
    for part, rows in (("pool", final), ("holdout", holdout)):
        (out.staging / part).mkdir()
        write_pool(out.staging / part, rows)
        out.part(part, rows_in=len(rows), rows_out=len(rows))
    gone = [
        {"dataset": r.dataset, "id": r.id, "reason": IN_HOLDOUT, "record": {"messages": r.messages}} for r in copies
    ]
    write_lines(out.staging / "rejected.jsonl", [*rejected, *gone])
    if planted:
        records = [{"dataset": r.dataset, "id": r.id, "kind": kind} for r, kind in zip(planted, kinds, strict=True)]
        write_lines(out.staging / "planted.jsonl", sorted(records, key=lambda r: (r["dataset"], r["id"])))
