"""Stage 2, last part: put the shards of `route` together.

    selectmoe merge shards=[out/route-0,out/route-1] output_dir=out/route

In: one output of `route` per shard, in any order. Out: what one unsharded `route` would have written, with the same
bytes, configuration, inputs and identity, and the same stage in the manifest: nobody downstream can tell the two apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe import stage
from selectmoe.config import StageConfig, input_
from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import Manifest, read_manifest
from selectmoe.route import PLAN
from selectmoe.router_data import FOLDER, SHARD, concatenate, dataset_of, part_files, read_part, write_router_data
from selectmoe.router_data import STAGE as ROUTE

STAGE = "merge"
VERSION = 1


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
    with stage.begin(STAGE, VERSION, config, inputs={"shards": config.shards}) as out:
        (out.staging / FOLDER).mkdir()
        files: dict[str, list[Path]] = {}
        for shard in shards:
            for file in part_files(shard.path / FOLDER):
                files.setdefault(dataset_of(file), []).append(file)
        rows = 0
        for dataset in sorted(files):
            data = concatenate([read_part(file) for file in files[dataset]])
            write_router_data(out.staging / FOLDER, data)
            rows += len(data)
        if rows != shards[0].plan["rows"]:
            raise UserError(f"the shards hold {rows} rows, but their plan has {shards[0].plan['rows']}: route again")
        (out.staging / PLAN).write_bytes((shards[0].path / PLAN).read_bytes())
        out.stage, out.version, out.inputs = ROUTE, whole.version, whole.inputs
        out.roles = {**out.roles, "identity": whole.config["identity"]}
        dropped: Counter[str] = Counter()
        for shard in shards:
            dropped.update(shard.manifest.rows["dropped"])
        out.commit(rows_in=sum(s.manifest.rows["in"] for s in shards), rows_out=rows, dropped=dropped)
    return path


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
