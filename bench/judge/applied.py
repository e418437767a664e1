"""Cells that need the real stages: `convert`, `warmup` and `route` for gates that change what the model computes.

No command runs this module. Every stage commits its own progress, so a killed cell goes on inside of a stage; what it
leaves behind is deleted as soon as the cell's scores are kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.judge.design import UNTRAINED, Cell, Design
from bench.judge.pools import StudyPool, publish
from selectmoe import convert, route, warmup
from selectmoe.config import load
from selectmoe.pool import Row
from selectmoe.router_data import RouterData, read_router_data


def subset(d: Design, pool: StudyPool) -> list[Row]:
    """The rows that applied judges score: as many of every kind, the first ones of the pool's."""
    left = dict.fromkeys(d.kinds, d.applied_planted)
    rows = pool.clean[: d.applied_clean]
    for row, kind in pool.planted:
        if left[kind]:
            rows = [*rows, row]
            left[kind] -= 1
    return rows


def convert_judge(d: Design, base: Path, folder: Path, mode: str, bias: float, seed: int) -> Path:
    """A Select-MoE checkpoint of an OLMoE-shaped one."""
    given = {"model": {"gate_mode": mode, "quality_gate_init_bias": bias}, "seed": seed, "threads": d.threads}
    return Path(convert.run(load(convert.ConvertConfig, given, source_model=str(base), output_dir=str(folder))))


def route_pool(d: Design, judge: Path, weights: str, data: Path, folder: Path, rivals: bool) -> RouterData:
    """What a judge says about a pool; with the rivals' nll and ifd where they are asked for."""
    given = {"max_length": d.max_length, "token_budget": d.token_budget, "nll": rivals, "ifd": rivals}
    given["threads"] = d.threads
    paths: dict[str, Any] = {"selector_model.path": str(judge), "data": str(data), "output_dir": str(folder)}
    return read_router_data(route.run(load(route.RouteConfig, {**given, "model_checkpoint_path": weights}, **paths)))


def warm_up(d: Design, cell: Cell, judge: Path, data: Path, folder: Path) -> Path:
    """Train a cell's gates by the stage itself: all rows of `data`, a step's rows in one micro-batch."""
    training: dict[str, Any] = {
        "quality_loss_type": cell.loss,
        "quality_loss_weight": cell.weight,
        "learning_rate": cell.rate,
        "epochs": d.epochs,
        "batch_size": d.batch,
        "per_device_batch_size": d.batch,
        "max_length": d.max_length,
    }
    if cell.loss == "contrastive":
        training["corruptions"] = [kind for kind in d.kinds if kind not in cell.left_out]
    recipe = "legacy" if cell.mode == "applied" else "observer"
    given = {"recipe": recipe, "seed": cell.seed, "training": training, "threads": d.threads}
    paths: dict[str, Any] = {"selector_model.path": str(judge), "data": str(data), "output_dir": str(folder)}
    return warmup.run(load(warmup.WarmupConfig, given, **paths))


def run(d: Design, cell: Cell, pool: StudyPool, base: Path, folder: Path) -> RouterData:
    """One applied cell.

    Args:
        d: the design.
        cell: of mode `applied`.
        pool: the cell's.
        base: OLMoE-shaped checkpoint.
        folder: for what is made on the way.
    """
    name = f"judge-b{cell.bias:g}-s{cell.seed}"
    for other in folder.glob("judge-*"):
        if other.name != name:  # one checkpoint at a time: they are large
            shutil.rmtree(other)
    judge = convert_judge(d, base, folder / name, "applied", cell.bias, cell.seed)
    data = publish(subset(d, pool), folder / f"rows-{cell.pool}")
    scratch = folder / "cell" / cell.name
    weights = ""
    if cell.loss != UNTRAINED:
        warm = publish(
            pool.warm_rows(cell.warm, cell.rows, d.share), folder / f"warm-{cell.pool}-{cell.warm}-{cell.rows}"
        )
        weights = str(warm_up(d, cell, judge, warm, scratch / "warmup"))
    return route_pool(d, judge, weights, data, scratch / "route", rivals=False)
