"""Stage 2, last part: put the shards of `route` together.

    selectmoe merge shards=[out/route-0,out/route-1] output_dir=out/route

In: one output of `route` per shard, in any order. Out: what one unsharded `route` would have written, with the same
bytes, configuration, inputs and identity, and the same stage in the manifest: nobody downstream can tell the two apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe import stage
from selectmoe.config import StageConfig, input_
from selectmoe.errors import UserError
from selectmoe.legacy_router_data import export_all
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import Manifest, digest, read_manifest
from selectmoe.progress import progress
from selectmoe.route import BOOKKEEPING, PLAN, UNITS, part_config
from selectmoe.router_data import FOLDER, NUMBERS, SHARD, Arrays, Ints, dataset_folders, parts_of
from selectmoe.router_data import STAGE as ROUTE
from selectmoe.router_data_writing import write_dataset

STAGE = "merge"
VERSION = 2


@dataclass
class MergeConfig(StageConfig):
    """Configuration of `merge`."""

    shards: list[str] = input_(doc="the outputs of all shards of one `route`, in any order")

    def validate(self) -> None:
        """Check that there is a shard.

        Raises:
            UserError: the list is empty.
        """
        if not self.shards:
            raise UserError("shards=[] is empty: name the output of every shard")


@dataclass(frozen=True)
class Part:
    """One shard's output."""

    path: Path
    manifest: Manifest
    plan: dict[str, Any]
    index: int
    count: int


def run(config: MergeConfig) -> Path:
    """Merge the shards.

    Returns:
        The output directory.

    Raises:
        UserError: a shard is missing, damaged, there twice, or of another run.
    """
    config.validate()
    shards = sorted((open_shard(Path(path)) for path in config.shards), key=lambda part: part.index)
    check(shards)
    whole = shards[0].manifest
    key = Manifest(**{**vars(whole), "stage": ROUTE}).key
    path = Path(config.output_dir)
    if (path / MANIFEST).is_file() and read_manifest(path).key == key:
        return path
    identities = sorted(shard.manifest.identity for shard in shards)  # proved a moment ago
    entry = {"uri": " ".join(config.shards), "identity": digest(identities)}
    with stage.begin(STAGE, VERSION, config, inputs={"shards": entry}) as out:
        out.stage, out.version, out.inputs = ROUTE, whole.version, whole.inputs
        out.roles = {**out.roles, "identity": whole.config["identity"]}
        (out.staging / FOLDER).mkdir()
        folders: dict[str, list[Path]] = {}
        for shard in shards:
            for name, folder in dataset_folders(shard.path).items():
                folders.setdefault(name, []).append(folder)
        rows = sum(merge_dataset(out, name, folders[name]) for name in progress(sorted(folders), desc="merge"))
        if rows != shards[0].plan["rows"]:
            raise UserError(f"the shards hold {rows} rows, but their plan has {shards[0].plan['rows']}: route again")
        (out.staging / PLAN).write_bytes((shards[0].path / PLAN).read_bytes())
        merge_units(out.staging, shards)
        dropped: Counter[str] = Counter()
        for shard in shards:
            dropped.update(shard.manifest.rows["dropped"])
        if whole.config["identity"].get("export_legacy"):
            export_all(out.staging)
        parts = [f"{FOLDER}/{name}" for name in sorted(folders)]
        rows_in = sum(shard.manifest.rows["in"] for shard in shards)
        out.commit(rows_in=rows_in, rows_out=rows, dropped=dropped, bookkeeping=BOOKKEEPING, parts=parts)
    return path


def merge_dataset(out: stage.Output, name: str, folders: Sequence[Path]) -> int:
    """Write one dataset's router data from the shards that have some of it; one file's tensors are in memory at a time.

    Returns:
        Its rows.

    Raises:
        UserError: a row is in two shards, or the shards are of different judges.
    """
    parts = [part for folder in folders for part in parts_of(folder)]
    indexes = [part.index() for part in parts]
    ids = [row for index in indexes for row in index["id"]]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    for a, b in pairwise(order):
        if ids[a] == ids[b]:
            raise UserError(f"row {ids[a]!r} of dataset {name!r} is in two shards: route again")
    if len({tuple(part.shapes.items()) for part in parts}) > 1:
        raise UserError(f"dataset {name!r}: the shards are of different judges: route again")
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids))
    folder = out.staging / FOLDER / name
    folder.mkdir()
    columns = {column: np.concatenate([index[column] for index in indexes])[order] for column in NUMBERS}
    starts = np.cumsum([0, *(part.rows for part in parts)])

    def blocks(window: range) -> Iterator[tuple[Ints, Arrays]]:
        for part, index, start in zip(parts, indexes, starts.tolist()):
            rows = place[start : start + part.rows]  # ascending, as every shard's are
            first, last = np.searchsorted(rows, [window.start, window.stop]).tolist()
            numbers = {column: index[column][first:last] for column in ("nll", "nll_unconditional")}
            yield rows[first:last], {t: part.tensor(t, first, last) for t in part.shapes} | numbers

    write_dataset(folder, name, [ids[i] for i in order], parts[0].shapes, columns, blocks)
    manifests = [read_manifest(folder, verify=False) for folder in folders]
    (folder / PLAN).write_bytes((folders[0] / PLAN).read_bytes())
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.rows["dropped"])
    rows_in = sum(manifest.rows["in"] for manifest in manifests)
    out.part(
        f"{FOLDER}/{name}",
        rows_in=rows_in,
        rows_out=len(ids),
        dropped=dropped,
        config=part_config(out.roles["identity"]),
        inputs=manifests[0].inputs,
    )
    return len(ids)


def merge_units(staging: Path, shards: Sequence[Part]) -> None:
    """Put the shards' `units.jsonl` together, in the order of the plan."""
    lines = [line for shard in shards for line in (shard.path / UNITS).read_text(encoding="utf-8").splitlines()]
    timings = sorted((json.loads(line) for line in lines), key=lambda unit: (unit["dataset"], unit["batches"]))
    (staging / UNITS).write_text("".join(json.dumps(unit) + "\n" for unit in timings), encoding="utf-8")


def open_shard(path: Path) -> Part:
    """Read one shard's manifest and plan, and prove its files.

    Raises:
        UserError: it is not a finished output of `route`.
    """
    if path.name == FOLDER and not (path / MANIFEST).is_file():
        path = path.parent
    manifest = read_manifest(path)
    index, count = 0, 1
    if manifest.stage.startswith(SHARD):
        index, count = (int(n) for n in manifest.stage.removeprefix(SHARD).split("-of-"))
    elif manifest.stage != ROUTE:
        raise UserError(f"{path} is an output of stage {manifest.stage!r}; expected a shard of `route`")
    return Part(path, manifest, json.loads((path / PLAN).read_text(encoding="utf-8")), index, count)


def check(shards: Sequence[Part]) -> None:
    """Prove that the shards are those of one run, each there exactly once.

    Raises:
        UserError: they are not; the message names the shard.
    """
    first = shards[0]
    for other in shards[1:]:
        if difference := _difference(first, other):
            raise UserError(f"{other.path} and {first.path} are shards of different runs: {difference}")
    seen = Counter(part.index for part in shards)
    if doubled := sorted(index for index, n in seen.items() if n > 1):
        raise UserError(f"shard {doubled[0]} of {first.count} is there twice: name every shard once")
    if missing := sorted(set(range(first.count)) - set(seen)):
        raise UserError(f"shard {missing[0]} of {first.count} is missing: shards= must name all {first.count}")


def _difference(a: Part, b: Part) -> str:
    ours = {"version": a.manifest.version, "shard.count": a.count, "plan": a.plan, **a.manifest.config["identity"]}
    theirs = {"version": b.manifest.version, "shard.count": b.count, "plan": b.plan, **b.manifest.config["identity"]}
    ours |= {f"input {name}": entry["identity"] for name, entry in a.manifest.inputs.items()}
    theirs |= {f"input {name}": entry["identity"] for name, entry in b.manifest.inputs.items()}
    differs = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    return (
        f"{differs[0]} is {theirs.get(differs[0])!r} in one, {ours.get(differs[0])!r} in the other" if differs else ""
    )
