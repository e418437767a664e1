"""Remove what abandoned runs left below a work root: committed progress, unfinished outputs, old finished ones if told.

    selectmoe clean work_root=.selectmoe/work                # only says what would go
    selectmoe clean work_root=.selectmoe/work yes=true
    selectmoe clean work_root=s3://bucket/work older_than=1d yes=true

A work is abandoned when none of its files was written for `older_than`, and nobody holds its lock. What the journal
still has to send to MLflow is never removed: `selectmoe sync` sends it, and takes it away.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selectmoe import journal
from selectmoe import manifest as mf
from selectmoe.config import execution, input_
from selectmoe.errors import UserError
from selectmoe.storage import S3Store, open_store

FINISHED = "finished"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass
class CleanConfig:
    """Configuration of `clean`. Not a stage's: it writes nothing and has neither seed nor threads."""

    work_root: str = input_(doc="the folder or s3:// URI to clean")
    older_than: str = execution("7d", doc="younger work is never touched: a number with s, m, h or d")
    finished: bool = execution(False, doc="finished outputs, too; what needs them is computed again")
    yes: bool = execution(False, doc="remove; otherwise only say what would go")

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: `older_than` is no span of time, or there is no such folder.
        """
        if not re.fullmatch(r"\d+[smhd]", self.older_than):
            raise UserError(f"older_than={self.older_than} must be a number with s, m, h or d, such as 7d")
        if "://" not in self.work_root and not Path(self.work_root).is_dir():
            raise UserError(f"work_root={self.work_root} is not a folder")


@dataclass
class Work:
    """Something below a work root that goes as a whole."""

    name: str
    bytes: int
    written: float
    finished: bool


def run(config: CleanConfig) -> None:
    """Say what is abandoned, and remove it if told so.

    Raises:
        UserError: as `CleanConfig.validate`.
    """
    config.validate()
    limit = time.time() - int(config.older_than[:-1]) * UNITS[config.older_than[-1]]
    remote = config.work_root.startswith("s3://")
    found = _remote(config.work_root) if remote else _local(Path(config.work_root))
    old = [w for w in found if w.written < limit and (config.finished or not w.finished)]
    for work in old:
        age = (time.time() - work.written) / 86400
        print(f"{work.name}  {work.bytes / 1e6:.1f} MB, {age:.1f} days old{', finished' * work.finished}")
        if not config.yes:
            continue
        if remote:
            open_store(f"{config.work_root}/{work.name}").clear()
        else:
            shutil.rmtree(Path(config.work_root, work.name))
    total = sum(work.bytes for work in old) / 1e6
    verb = "removed" if config.yes else "would be removed (say yes=true)"
    print(f"{len(old)} works of {total:.1f} MB {verb}")


def _local(root: Path) -> Iterator[Work]:
    for folder in sorted(p for p in root.glob("*/*") if p.is_dir() and p.parent.name != journal.FOLDER):
        files = [p for p in folder.rglob("*") if p.is_file()]
        if any(p.name.endswith("lock") and _held(p) for p in files):
            continue
        stats = [p.stat() for p in [folder, *files]]
        finished = (folder / mf.NAME).is_file()
        yield Work(
            f"{folder.parent.name}/{folder.name}",
            sum(s.st_size for s in stats),
            max(s.st_mtime for s in stats),
            finished,
        )


def _held(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remote(uri: str) -> Iterator[Work]:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    works: dict[str, Work] = {}
    pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=store.prefix)
    for entry in (o for page in pages for o in page.get("Contents", [])):
        parts = entry["Key"][len(store.prefix) :].split("/")
        if len(parts) < 3 or parts[0] == journal.FOLDER:
            continue
        name = "/".join(parts[:2])
        work = works.setdefault(name, Work(name, 0, 0.0, False))
        work.bytes += entry["Size"]
        work.written = max(work.written, entry["LastModified"].timestamp())
        work.finished |= parts[0] == FINISHED and parts[2:] == [mf.NAME]
    yield from works.values()
