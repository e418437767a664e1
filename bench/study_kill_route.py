"""Study: a routing run killed with `kill -9` at random instants ends with the bytes of an undisturbed one.

    make study-kill-route                 # 200 kills, some ten minutes
    python -m bench.study_kill_route FOLDER [kills=200] [seed=0] [commit=0.5]

Rows of realistic lengths, a small judge made for the purpose. The run is a process of its own that is killed after a
random time, from its first moment to its last, and started again, until it ends; then a new one begins. Commits come every
`commit` seconds of work instead of every 15, so that many fall into the study. Printed: how often the kill fell into which
part of the run, what was computed and lost by a kill (at most one interval and the piece of work under way), and whether
every finished run has the undisturbed one's identity and bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.judges import TINY, judge_of, tokenizer_of, word_pool
from selectmoe.config import load
from selectmoe.manifest import Manifest, read_manifest

KILLS, SEED, COMMIT = 200, 0, 0.5


@dataclass
class Outcome:
    """What the kills did."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """Phase of the run -> kills in it."""
    lost: list[float] = field(default_factory=list)
    """Seconds of computed work per kill that had not been committed, without the last piece of work."""
    same: bool = True


def route_once(values: dict[str, Any], commit: float, log: str) -> None:
    """Route in this process; notes when a phase begins and when a piece of work is done."""
    from selectmoe import route, routing, token_store

    def note(*words: Any) -> None:
        os.write(notes, (" ".join(map(str, words)) + "\n").encode())

    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    note("start")
    real_write, real_compute, real_finish = token_store.write, routing.compute, route.finish

    def write(*arguments: Any) -> Any:
        note("plan")
        return real_write(*arguments)

    def compute(judge: Any, prepared: Any, first: bool) -> Any:
        began = time.monotonic()
        found = real_compute(judge, prepared, first)
        note("unit", prepared.unit.number, time.monotonic() - began)
        return found

    def finish(*arguments: Any) -> Any:
        note("finish")
        return real_finish(*arguments)

    token_store.write, routing.compute, route.finish = write, compute, finish  # type: ignore[assignment]
    routing.COMMIT_SECONDS = commit
    route.run(load(route.RouteConfig, values))
    note("end")


def kill_often(values: dict[str, Any], folder: Path, kills: int, seed: int, commit: float) -> Outcome:
    """Run `route` again and again, killed at random, until so many kills have been.

    Args:
        values: its configuration, without output_dir.
        folder: for outputs and notes.
        kills: how many.
        seed: of the times.
        commit: seconds of work between two commits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selectmoe.judge", "selectmoe.route"])
    rng, out = random.Random(seed), Outcome()
    clean, longest = undisturbed(context, values, folder, commit)
    while sum(out.kills.values()) < kills:
        place, out.runs = folder / f"run-{out.runs}", out.runs + 1
        while not (place / "manifest.json").is_file():
            enough = sum(out.kills.values()) >= kills
            wait = None if enough else rng.uniform(0, longest)
            if phase := attempt(context, {**values, "output_dir": str(place)}, commit, folder / "notes", wait):
                out.kills[phase] += 1
                out.lost.append(lost(place, folder / "notes"))
        out.same = out.same and result(read_manifest(place)) == result(clean)
    return out


def undisturbed(context: Any, values: dict[str, Any], folder: Path, commit: float) -> tuple[Manifest, float]:
    """The manifest of a run that nothing disturbs, and its seconds."""
    for name in ("warm", "clean"):  # the first also starts the server that all processes are forked from
        began = time.monotonic()
        attempt(context, {**values, "output_dir": str(folder / name)}, commit, folder / "notes", None)
    return read_manifest(folder / "clean"), time.monotonic() - began


def attempt(context: Any, values: dict[str, Any], commit: float, notes: Path, wait: float | None) -> str:
    """One process; the phase in which it was killed after `wait` seconds, empty where it came to its end.

    Raises:
        RuntimeError: it failed by itself.
    """
    notes.unlink(missing_ok=True)
    process = context.Process(target=route_once, args=(values, commit, str(notes)))
    process.start()
    process.join(wait)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode == 0:
        return ""
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"route ended with {process.exitcode}")
    words = [line.split()[0] for line in notes.read_text().splitlines()] if notes.is_file() else []
    return words[-1] if words else "start"


def lost(place: Path, notes: Path) -> float:
    """Seconds of finished units of the last attempt that are in no commit, without the last unit's."""
    lines = [line.split() for line in notes.read_text().splitlines()] if notes.is_file() else []
    done = [(int(words[1]), float(words[2])) for words in lines if words[0] == "unit"]
    kept: set[int] = set()
    for path in place.rglob("*.safetensors"):
        for run in path.stem.split("_") if "-" in path.stem else ():
            first, last, step = map(int, run.split("-"))
            kept.update(range(first, last + 1, step))
    return (
        sum(seconds for unit, seconds in done[:-1] if unit not in kept) if not (place / "router_data").is_dir() else 0.0
    )


def result(manifest: Manifest) -> tuple[str, list[dict[str, Any]]]:
    """What two runs of the same work have in common."""
    return manifest.identity, [entry for entry in manifest.files if entry["result"]]


def main(folder: str, kills: int = KILLS, seed: int = SEED, commit: float = COMMIT) -> int:
    """Make pool and judge, kill, print; 1 where a byte differs or a kill cost more than an interval."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    pool = word_pool(root / "pool", rows=600)
    judge = judge_of(root / "judge", tokenizer_of(root / "tokenizer", pool), TINY)
    values = {
        "selector_model": {"path": str(judge)},
        "data": str(pool),
        "token_budget": 2048,
        "threads": 1,
        "nll": True,
    }
    out = kill_often(values, root / "runs", kills, seed, commit)
    total = sum(out.kills.values())
    print(f"{total} kills in {out.runs} runs; by phase: {json.dumps(dict(sorted(out.kills.items())))}")
    print(f"lost per kill beside the piece under way: mean {sum(out.lost) / total:.2f} s, most {max(out.lost):.2f} s;")
    print(f"a commit every {commit} s of work")
    print("identity and bytes of every finished run are the undisturbed one's:", "yes" if out.same else "NO")
    return 0 if out.same and max(out.lost) <= commit else 1


if __name__ == "__main__":
    place, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words)
    commit = float(given.pop("commit", COMMIT))
    sys.exit(main(place, commit=commit, **{key: int(value) for key, value in given.items()}))
