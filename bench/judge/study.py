"""The study at work: what it prepares, its cells, and where they are kept.

No command runs this module; `bench/study_judge.py` does. Every finished cell is one file in `cells/`, written at once or not
at all: after a kill the same command goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.judge import applied, gates, pools
from bench.judge.design import UNTRAINED, Cell, Design
from bench.judge.features import Features, hidden_states, read
from selectmoe import demo, pretrain, template, upcycle
from selectmoe.config import load
from selectmoe.device import set_threads
from selectmoe.modeling import load_judge
from selectmoe.pool import Row
from selectmoe.progress import progress
from selectmoe.router_data import RouterData
from selectmoe.scores import auc
from selectmoe.storage import LocalStore

Arrays = dict[str, npt.NDArray[Any]]
PROBE_TOKENS = 1024
OVERHEAD = {"observer": 0.3, "applied": 8.0}
"""Seconds of a cell that do not grow with its rows: opening files, loading the judge."""
BACKWARD = 2.7
"""A training step through the model in forward passes, measured."""
BYTES_PER_SECOND = 3e9
"""At which features are read and multiplied, forward and backward."""


class Study:
    """One study in its folder."""

    def __init__(self, folder: Path, design: Design) -> None:
        self.d = design
        set_threads(design.threads)
        self.folder = folder / design.digest
        self.store = LocalStore(self.folder)
        self.pools = {name: pools.make_pool(design, name) for name, _ in design.sources}
        self.started, self.earlier = time.monotonic(), json.loads(self.store.get("clock.json") or b"0")
        if self.store.get("begun.json") is None:
            begun = {"commit": commit(), "design": dataclasses.asdict(design)}
            self.store.put_bytes("begun.json", json.dumps(begun, indent=1).encode())

    @cached_property
    def base(self) -> Path:
        """The OLMoE-shaped checkpoint: SmolLM2-135M upcycled at full depth, or a small model made from nothing."""
        rows = pools.publish(self.pools["A"].warm, self.folder / "upcycle-rows")
        if self.d.tiny:
            sizes = {
                "hidden_size": 32,
                "intermediate_size": 32,
                "steps": 4,
                "vocab_size": 400,
                "max_length": self.d.max_length,
                "threads": self.d.threads,
            }
            out = str(self.folder / "base")
            return pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(rows), output_dir=out))
        dense = self.folder / "dense"
        if not dense.is_dir():
            building = self.folder / "dense.part"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            demo.write_model(building)
            building.rename(dense)
        given = {"experts": 4, "top_k": 1, "rows": 40, "max_length": self.d.max_length}
        paths = {"source_model": str(dense), "data": str(rows), "output_dir": str(self.folder / "base")}
        return upcycle.run(load(upcycle.UpcycleConfig, given, **paths))

    @cached_property
    def judge(self) -> Path:
        """The observers' checkpoint; its own gates are those of bias 0 and seed 0."""
        return applied.convert_judge(self.d, self.base, self.folder / "observer", "observer", 0.0, 0)

    def routed(self, pool: str) -> RouterData:
        """What `route` says about a pool's scored rows with untrained gates: nll, ifd, router probabilities, lengths."""
        data = pools.publish(self.pools[pool].scored, self.folder / f"scored-{pool}")
        return applied.route_pool(self.d, self.judge, "", data, self.folder / f"route-{pool}", rivals=True)

    def features(self, pool: str) -> dict[str, Features]:
        """Hidden states of a pool's rows, read once: `scored`, `warm` and `copies` (answer tokens alone)."""
        rows, root = self.pools[pool], self.folder / "features" / pool
        parts: dict[str, Sequence[Row]] = {
            "scored": rows.scored,
            "warm": [*rows.warm, *rows.spoiled],
            "copies": list(rows.bank.values()),
        }
        if self.store.get(f"features/{pool}/done") is None:
            tokenizer = template.load_tokenizer(self.judge)
            model = load_judge(self.judge, "cpu", torch.float32)
            for name, part in parts.items():
                only = name == "copies"
                read(root / name, model, tokenizer, part, self.d.max_length, self.d.token_budget, only)
            self.store.put_bytes(f"features/{pool}/done", b"")
        return {name: Features([root / name]) for name in parts}

    def count(self, pool: str) -> dict[str, int]:
        """Rows of a pool by what they are for."""
        rows = self.pools[pool]
        return {
            "clean": len(rows.clean),
            "planted": len(rows.planted),
            "warm": len(rows.warm),
            "copies": len(rows.bank),
        }

    def shape(self) -> tuple[int, int]:
        """Layers and hidden size of the judge."""
        config = json.loads((self.judge / "config.json").read_text(encoding="utf-8"))
        return int(config["num_hidden_layers"]), int(config["hidden_size"])

    def result(self, name: str) -> Arrays | None:
        """A finished cell."""
        data = self.store.get(f"cells/{name}.npz")
        return None if data is None else dict(np.load(io.BytesIO(data)))

    def keep(self, name: str, arrays: Arrays, started: float) -> None:
        """Commit a finished cell."""
        buffer = io.BytesIO()
        contents: dict[str, Any] = {**arrays, "seconds": np.array(time.monotonic() - started)}
        np.savez_compressed(buffer, **contents)
        self.store.put_bytes(f"cells/{name}.npz", buffer.getvalue())
        self.clock()

    def clock(self) -> float:
        """Seconds of wall time over all starts, kept: of a start that is killed, up to its last finished cell."""
        seconds: float = self.earlier + time.monotonic() - self.started
        self.store.put_bytes("clock.json", json.dumps(seconds).encode())
        return seconds

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that are not finished, each once."""
        return [c for c in dict.fromkeys(cells) if not (self.folder / "cells" / f"{c.name}.npz").is_file()]

    def run_observers(self, pool: str, cells: Sequence[Cell]) -> None:
        """Train and score the observers of a pool that are missing."""
        if not (todo := self.missing(cells)):
            return
        found, rows = self.features(pool), self.pools[pool]
        training = Features([self.folder / "features" / pool / name for name in ("warm", "copies")])
        keys = [row.key for row in rows.scored]
        for cell in progress(todo, f"observers {pool}", unit="judge"):
            started = time.monotonic()
            judge = gates.initial(*self.shape(), cell.bias, cell.seed)
            out: Arrays = {}
            if cell.loss == UNTRAINED:
                plain, negated = gates.pooled(found["scored"], [judge, judge.negated()], keys)
                out |= {f"negated/{name}": values for name, values in negated.items()}
            else:
                steps = [[(r.key, label) for r, label in step] for step in pools.steps(self.d, rows, cell)]
                judge = gates.train(training, steps, cell.loss, judge, cell.rate, cell.weight)
                (plain,) = gates.pooled(found["scored"], [judge], keys)
                if not (cell.left_out or cell.unseen or cell.permuted):
                    out["in_sample"] = np.array(self.in_sample(found, rows, cell, judge))
            out |= {"weight": judge.weight.numpy(), "bias": judge.bias.numpy()}
            self.keep(cell.name, {**plain, **out}, started)

    def in_sample(self, found: dict[str, Features], rows: pools.StudyPool, cell: Cell, judge: gates.Gates) -> float:
        """AUC (score `answer`) on the warm-up's own rows: those that are as they were against all that are corrupted."""
        used = rows.warm_rows(cell.warm, cell.rows, self.d.share)
        as_they_were = {row.key for row in rows.warm}
        good = [row.key for row in used if row.key in as_they_were]
        bad = [row.key for row in used if row.key not in as_they_were]
        copies = [copy.key for (key, _), copy in rows.bank.items() if key in set(good)]
        scores = {
            name: gates.pooled(found[name], [judge], keys)[0]["good_ratio_answer"].mean(axis=1)
            for name, keys in (("warm", [*good, *bad]), ("copies", copies))
        }
        return auc(scores["warm"][: len(good)], np.concatenate([scores["warm"][len(good) :], scores["copies"]]))

    def run_transfer(self, cells: Sequence[Cell], pool: str) -> None:
        """Score a pool with observers that were trained on another one."""
        todo = [c for c in cells if not (self.folder / "cells" / f"{transferred(c, pool)}.npz").is_file()]
        if not todo:
            return
        found, keys = self.features(pool), [row.key for row in self.pools[pool].scored]
        for cell in progress(todo, f"observers of {cells[0].pool} on {pool}", unit="judge"):
            started, kept = time.monotonic(), self.result(cell.name)
            assert kept is not None, f"{cell.name} is trained first"
            judge = gates.Gates(torch.from_numpy(kept["weight"]), torch.from_numpy(kept["bias"]))
            (plain,) = gates.pooled(found["scored"], [judge], keys)
            self.keep(transferred(cell, pool), dict(plain), started)

    def run_applied(self, cells: Sequence[Cell]) -> None:
        """Run the applied cells that are missing."""
        folder = self.folder / "applied"
        for cell in progress(self.missing(cells), "applied gates", unit="judge"):
            started = time.monotonic()
            data = applied.run(self.d, cell, self.pools[cell.pool], self.base, folder)
            self.keep(cell.name, {name: getattr(data, name) for name in (*gates.ARRAYS, "router_probs")}, started)
            shutil.rmtree(folder / "cell" / cell.name, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def shortcut_error(self, pool: str) -> float:
        """Largest difference of a pooled score between `route` and the features, for the checkpoint's own gates."""
        data, kept = self.routed(pool), self.result(Cell(pool, "observer", UNTRAINED, 0.0, 0).name)
        assert kept is not None
        return max(float(np.nanmax(np.abs(getattr(data, name) - kept[name]))) for name in gates.ARRAYS)

    def estimate(self, cells: Sequence[Cell]) -> float:
        """Say how long the cells that are missing will take, after a look at how fast this machine reads; in seconds."""
        if not (todo := self.missing(cells)):
            return 0.0
        tokenizer = template.load_tokenizer(self.judge)
        encoded = template.encode_many(self.pools["A"].warm, tokenizer, self.d.max_length)
        mean = sum(map(len, encoded)) / len(encoded)
        model, probe = load_judge(self.judge, "cpu", torch.float32), encoded[: max(1, int(PROBE_TOKENS / mean))]
        hidden_states(model, probe[:2], tokenizer.pad_token_id)
        started = time.monotonic()
        hidden_states(model, probe, tokenizer.pad_token_id)
        rate = sum(map(len, probe)) / (time.monotonic() - started)
        forward = {name: 0 for name, p in self.pools.items() if self.store.get(f"features/{name}/done") is not None}
        for name, p in self.pools.items():  # the scored rows once for the features, twice for the rivals
            forward.setdefault(name, 3 * len(p.scored) + len(p.warm) + len(p.spoiled) + len(p.bank))
        read = 4 * int(np.prod(self.shape())) / BYTES_PER_SECOND
        seconds = sum(forward.values()) * mean / rate
        for cell in todo:
            rows = self.d.epochs * cell.rows * (2 if cell.loss == "contrastive" else 1)
            if cell.mode == "observer":
                seconds += (3 * rows + len(self.pools[cell.pool].scored)) * mean * read
            else:
                seconds += (
                    (BACKWARD * rows + self.d.applied_clean + self.d.applied_planted * len(self.d.kinds)) * mean / rate
                )
            seconds += OVERHEAD[cell.mode]
        words = f"study: {len(todo)} judges, about {seconds / 60:.0f} min at {rate:.0f} tokens/s"
        print(words, file=sys.stderr, flush=True)
        return seconds

    def tidy(self) -> None:
        """Delete what is large and was only read by cells, which are finished."""
        shutil.rmtree(self.folder / "features", ignore_errors=True)


def transferred(cell: Cell, pool: str) -> str:
    """Name of a cell's scores of another pool."""
    return f"{cell.name}-on-{pool}"


def commit() -> str:
    """The commit that runs, with a `+` where files of it were changed."""

    def git(*words: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")
