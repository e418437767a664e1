"""What goes to MLflow while something runs: noted in the journal, sent by a thread beside the work.

    selectmoe sync WORK_ROOT        # send what MLflow missed

Nothing is noted unless `MLFLOW_TRACKING_URI` is set. MLflow being slow, away or refusing costs no work and no exit
status: the journal (`selectmoe/journal.py`) keeps what was not sent, and `sync` sends it. `selectmoe/tracking.py`
speaks to MLflow; it is imported by the thread, since that takes seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import journal
from selectmoe import manifest as mf
from selectmoe.config import StageConfig, values
from selectmoe.errors import UserError
from selectmoe.journal import enabled
from selectmoe.storage import open_store

if TYPE_CHECKING:
    from selectmoe.tracking import Delivery

DEFER = "SELECTMOE_DEFER"
"""Environment variable: set where tasks leave the sending to the process that started them."""
PATIENCE = "SELECTMOE_MLFLOW_PATIENCE"
"""Environment variable: seconds that the end of a task waits for an MLflow that does not answer (30)."""
SEND_SECONDS = 3.0
AWAY_SECONDS = 15.0
"""Pause between two attempts: at first, and at most, while MLflow does not answer."""


def start_parent(name: str, params: Mapping[str, Any], work_root: str, key: str = "") -> str:
    """Note the parent run of a pipeline: a new one, or the one that has the same key (the same work, started again).

    Args:
        name: shown in MLflow.
        params: the configuration of the run, nested or flat.
        work_root: whose journal takes it.
        key: digest of what is to be done; empty: always a new run.

    Returns:
        The reference by which tasks name it (`SELECTMOE_PARENT_RUN`).
    """
    key = key or secrets.token_hex(16)
    record = {"do": "parent", "key": key, "name": name, "params": dict(params), "tags": journal.context()}
    journal.note(work_root, record | {"ms": journal.now()})
    return f"key:{key}"


def finish_parent(parent: str, work_root: str, *, failed: bool = False, tags: Mapping[str, str] | None = None) -> None:
    """Note the end of a parent run.

    Args:
        parent: what `start_parent` returned.
        work_root: whose journal takes it.
        failed: whether the pipeline failed.
        tags: what is to be seen at a glance, the verdict above all.
    """
    status = "FAILED" if failed else "FINISHED"
    journal.note(work_root, {"do": "parent_end", "parent": parent, "status": status, "tags": dict(tags or {})})


def submit(output_dir: Path | str, work_root: str, parent: str = "") -> None:
    """Note a finished stage's output in the journal; a `Sender`, here or in another process, sends it.

    Args:
        output_dir: a finished output.
        work_root: whose journal takes it.
        parent: reference of the run that it belongs below; default: the environment's.
    """
    if enabled():
        family = journal.family()
        record = {"do": "output", "output_dir": str(Path(output_dir).resolve()), "tags": journal.context()}
        journal.note(work_root, record | family | ({"parent": parent} if parent else {}))


@contextmanager
def sending(work_root: str) -> Iterator[Sender | None]:
    """Send the journal in a thread while something runs; nothing where there is no MLflow, or another process sends.

    At the end an MLflow that does not answer is waited for (`PATIENCE`); then what it has to get stays in the journal,
    with the files where the work root is an object store, since a pod's disk goes with it.
    """
    if not enabled() or os.environ.get(DEFER):
        yield None
        return
    remote = work_root.startswith("s3://")
    sender = Sender(work_root, journal.WRITER if remote else "")
    sender.start()
    try:
        yield sender
    finally:
        error = sender.close(float(os.environ.get(PATIENCE, "30")))
        if error:
            if remote:
                _keep_files(work_root)
            print(f"MLflow did not take everything ({error}); the results are safe", file=sys.stderr)
            print(f"when it is back: selectmoe sync {work_root}", file=sys.stderr)


@contextmanager
def command(name: str, config: StageConfig) -> Iterator[None]:
    """Tell MLflow what a command of the shell does: a stage is a run of its own, `run` a parent and a run per stage.

    The journal lies in the work root that was given, else in `OUTPUT_DIR/logs`.

    Args:
        name: of the stage, or `run`.
        config: its configuration.
    """
    if not enabled():
        yield
        return
    place = Path(config.output_dir).resolve()
    remote = config.output_dir.startswith("s3://")
    root = config.work_root or (f"{config.output_dir.rstrip('/')}/.work" if remote else str(place / "logs"))
    parent, told = "", {journal.ROOT: root}
    if name == "run":
        settings = values(config, "identity", "execution", "input")
        parent = start_parent(f"run {place.name}", settings, root, mf.digest([str(place), settings]))
        told[journal.PARENT] = parent
    tags: dict[str, str] = {}
    mistaken, failed = False, True
    with sending(root), _environment(told):
        try:
            yield
            failed = False
        except UserError:  # nothing was done, and what lies there is somebody else's
            mistaken = True
            raise
        finally:  # also where the answer is no, or a later stage failed
            for output in [] if mistaken else outputs(place):
                submit(output, root)
                tags |= verdict_tags(output)
            if parent:
                finish_parent(parent, root, failed=failed, tags=tags)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """These variables are set inside of it."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def outputs(place: Path) -> list[Path]:
    """The finished outputs at or below a folder; what lies inside another one is part of it."""
    found = [path for path, _ in mf.find_manifests(place)] if place.is_dir() else []
    return [path for path in found if not {*path.parents} & {*found}]


def verdict_tags(report: Path) -> dict[str, str]:
    """What a report's run is to show at a glance; empty for other outputs."""
    file = report / "results.json"
    if not file.is_file():
        return {}
    results = json.loads(file.read_text(encoding="utf-8"))
    return {key: str(results["verdict"][key]) for key in ("verdict", "metric")} | {"sentence": results["sentence"]}


class Sender:
    """A thread that takes a journal to MLflow, in batches, as long as something runs.

    Args:
        work_root: whose journal.
        writer: only what this process wrote (`journal.WRITER`); default everything.
    """

    def __init__(self, work_root: str, writer: str = "") -> None:
        self.work_root = work_root
        self.writer = writer
        self.over = threading.Event()
        self.error = ""
        self.deadline = float("inf")
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self.thread.start()

    def close(self, patience: float) -> str:
        """Send the rest.

        Args:
            patience: seconds to wait for an MLflow that does not answer.

        Returns:
            Why something could not be sent; empty where all was.
        """
        self.deadline = time.monotonic() + patience
        self.over.set()
        self.thread.join(patience + 5.0)
        if self.thread.is_alive():  # in a request without an answer; the thread ends with the process
            return self.error or "it does not answer"
        return self.error

    def _run(self) -> None:
        from selectmoe.tracking import Delivery

        delivery = Delivery(self.work_root, self.writer)
        pause = SEND_SECONDS
        while True:
            last = self.over.is_set()
            self._attempt(delivery)
            if last and (not self.error or time.monotonic() + SEND_SECONDS > self.deadline):
                return
            if last:
                time.sleep(SEND_SECONDS)
                continue
            pause = min(pause * 2, AWAY_SECONDS) if self.error else SEND_SECONDS
            self.over.wait(pause)

    def _attempt(self, delivery: Delivery) -> None:
        before = self.error
        try:
            _, self.error = delivery.send()
        except Exception as error:  # a sender must not end while the work goes on: said, and tried again
            self.error = f"{type(error).__name__}: {str(error)[:200]}"
        if self.error and not before:
            print(f"MLflow does not take what it is sent ({self.error}): kept in the journal", file=sys.stderr)
        elif before and not self.error:
            print("MLflow answers again", file=sys.stderr)


def sync(work_root: str) -> int:
    """Send everything that a work root's journal holds.

    Returns:
        How many outputs were sent.

    Raises:
        UserError: no MLflow is named, or something could not be sent.
    """
    if not enabled():
        raise UserError("MLFLOW_TRACKING_URI is not set: set it to the address of the MLflow server")
    from selectmoe.tracking import Delivery

    sent, error = Delivery(work_root).send()
    if error:
        raise UserError(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} did not take everything: {error}")
    return sent


def _keep_files(work_root: str) -> None:
    """Put the files of this process's outputs that were not sent beside the journal."""
    from selectmoe.uploads import uploads

    store = open_store(journal.place(work_root))
    for name in journal.names(work_root, journal.WRITER):
        records, _ = journal.read(work_root, name)
        if records[0]["do"] != "output" or "kept" in records[0]:
            continue
        output = Path(records[0]["output_dir"])
        folder = name.removesuffix(".jsonl")
        for path in [output / mf.NAME, *uploads(output, mf.read_manifest(output, verify=False))]:
            store.put_file(f"{folder}/{path.relative_to(output).as_posix()}", path)
        store.put_bytes(name, mf.canonical_json(records[0] | {"kept": folder}) + b"\n")
