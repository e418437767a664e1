"""Objects of an S3 bucket to files: parallel, resumable, verified.

No command runs this module; `selectmoe.storage` does. A file arrives in parts of `PART` bytes in `.NAME.part`, and
`.NAME.part.json` says which parts are there; a break goes on where the body broke, a killed process at the last whole
part. Every answer must be of the version (ETag) that the first one was of: servers exist that ignore `If-Match`, so the
answer is looked at too. The name appears when everything is there and its SHA-256 is the one that is known.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError
from selectmoe.manifest import sha256_file
from selectmoe.progress import transfer

PART = 16 << 20
PARALLEL = 8
ATTEMPTS = 10
"""Requests, and breaks of a body without a byte of progress, before it is an error."""
CHUNK = 1 << 20
DIGEST = "sha256"
"""The key of the object metadata in which we keep a file's SHA-256."""


class Changed(Exception):
    """The object is not the one whose first part was read."""


class Damaged(Exception):
    """What arrived does not have the SHA-256 that is known."""


@dataclass(frozen=True)
class Wanted:
    """An object and the file that it is to become; `sha256` where it is known."""

    key: str
    path: Path
    size: int
    etag: str
    sha256: str = ""


def back_off(failures: int) -> None:
    """Wait before the next try: exponential, at most 10 s, with full jitter."""
    time.sleep(random.random() * min(10.0, 0.1 * 2**failures))


def stream(
    client: Any,
    bucket: str,
    key: str,
    write: Callable[[int, bytes], object],
    span: tuple[int, int] | None = None,
    etag: str = "",
    same: Callable[[dict[str, Any]], bool] = lambda answer: True,
) -> dict[str, str]:
    """Read an object, or a span of it; where a body breaks, ask for the rest.

    Args:
        client: of boto3; its own retries cover everything up to the first byte of a body.
        bucket: the bucket.
        key: the object.
        write: takes each offset and the bytes there.
        span: first byte and the byte after the last; default: everything.
        etag: version of the object, where it is known.
        same: whether an answer's headers are of the object that is meant, beyond what its ETag says.

    Returns:
        The object's metadata, names in lower case.

    Raises:
        Changed: the object is another one than `etag` and `same` say, or became another one.
        botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError: after `ATTEMPTS` failures in a row.
    """
    from botocore.exceptions import ClientError
    from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS
    from urllib3.exceptions import HTTPError

    at, stop = span or (0, None)
    failures = 0
    metadata: dict[str, str] = {}
    while stop is None or at < stop:
        where: dict[str, str] = {"Range": f"bytes={at}-{stop - 1}"} if stop is not None else {}
        if etag.strip('"'):
            where["IfMatch"] = etag
        try:
            answer = client.get_object(Bucket=bucket, Key=key, **where)
            if (etag and answer["ETag"] != etag) or not same(answer):
                raise Changed(key)
            etag = answer["ETag"]
            metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
            if stop is None:
                stop = answer["ContentLength"]
            skip = at if "Range" in where and not answer.get("ContentRange") else 0  # a server without ranges sends all
            for chunk in answer["Body"].iter_chunks(CHUNK):
                useful = chunk[skip:][: stop - at]
                skip -= min(skip, len(chunk))
                write(at, useful)
                at += len(useful)
                failures = 0 if useful else failures
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                raise Changed(key) from None
            raise
        except (*S3_RETRYABLE_DOWNLOAD_ERRORS, HTTPError):  # the latter: a break in the body of an error's answer
            failures += 1
            if failures >= ATTEMPTS:
                raise
            back_off(failures)
    return metadata


@dataclass(eq=False)
class _File:
    """One file under way."""

    wanted: Wanted
    done: set[int] = field(default_factory=set)
    resumed: bool = False
    sha256: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def part(self) -> Path:
        return self.wanted.path.with_name(f".{self.wanted.path.name}.part")

    @property
    def journal(self) -> Path:
        return self.wanted.path.with_name(f".{self.wanted.path.name}.part.json")

    @property
    def starts(self) -> range:
        """The first byte of every part; an empty file has one empty part."""
        return range(0, self.wanted.size or 1, PART)

    def open(self) -> None:
        """Find what an earlier process left of the same version, or begin."""
        self.wanted.path.parent.mkdir(parents=True, exist_ok=True)
        version = [self.wanted.size, self.wanted.etag]
        if self.part.is_file() and self.journal.is_file():
            found = json.loads(self.journal.read_text(encoding="utf-8"))
            if found["version"] == version and found["part"] == PART:
                self.done, self.sha256 = set(found["done"]), found["sha256"]
                self.resumed = bool(self.done)
        if not self.resumed:
            self.clear()
            self.part.touch()

    def clear(self) -> None:
        """Forget what was there."""
        self.part.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def fetch(self, client: Any, bucket: str, start: int, moved: Callable[[int], None]) -> bool:
        """Bring one part.

        Returns:
            Whether it was the last one that was missing.
        """
        wanted = self.wanted
        stop = min(start + PART, wanted.size)
        with open(self.part, "r+b") as file:

            def write(at: int, data: bytes) -> None:
                os.pwrite(file.fileno(), data, at)
                moved(len(data))

            metadata = stream(client, bucket, wanted.key, write, (start, stop), wanted.etag)
        with self.lock:
            self.done.add(start)
            self.sha256 = self.sha256 or metadata.get(DIGEST, "")
            if len(self.starts) > 1:
                self._note()
            return len(self.done) == len(self.starts)

    def _note(self) -> None:
        entry = {
            "version": [self.wanted.size, self.wanted.etag],
            "part": PART,
            "done": sorted(self.done),
            "sha256": self.sha256,
        }
        temporary = self.journal.with_name(self.journal.name + ".new")
        temporary.write_text(json.dumps(entry), encoding="utf-8")
        temporary.rename(self.journal)

    def finish(self) -> None:
        """Verify, and give the file its name.

        Raises:
            Damaged: the bytes are not those that were expected; nothing is left behind.
        """
        expected = self.wanted.sha256 or self.sha256
        right = self.part.stat().st_size == self.wanted.size
        if right and expected:
            right = sha256_file(self.part) == expected
        if not right:
            self.clear()
            raise Damaged(self.wanted.key)
        self.part.rename(self.wanted.path)
        self.journal.unlink(missing_ok=True)


def download(
    client: Any, bucket: str, files: list[Wanted], desc: str, again: Callable[[Wanted], Wanted | None]
) -> None:
    """Bring files, several parts at a time; what an earlier call left unfinished is gone on with.

    Args:
        client: of boto3.
        bucket: the bucket.
        files: what is wanted.
        desc: for the progress bar.
        again: gives a file's present version, for one that changed meanwhile; None where it is gone.

    Raises:
        UserError: an object is gone, keeps changing, or does not have the SHA-256 that is known.
    """
    for _ in range(2):
        failed = _round(client, bucket, files, desc)
        if not failed:
            return
        current = [again(file.wanted) for file in failed]
        if missing := [file.wanted.key for file, found in zip(failed, current) if found is None]:
            raise UserError(f"s3://{bucket}/{missing[0]} was removed while it was read")
        files = [found for found in current if found is not None]
    raise UserError(
        f"s3://{bucket}/{files[0].key} does not have the bytes that are expected, or changes while it is read"
    )


def _round(client: Any, bucket: str, files: list[Wanted], desc: str) -> list[_File]:
    """Every part that is missing; returns the files that must be read again."""
    under_way = [_File(wanted) for wanted in files]
    failed: list[_File] = []
    for file in under_way:
        file.open()
    jobs = [(file, start) for file in under_way for start in file.starts if start not in file.done]
    total = sum(min(PART, file.wanted.size - start) for file, start in jobs)

    def bring(file: _File, start: int, moved: Callable[[int], None]) -> None:
        if file in failed:
            return
        try:
            if file.fetch(client, bucket, start, moved):
                file.finish()
        except (Changed, Damaged):
            with file.lock:
                if file not in failed:
                    failed.append(file)

    for file in under_way:  # every part was there, but the process was killed before the end
        if len(file.done) == len(file.starts):
            try:
                file.finish()
            except Damaged:
                failed.append(file)
    with transfer(desc, total) as moved, ThreadPoolExecutor(PARALLEL) as pool:
        futures = [pool.submit(bring, file, start, moved) for file, start in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed
