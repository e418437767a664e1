"""The proofs of `check`: what a run needs is there and works, or one line says what is not and what would be right.

No command runs this module; `selectmoe check` does, and every run begins with it. Nothing here is expensive: of
checkpoints the headers are read, of S3 and MLflow one small object goes there and back.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from selectmoe.errors import Unavailable, UserError
from selectmoe.estimate import Model, Pool
from selectmoe.journal import enabled
from selectmoe.selection import CLUSTERED
from selectmoe.shards import read_header
from selectmoe.storage import QUICK, S3Store

if TYPE_CHECKING:
    from selectmoe.checkpoint import Source
    from selectmoe.run import RunConfig

P = ParamSpec("P")
T = TypeVar("T")


class Proofs:
    """Proofs that do not depend on each other: the mistakes of all of them are said together."""

    def __init__(self) -> None:
        self.mistakes: dict[str, UserError | Unavailable] = {}

    def attempt(self, proof: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What a proof returns; None where it failed, which is remembered."""
        try:
            return proof(*args, **kwargs)
        except (UserError, Unavailable) as error:
            self.mistakes.setdefault(str(error), error)
            return None

    def settle(self) -> None:
        """Say what failed.

        Raises:
            UserError: something is wrong.
            Unavailable: nothing is, but a server does not answer.
        """
        texts = list(self.mistakes)
        if not texts:
            return
        line = (
            texts[0]
            if len(texts) == 1
            else f"{len(texts)} mistakes: " + " ".join(f"({n}) {text}" for n, text in enumerate(texts, 1))
        )
        if all(isinstance(error, Unavailable) for error in self.mistakes.values()):
            raise Unavailable(line)
        raise UserError(line)


def read_pool(config: RunConfig) -> Pool:
    """Sizes of the data, read as `ingest` will read it.

    Raises:
        UserError: what `ingest` would raise, or nothing would be left to evaluate with.
    """
    from selectmoe import ingest

    if config.data.startswith("s3://"):
        S3Store(config.data, **QUICK).stat("")  # a server that is silent is noticed at once
    threads = config.ingest.threads or config.threads
    found = ingest.survey(dataclasses.replace(config.ingest, data=config.data, seed=config.seed, threads=threads))
    if not found.held:
        wanted = "ingest.holdout=0" if config.ingest.holdout == 0 else f"a fifth of {found.rows} rows"
        raise UserError(f"{wanted} leaves nothing to evaluate with: give ingest.holdout=, a number of rows or a share")
    return found


def check_rows(config: RunConfig, rows: int, answers: int | None = None, held: int | None = None) -> int:
    """Whether this pool can give what the budget, the warm-up and a fine-tuning step want.

    The pool that is selected from is what the holdout leaves, with the planted copies.

    Args:
        config: of the whole run.
        rows: how many come in, before the holdout.
        answers: UTF-8 bytes of their answers; None: not known yet, and a budget of tokens is believed.
        held: rows that go into the holdout, or that are duplicates of such; None: not known yet, and reckoned.

    Returns:
        Rows that are selected, for a budget of tokens about.

    Raises:
        UserError: it cannot; names the largest that is possible.
    """
    from selectmoe.division import holdout_size
    from selectmoe.picking import most_rows

    share = config.ingest.plant.share
    held = holdout_size(config.ingest.holdout, rows) if held is None else held
    n = rows - held + round(share * (rows - held) / (1 - share))
    drop = config.select.parts()["drop"] if config.select.method in CLUSTERED else 0.0
    most = most_rows(n, drop)
    wanted = _wanted(config, rows, n, most, answers)
    if wanted > most:
        filtered = f", of which picking leaves {most} (filter.drop={drop:g})" if drop else ""
        raise UserError(
            f"budget={config.budget} is {wanted} rows, but the pool has {n} ({rows} read, {held} held out){filtered}: "
            "take a smaller budget or more rows"
        )
    if config.warmup.training.rows > n:
        raise UserError(f"warmup.training.rows={config.warmup.training.rows}: the pool has {n} rows")
    check_batch(config, wanted)
    return wanted


def _wanted(config: RunConfig, rows: int, n: int, most: int, answers: int | None) -> int:
    """Rows that the budget comes to, of `n` in the pool; of a budget of tokens an estimate, at most `most`."""
    from selectmoe.estimate import BYTES_PER_TOKEN
    from selectmoe.picking import target_rows
    from selectmoe.run import parse_budget

    key, value = next(iter(parse_budget(config.budget).items()))
    if key == "selection_rows":
        return int(value)
    if key == "selection_percentage":
        return target_rows(n, float(value))
    if answers is None:
        return most
    if value > answers + rows:  # a token is a byte at least, and one ends every answer
        raise UserError(f"budget={config.budget}: the answers of data={config.data} have {answers} bytes in all")
    per_row = max(1.0, answers / BYTES_PER_TOKEN) / rows
    return max(1, min(most, round(float(value) / per_row)))


def check_batch(config: RunConfig, rows: int) -> None:
    """Whether the target batch of a fine-tuning is possible: whole micro-batches on every device, enough rows for one.

    Raises:
        UserError: it is not.
    """
    t = config.finetune.training
    devices = max(1, config.accelerator.count)
    if t.per_device_batch_size * devices > t.batch_size:
        raise UserError(
            f"finetune.training.batch_size={t.batch_size} is less than {devices} accelerators x per_device_batch_size="
            f"{t.per_device_batch_size}: no step could be shared out; raise the first or lower one of the others"
        )
    if t.batch_size > rows:
        raise UserError(
            f"finetune.training.batch_size={t.batch_size} is more than the {rows} rows that budget={config.budget} "
            f"selects: lower it to {rows} or less, or raise the budget"
        )


def check_tasks(config: RunConfig) -> None:
    """Whether lm-eval, or the folder of local tasks, knows every task; lm-eval is imported only if one is named.

    Raises:
        UserError: it does not.
    """
    folder, tasks = config.evaluate.include_path, config.evaluate.tasks
    if folder and not Path(folder).is_dir():
        raise UserError(f"evaluate.include_path={folder} is no folder: give a local folder of lm-eval task files")
    if tasks:
        from selectmoe.evaluate import task_manager

        task_manager(tasks, folder)


def check_mlflow(config: RunConfig) -> None:
    """Whether MLflow answers and keeps artifacts; where none is named nothing is asked.

    Raises:
        UserError: it does not, or `mlflow.required=true` and no server is named.
    """
    if config.mlflow.required is False:
        return
    if enabled():
        from selectmoe import tracking

        try:
            tracking.prove(os.environ["MLFLOW_TRACKING_URI"])
        except UserError as error:
            raise UserError(f"{error} (mlflow.required=false goes on without this proof)") from None
    elif config.mlflow.required:
        raise UserError(
            "mlflow.required=true, but MLFLOW_TRACKING_URI is not set: set it to the MLflow server's address"
        )


def check_places(config: RunConfig) -> None:
    """Whether the local folders that are written to can be made and written.

    Raises:
        UserError: one is, or lies below, a file, or may not be written.
    """
    for name, path in local_places(config).items():
        there = existing(path)
        if not there.is_dir():
            raise UserError(f"{name}={path}: {there} is a file: choose a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{name}={path}: {there} may not be written by this user: choose another folder")


def check_disk(config: RunConfig, needed: Mapping[str, int]) -> None:
    """Whether the disks have room for what will be written; places on one disk are added up.

    Args:
        config: of the whole run.
        needed: bytes by the key of the place.

    Raises:
        UserError: they have not.
    """
    disks: dict[int, dict[str, Path]] = {}
    for name, path in local_places(config).items():
        disks.setdefault(existing(path).stat().st_dev, {})[name] = path
    for places in disks.values():
        wanted = sum(needed[name] for name in places)
        free = shutil.disk_usage(existing(next(iter(places.values())))).free
        if wanted > free:
            named = ", ".join(f"{name}={path}" for name, path in places.items())
            raise UserError(
                f"{named}: about {wanted / 1e9:.1f} GB will be written, the disk has {free / 1e9:.1f} GB free: make room, or "
                "choose another place"
            )


def local_places(config: RunConfig) -> dict[str, Path]:
    """Key -> folder of what is written to a local disk."""
    output = config.output_dir  # which checkpoints that go to S3 pass through as well
    named = {"output_dir": output, "work_root": config.work_root or output, "model_root": config.model_root or output}
    if config.model_root.startswith("s3://"):
        named["model_root"] = output
    return {name: Path(path) for name, path in named.items() if not path.startswith("s3://")}


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def read_model(source: Source, headers: bool = True) -> Model:
    """Sizes of a checkpoint.

    Args:
        source: the checkpoint.
        headers: whether to read those of its safetensors files, which say how long they must be; without, its config and
            the sizes of the files tell.

    Raises:
        UserError: a file is damaged or not whole.
    """
    size = sum(file.stat().st_size for file in source.shards)
    width = 4 if "float32" in (source.config.get("dtype"), source.config.get("torch_dtype")) else 2
    parameters = sum(count_parameters(file) for file in source.shards) if headers else size // width
    return Model(parameters, size, source.config)


def count_parameters(file: Path) -> int:
    """Number of parameters in a safetensors file, from its header, which also says how long the file must be."""
    return sum(math.prod(tensor.shape) for tensor in read_header(file).values())
