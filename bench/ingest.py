"""What ingesting a pool costs: rows a second and memory, beside a plain loop and the datasets library. `make bench-ingest`.

    python -m bench.ingest [rows=1000000] [files=4] [workers=0] [folder=DIR]

Rows of 1 KB in messages format, made of words with Zipf's frequencies, in so many `.jsonl` files. Each contender is a process
of its own, and does all of it from the start of Python to its end:

* `selectmoe ingest`: identity of the input, reading, checks, ids, duplicates, holdout, Parquet (zstd), manifests;
* a plain loop: `json.loads` for every line, nothing kept;
* `datasets.load_dataset("json")` with as many processes as there are cores: reading, and writing its Arrow cache.

Memory is the largest sum over the process and all its children, sampled ten times a second: PSS (proportional set size, which
counts a page that several processes share once) and RSS, which counts it for each. Aims: at least 20,000 rows a
second and at most 600 MB of PSS for a million rows on two cores.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from selectmoe.manifest import read_manifest
from selectmoe.workers import cores

AIM_ROWS, AIM_BYTES = 20_000, 600_000_000
ROW_BYTES = 1024
PLAIN = """
import json, sys
rows = 0
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            rows += len(json.loads(line)["messages"]) > 0
print(rows)
"""
DATASETS = """
import sys
from datasets import load_dataset
cache, processes, *paths = sys.argv[1:]
print(load_dataset("json", data_files=paths, split="train", cache_dir=cache, num_proc=int(processes)).num_rows)
"""


@dataclass(frozen=True)
class Cost:
    """Of one process and its children."""

    seconds: float
    cpu: float
    """Seconds of all of them."""
    pss: int
    """Bytes."""
    rss: int
    """Bytes."""


def make(folder: Path, rows: int, files: int) -> list[Path]:
    """Write the rows."""
    rng = random.Random(0)
    letters = "eeeeeettttaaaoooiiinnnssshhhrrrdddlluucmfwygpbvk"
    words = sorted({"".join(rng.choices(letters, k=rng.randint(2, 11))) for _ in range(20_000)})
    rng.shuffle(words)
    weights = [1 / (n + 10) for n in range(len(words))]
    folder.mkdir(parents=True)
    paths = []
    for number in range(files):
        paths.append(folder / f"{number}.jsonl")
        with paths[-1].open("w", encoding="utf-8") as file:
            for n in range(number, rows, files):
                text = f"{n} " + " ".join(rng.choices(words, weights, k=220))
                file.write(_line(text, ROW_BYTES) + "\n")
    return paths


def _line(text: str, size: int) -> str:
    frame = len(json.dumps(_record("", ""))) + 1
    text = text[: size - frame]
    question = len(text) // 4
    return json.dumps(_record(text[:question], text[question:]))


def _record(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def measure(command: list[str], wanted: str) -> Cost:
    """Run a command.

    Raises:
        RuntimeError: it fails, or its last line is another one.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {"Pss": 0, "Rss": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            found = memory(process.pid)
            peaks.update({name: max(peaks[name], found[name]) for name in peaks})

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.monotonic() - started
    over.set()
    watcher.join()
    if process.returncode or said.splitlines()[-1] != wanted:
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}: {said[-200:]}")
    return Cost(seconds, cpu, peaks["Pss"], peaks["Rss"])


def memory(root: int) -> dict[str, int]:
    """Bytes of a process and its descendants: Pss, Rss."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has ended
                continue
    total = {"Pss": 0, "Rss": 0}
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += [child for child, parent in parents.items() if parent == process]
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += 1024 * int(rest.split()[0])
    return total


def main(rows: int, files: int, workers: int, folder: Path) -> bool:
    """Measure and print a table; whether the aims are reached."""
    paths = [str(path) for path in make(folder / "data" / "bench", rows, files)]
    size = sum(os.path.getsize(path) for path in paths)
    print(f"{rows} rows, {size / 1e6:.0f} MB in {files} files, {cores()} cores")
    out = folder / "out"
    words = [f"data={folder / 'data'}", f"output_dir={out}", f"workers={workers}"]
    commands = {
        "plain json.loads": ([sys.executable, "-c", PLAIN, *paths], str(rows)),
        "selectmoe ingest": ([sys.executable, "-m", "selectmoe.cli", "ingest", *words], str(out)),
        "datasets json": (
            [sys.executable, "-c", DATASETS, str(folder / "cache"), str(min(files, cores())), *paths],
            str(rows),
        ),
    }
    costs = {name: measure(*command) for name, command in commands.items()}
    ours = costs["selectmoe ingest"]
    print(f"{'':<18}{'seconds':>9}{'CPU s':>7}{'rows/s':>10}{'ours is':>9}{'PSS MB':>8}{'RSS MB':>8}")
    for name, cost in costs.items():
        print(
            f"{name:<18}{cost.seconds:9.1f}{cost.cpu:7.1f}{rows / cost.seconds:10.0f}{cost.seconds / ours.seconds:8.2f}x"
            f"{cost.pss / 1e6:8.0f}{cost.rss / 1e6:8.0f}"
        )
    manifest = read_manifest(out)
    print(f"rows in {manifest.rows['in']}, out {manifest.rows['out']}, dropped {manifest.rows['dropped']}")
    fine = rows / ours.seconds >= AIM_ROWS and ours.pss <= AIM_BYTES
    print(f"aims ({AIM_ROWS} rows/s, {AIM_BYTES / 1e6:.0f} MB of PSS): {'reached' if fine else 'missed'}")
    return fine


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    numbers = {
        key: int(given.get(key, default)) for key, default in (("rows", 1_000_000), ("files", 4), ("workers", 0))
    }
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as place:
        reached = main(**numbers, folder=Path(place))
    sys.exit(0 if reached else 3)
