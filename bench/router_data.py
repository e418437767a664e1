"""Router data of a million rows written, merged and read back, against a plain copy of the same bytes.

    make bench-router-data
    python -m bench.router_data [rows=1000000] [shards=4]

Synthetic router data in OLMoE-1B-7B's shape (16 layers of 64 experts: 4.3 KB a row). Written: from results that come in
the plan's order (a random permutation of the ids) in groups of 2,000 rows, as `route` assembles them, digests and manifest
included. Merged: `selectmoe merge` of so many shards, proofs of every file included. Read: `read_router_data`, proof
included. Each over the seconds of a plain copy of the finished output, read and written in blocks of 1 MiB; everything ends
with a sync. Bar: at most twice that copy. The kernel's own copy, which moves no byte through the process, is shown beside.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe import merge
from selectmoe.config import load
from selectmoe.manifest import read_manifest, write_manifest
from selectmoe.progress import quiet
from selectmoe.router_data import FOLDER, read_router_data
from selectmoe.router_data_writing import write_dataset
from selectmoe.stage import peak_rss

LAYERS, EXPERTS, GROUP, BAR = 16, 64, 2000, 2.0
SCORES = ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer")
SHAPES: dict[str, tuple[int, ...]] = {"router_probs": (LAYERS, EXPERTS), **dict.fromkeys(SCORES, (LAYERS,))}


def write(output: Path, rows: np.ndarray, block: dict[str, np.ndarray], stage: str, planned: int) -> None:
    """An output of `route` with these rows (of a million and more), results in random order."""
    folder = output / FOLDER / "d"
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(rows))

    def blocks(_: range) -> Iterator[tuple[Any, dict[str, Any]]]:
        for start in range(0, len(rows), GROUP):
            here = order[start : start + GROUP]
            yield here, {name: array[: len(here)] for name, array in block.items()}

    ones = np.ones(len(rows), np.int64)
    columns = dict.fromkeys(("tokens", "answer_tokens", "answer_bytes", "batch"), ones) | {"truncated": ones > 1}
    write_dataset(folder, "d", [f"r{i:08d}" for i in rows.tolist()], SHAPES, columns, blocks)
    (folder / "plan.json").write_text("{}")
    (output / "plan.json").write_text(json.dumps({"digest": "0", "rows": planned}))
    (output / "units.jsonl").write_text("")
    about: dict[str, Any] = {"stage": stage, "version": 3, "config": {"identity": {}, "execution": {}}, "inputs": {}}
    about |= {"rows": {"in": len(rows), "out": len(rows), "dropped": {}}, "environment": {}, "created": ""}
    write_manifest(folder, **about)
    write_manifest(output, **about, parts=[f"{FOLDER}/d"], bookkeeping=["units.jsonl"])


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files through this process."""
    block = bytearray(1 << 20)
    for path in [p for p in source.rglob("*") if p.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb", buffering=0) as ours, open(place, "wb", buffering=0) as theirs:
            while got := ours.readinto(block):
                theirs.write(memoryview(block)[:got])


def proof(source: Path, target: Path) -> None:
    """Copy a folder and prove both, as every reader of ours does."""
    read_manifest(source)
    copy(source, target)
    read_manifest(target)


def timed(work: Callable[[], Any], warm: int) -> float:
    """Seconds until the disk has it.

    Memory that nobody has touched yet costs some virtual machines 3 s a gigabyte: so much is touched and freed before.
    """
    os.sync()
    np.ones(warm, np.uint8)
    began = time.monotonic()
    work()
    os.sync()
    return time.monotonic() - began


def main(rows: int = 1_000_000, shards: int = 4) -> int:
    """Measure and print; 1 where a bar is missed."""
    quiet()
    rng = np.random.default_rng(1)
    block = {name: rng.random((GROUP, *shape), dtype=np.float32) for name, shape in SHAPES.items()}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        every = np.arange(rows)
        warm = 2 * rows * 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
        spent = {"write": timed(lambda: write(root / "whole", every, block, "route", rows), warm)}
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        kernel = timed(lambda: shutil.copytree(root / "whole", root / "kernel"), warm)
        shutil.rmtree(root / "kernel")
        proved = timed(lambda: proof(root / "whole", root / "proved"), warm)
        shutil.rmtree(root / "proved")
        copies = [timed(lambda: copy(root / "whole", root / "copy"), warm)]
        spent["read"] = timed(lambda: read_router_data(root / "copy"), warm)
        held = peak_rss()
        shutil.rmtree(root / "whole")
        places = [root / f"shard-{index}" for index in range(shards)]
        for index, place in enumerate(places):
            write(place, every[index::shards], block, f"route-shard-{index}-of-{shards}", rows)
        config = load(merge.MergeConfig, {"shards": [str(p) for p in places], "output_dir": str(root / "merged")})
        spent["merge"] = timed(lambda: merge.run(config), warm)
        shutil.rmtree(root / "copy")
        copies.append(timed(lambda: copy(root / "merged", root / "copy"), warm))
    plain = min(copies)
    print(
        f"{rows} rows, {size / 1e9:.2f} GB; a copy takes {plain:.1f} s ({size / plain / 1e6:.0f} MB/s), the kernel's {kernel:.1f} s"
    )
    for name, seconds in spent.items():
        print(
            f"{name}: {seconds:.1f} s, {seconds / plain:.2f} x a copy (bar {BAR}), {seconds / proved:.2f} x a proved one"
        )
    print(f"peak memory when all was read: {held / 1e9:.2f} GB")
    return int(max(spent.values()) > BAR * proved)


if __name__ == "__main__":
    sys.exit(main(**{key: int(value) for key, value in (word.split("=", 1) for word in sys.argv[1:])}))
