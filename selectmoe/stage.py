"""The frame of a stage: find a finished output, resume unfinished work, commit by a manifest written last.

No command runs this module; every stage's `run(config)` opens with `begin`::

    with stage.begin(STAGE, VERSION, config, inputs={"pool": pool_dir}) as out:
        if out.done:
            return out.path
        (out.staging / "result.jsonl").write_bytes(...)
        out.commit(rows_in=10, rows_out=9, dropped={"empty": 1})
    return out.path
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selectmoe import cache, distributed, journal
from selectmoe import manifest as mf
from selectmoe.config import MISSING, StageConfig, flatten, values
from selectmoe.errors import UserError
from selectmoe.storage import LocalStore, Store, open_store

METRICS = "metrics.jsonl"
RUN = "run"
"""Entry of a part's `config`: the whole configuration of the run that made it, by which it can be made again."""
PACKAGES = ("select-moe", "numpy", "pyarrow", "torch", "transformers", "tokenizers", "peft", "lm_eval")


class Output:
    """An output in the making, or a finished one that was found."""

    def __init__(self, path: Path, stage: str, version: int, config: StageConfig, inputs: dict[str, dict[str, str]]):
        self.path = path
        self.done = False
        self.leads = distributed.alone() or distributed.rank() == 0
        """Whether this process writes: of several that train together, the first."""
        self.stage = stage
        self.version = version
        self.inputs = inputs
        self.roles = {"identity": values(config, "identity"), "execution": values(config, "execution", "input")}
        ids = {name: entry["identity"] for name, entry in inputs.items()}
        self.key = mf.work_key(stage, version, self.roles["identity"], ids)
        root = config.work_root or str(path / ".work")
        self.work: Store = open_store(f"{root.rstrip('/')}/{stage}/{self.key}")
        self.staging = path / ".work" / "staging"
        self._started = time.monotonic()
        kept = json.loads(self.work.get(METRICS) or b"[]")
        self._metrics: dict[tuple[str, int | None], dict[str, Any]] = {(m["name"], m.get("step")): m for m in kept}
        self._threads = config.threads
        self._work_root = config.work_root
        self._journal: journal.StageJournal | None = None

    def finished(self) -> mf.Manifest | None:
        """The manifest of what lies there, finished and whole; None where nothing does.

        Raises:
            UserError: it is damaged.
        """
        return mf.read_manifest(self.path) if (self.path / mf.NAME).is_file() else None

    def announce(self) -> None:
        """Say that the stage begins, where there is an MLflow to be told."""
        run = {"key": self.key, "stage": self.stage, "params": self.roles["identity"], "tags": self._tags()}
        self._journal = journal.open_stage(self._work_root, run)

    def _tags(self) -> dict[str, str]:
        inputs = {f"input.{name}": entry["identity"] for name, entry in self.inputs.items()}
        named = {"stage": self.stage, "version": self.version, "work": self.key, **inputs}
        return {f"{journal.TAG}{name}": str(value) for name, value in named.items()}

    def over(self, failure: BaseException | None = None) -> None:
        """The stage is done, or failed; said once."""
        if self._journal is None:
            return
        if failure is None:  # `merge` only now knows whose output it wrote
            ids = {name: entry["identity"] for name, entry in self.inputs.items()}
            self.key = mf.work_key(self.stage, self.version, self.roles["identity"], ids)
            self._journal.close("FINISHED", tags=self._tags())
        else:
            status = "FAILED" if isinstance(failure, Exception) else "KILLED"
            self._journal.close(status, f"{type(failure).__name__}: {failure}")

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Record a number that a person wants to watch; it goes into metrics.jsonl and from there to MLflow.

        A step that is done again after a kill replaces its number.
        """
        entry: dict[str, Any] = {"name": name, "value": float(value), "time": time.time()}
        self._metrics[name, step] = entry if step is None else entry | {"step": step}
        if self._journal is not None:
            self._journal.metric(name, float(value), step)

    def keep_metrics(self) -> None:
        """Commit the numbers so far, so that a restart has them; called before the state that they lead up to."""
        self.work.put_bytes(METRICS, json.dumps(list(self._metrics.values())).encode())

    def has(self, name: str) -> bool:
        """Whether `keep` has made this file part of the output, here or before a kill."""
        return (self.staging / name).is_file()

    def keep(self, name: str) -> None:
        """Make ``NAME.part`` of the staging folder, wholly written and synced, a part of the output that outlives a kill."""
        (self.staging / f"{name}.part").rename(self.staging / name)

    @property
    def place(self) -> str:
        """Where the output goes, as the user named it."""
        return str(self.path)

    def part(
        self,
        name: str,
        *,
        rows_in: int,
        rows_out: int,
        dropped: Mapping[str, int] | None = None,
        config: Mapping[str, Any] | None = None,
        inputs: dict[str, dict[str, str]] | None = None,
        parts: Collection[str] = (),
    ) -> mf.Manifest:
        """Give the folder `name` inside the staging folder a manifest of its own.

        Args:
            name: the folder.
            rows_in: rows that came in.
            rows_out: rows that went out.
            dropped: reason -> number.
            config: the identity fields that concern it; default: the stage's.
            inputs: what it was made from ({"uri", "identity"} by name); default: the stage's inputs.
            parts: folders inside it that have manifests already, and belong to it too.

        Returns:
            The manifest.
        """
        roles: dict[str, Any] = self.roles
        if config is not None:
            whole = flatten(self.roles["identity"]) | flatten(self.roles["execution"])
            roles = {"identity": dict(config), "execution": {}, RUN: whole}
        mine = self.inputs if inputs is None else inputs
        return self._write(self.staging / name, rows_in, rows_out, dropped or {}, roles=roles, inputs=mine, parts=parts)

    def commit(
        self,
        *,
        rows_in: int = 0,
        rows_out: int = 0,
        dropped: Mapping[str, int] | None = None,
        bookkeeping: Iterable[str] = (),
        parts: Collection[str] = (),
    ) -> None:
        """Move the staged files into place, write the manifest, and drop the work that is now contained in it.

        Args:
            rows_in: rows that came in.
            rows_out: rows that went out.
            dropped: reason -> number; together with `rows_out` it must give `rows_in`.
            bookkeeping: globs of files that are checked but do not belong to the identity.
            parts: folders inside that have manifests already (`part`), and belong to the output too.
        """
        self._stage_metrics()
        for entry in sorted(self.staging.iterdir()):
            entry.rename(self.path / entry.name)
        self._write(self.path, rows_in, rows_out, dropped or {}, (*bookkeeping, METRICS), parts=parts)
        self.work.clear()
        shutil.rmtree(self.path / ".work", ignore_errors=True)

    def abandon(self, existed: bool) -> None:
        """After a user's mistake nothing is left behind.

        Args:
            existed: whether the folder was there before.
        """
        if (self.path / mf.NAME).is_file():
            return
        self.work.clear()
        shutil.rmtree(self.path / ".work", ignore_errors=True)
        if not existed and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _stage_metrics(self) -> None:
        if self._metrics:
            lines = "".join(json.dumps(m, sort_keys=True) + "\n" for m in self._metrics.values())
            (self.staging / METRICS).write_text(lines, encoding="utf-8")

    def _write(
        self,
        directory: Path,
        rows_in: int,
        rows_out: int,
        dropped: Mapping[str, int],
        globs: tuple[str, ...] = (),
        elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        roles: dict[str, Any] | None = None,
        inputs: dict[str, dict[str, str]] | None = None,
        parts: Collection[str] = (),
    ) -> mf.Manifest:
        dropped = {reason: n for reason, n in sorted(dropped.items()) if n}
        if rows_in != rows_out + sum(dropped.values()):
            raise RuntimeError(f"{self.stage}: {rows_in} rows in, {rows_out} out, dropped {dropped}: rows were lost")
        return mf.write_manifest(
            directory,
            stage=self.stage,
            version=self.version,
            config=self.roles if roles is None else roles,
            inputs=self.inputs if inputs is None else inputs,
            rows={"in": rows_in, "out": rows_out, "dropped": dropped},
            environment=self._environment(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            bookkeeping=globs,
            elsewhere=elsewhere,
            parts=parts,
        )

    def _environment(self) -> dict[str, Any]:
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_rss_bytes": peak_rss(),
            "versions": versions,
            "threads": self._threads or len(os.sched_getaffinity(0)),
            "processes": distributed.world(),
            "machine": platform.machine(),
        }


def peak_rss() -> int:
    """Peak resident bytes of this process; getrusage's number may be that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def input_entry(value: str | list[str]) -> dict[str, str]:
    """URI and identity of one input, or of a list whose order does not matter."""
    if isinstance(value, list):
        ids = sorted(cache.identity_of(v) for v in value)
        return {"uri": " ".join(value), "identity": mf.digest(ids)}
    return {"uri": value, "identity": cache.identity_of(value)}


def _entry(value: Any) -> dict[str, str]:
    if callable(value):
        value = value()
    if isinstance(value, dict):
        return value
    return input_entry([str(v) for v in value] if isinstance(value, list) else str(value))


@contextmanager
def begin(
    stage: str,
    version: int,
    config: StageConfig,
    inputs: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> Iterator[Output]:
    """Open the output of a stage.

    Of several processes that train together (`selectmoe.distributed`), the first opens it and tells the others what it
    found; all of them leave together.

    Args:
        stage: its name.
        version: of its algorithm; a change of result is a change of version.
        config: the stage's configuration.
        inputs: name -> path, list of paths (in any order), an entry that was made before ({"uri", "identity"}), a
            function that makes one, or an empty value (absent).
        resume: files that were kept (`Output.keep`) outlive a kill, and the output may go to ``s3://``, file by file.

    Yields:
        The output; `done` is True where it was finished before from the same inputs and configuration.

    Raises:
        UserError: an input is missing or damaged, or `output_dir` holds something else. Nothing is left behind.
    """
    if not config.output_dir or config.output_dir == MISSING:
        raise UserError("output_dir= is missing: name the folder to write")
    remote = resume and config.output_dir.startswith("s3://")
    if "://" in config.output_dir and not remote:
        raise UserError(f"output_dir={config.output_dir} must be a folder; work_root= may lie on S3")
    if distributed.alone() and distributed.world() > 1:
        raise UserError(f"{stage} runs in one process, but torchrun started {distributed.world()}: start it without")
    entries = distributed.from_first(lambda: {n: _entry(v) for n, v in (inputs or {}).items() if v})
    out: Output
    if remote:
        from selectmoe.stage_s3 import S3Output

        out = S3Output(stage, version, config, entries)
    else:
        out = Output(Path(config.output_dir), stage, version, config, entries)
    existed = out.path.is_dir()
    out.done = distributed.from_first(lambda: _open(out, resume))
    if out.done:
        yield out
        return
    try:
        yield out
    except BaseException as error:
        out.over(error)
        if isinstance(error, UserError) and out.leads:
            out.abandon(existed)
        raise
    out.over()
    distributed.wait()


def _open(out: Output, resume: bool) -> bool:
    """Prepare the folder and say that the stage begins; True where its output is there already."""
    found = out.finished()
    if found is not None:
        _same_work(out, found)
        return True
    _prepare(out.path, out, resume)
    out.announce()
    return False


def _same_work(out: Output, found: mf.Manifest) -> None:
    if found.key == out.key:
        return
    ours = {"stage": out.stage, "version": out.version, **flatten(out.roles["identity"])}
    theirs = {"stage": found.stage, "version": found.version, **flatten(found.config["identity"])}
    ours |= {f"input {n}": e["identity"][:12] for n, e in out.inputs.items()}
    theirs |= {f"input {n}": e["identity"][:12] for n, e in found.inputs.items()}
    differs = [
        f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here"
        for k in sorted(ours | theirs)
        if ours.get(k) != theirs.get(k)
    ]
    raise UserError(f"{out.place} holds another run's output ({'; '.join(differs[:3])}): choose another output_dir")


def _prepare(path: Path, out: Output, resume: bool) -> None:
    """A staging folder in an output folder that holds nothing of anybody else's."""
    mark = path / ".work" / "key"
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file")
    left = [p for p in path.iterdir() if p.name not in mf.RESERVED] if path.is_dir() else []
    if left and not (mark.is_file() and mark.read_text() == out.key):
        raise UserError(
            f"output_dir {path} holds {left[0].name}, which is not a finished output: choose another folder"
        )
    resume = resume and mark.is_file() and mark.read_text() == out.key
    if not resume:
        shutil.rmtree(out.staging, ignore_errors=True)
    try:
        out.staging.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, PermissionError) as error:
        raise UserError(f"output_dir {path} cannot be made: {error.strerror}; choose a folder you may write") from None
    for entry in left:  # moved into place by a commit that was killed before its manifest
        if resume:
            entry.rename(out.staging / entry.name)
        else:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in out.staging.glob("*.part"):  # what was being written
        entry.unlink()
    LocalStore(path / ".work").put_bytes("key", out.key.encode())
