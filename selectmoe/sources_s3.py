"""Rows on S3 as sources: listed, read in ranges, several ranges and objects at the same time, nothing kept on disk.

    selectmoe ingest data=s3://bucket/prefix output_dir=out/ingest
    selectmoe ingest dataset.dataset_from=s3 dataset.s3.data_dir=s3://bucket/prefix output_dir=out/ingest

Below the prefix it looks as in a local folder: `NAME/*.jsonl`, `NAME.jsonl`; the same bytes have the same identity there
and here. An open object holds at most `HELD` blocks of `BLOCK` bytes. Every range is asked for by the version (ETag)
that the listing named, and every answer's ETag and length (where a server makes no ETags: length and time) is looked at,
since some servers ignore the question: an object that changes while it is read is an error. A broken connection is tried again, and goes on where it broke (`selectmoe.download`).

An input's identity is the digest of its bytes, so the first run over an object reads it twice: to digest it, then for its
rows. The digest is noted in the cache's folder under the object's version, and later runs read it once.
`dataset.s3.download` brings everything to the cache first instead: once over the network, and room on the disk for it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from selectmoe import cache, download
from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import digest
from selectmoe.progress import transfer
from selectmoe.s3 import explained, s3_client
from selectmoe.sources import Dataset, check_names, compression_of, kind_of, stem_of
from selectmoe.storage import Entry, LocalStore, S3Store

BLOCK = 2 << 20
"""Bytes of one range."""
AHEAD = 4
"""Ranges that are asked for before they are needed, where a file is read from front to back."""
HELD = 10
"""Blocks that an open object holds at most; a table's columns are read in turn, each from a place of its own."""
OBJECTS = 4
"""Objects that are digested at the same time."""


@dataclass(frozen=True)
class S3Object:
    """One object, in the version that was listed."""

    bucket: str
    key: str
    place: str
    size: int
    etag: str
    modified: str

    @property
    def uri(self) -> str:
        """Where it lies."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def kind(self) -> str:
        """As of a local file, by its name."""
        return kind_of(Path(self.key))

    @property
    def compression(self) -> str:
        """As of a local file, by its name."""
        return compression_of(Path(self.key))

    def open(self, end: int | None = None) -> IO[bytes]:
        """Its bytes.

        Args:
            end: nothing beyond this place is fetched before it is asked for.

        Raises:
            UserError, Unavailable: when they are read, as `Ranges`.
        """
        return io.BufferedReader(Ranges(self, end), 1 << 18)

    def check(self) -> None:
        """Nothing is left to be proved: every range was asked for by its version."""

    def is_of(self, answer: dict[str, Any]) -> bool:
        """Whether an answer's headers are of this version: by its length, and by its time where there is no ETag."""
        total = str(answer.get("ContentRange", "")).rpartition("/")[2] or str(answer["ContentLength"])
        timely = bool(self.etag.strip('"')) or answer["LastModified"].isoformat()[:19] == self.modified[:19]
        return total == str(self.size) and timely

    def is_there(self) -> bool:
        """Whether this version is still the one that is listed."""
        parent, _, name = self.uri.rpartition("/")
        found = S3Store(parent).stat(name)
        return found is not None and (found.size, found.etag, found.modified) == (self.size, self.etag, self.modified)

    def sha256(self) -> str:
        """Of its bytes: noted by an earlier run, or read now.

        Raises:
            UserError, Unavailable: it cannot be read, or the note not be written.
        """
        name = digest([self.bucket, self.key, self.size, self.etag, self.modified])
        notes = LocalStore(cache.root() / "objects")
        if noted := notes.get(name):
            return noted.decode()
        with self.open() as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        try:
            notes.put_bytes(name, found.encode())
        except OSError as error:
            raise UserError(
                f"the cache {cache.root()} cannot be written ({error.strerror}): set {cache.CACHE}"
            ) from None
        return found


class Ranges(io.RawIOBase):
    """An object as a file that can seek; the blocks that come next are on their way while one is read."""

    def __init__(self, source: S3Object, end: int | None = None) -> None:
        super().__init__()
        self.source = source
        self._last_ahead = (min(source.size, source.size if end is None else end) - 1) // BLOCK
        self._at = 0
        self._last = -1
        self._threads = ThreadPoolExecutor(AHEAD)
        self._blocks: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.source.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most to the end of a block.

        Raises:
            UserError: the object changed or is gone, or S3 refuses.
            Unavailable: the server does not answer, after retries.
        """
        if self._at >= self.source.size:
            return 0
        number, inside = divmod(self._at, BLOCK)
        data = memoryview(self._block(number))[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        ahead = range(number + 1, number + 1 + AHEAD) if number in (self._last, self._last + 1) else range(0)
        self._last = number
        for wanted in (*(n for n in ahead if n <= self._last_ahead), number):
            found = self._blocks.pop(wanted, None)  # the newest stand last
            self._blocks[wanted] = found or self._threads.submit(fetch, self.source, wanted)
        while len(self._blocks) > HELD:
            self._blocks.pop(next(iter(self._blocks))).cancel()
        return self._blocks[number].result()

    def close(self) -> None:
        """Forget what is on its way."""
        if not self.closed:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._blocks.clear()
        super().close()


def fetch(source: S3Object, number: int) -> bytes:
    """One block of an object.

    Raises:
        UserError: the object changed or is gone, or S3 refuses.
        Unavailable: the server does not answer, after retries.
    """
    from botocore.exceptions import ClientError

    span = (number * BLOCK, min((number + 1) * BLOCK, source.size))
    data = bytearray()
    changed = UserError(f"{source.uri} was changed or removed while it was read: start again")
    with explained(source.uri):
        try:
            download.stream(
                _client(),
                source.bucket,
                source.key,
                lambda _, more: data.extend(more),
                span,
                source.etag,
                source.is_of,
            )
        except download.Changed:
            raise changed from None
        except ClientError as error:  # of a range that is not there any more, servers say different things
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 404, 416) and not source.is_there():
                raise changed from None
            raise
    return bytes(data)


_making = threading.Lock()


def _client() -> Any:
    """The client of this process, for the credentials and endpoint of this moment; threads share it."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _making:
        return _client_of(os.getpid(), settings)


@functools.lru_cache(maxsize=1)
def _client_of(process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    return s3_client()


def objects_at(uri: str, key: str) -> tuple[list[S3Object], bool]:
    """The objects below a prefix, or the one object of that name; by name.

    Args:
        uri: ``s3://bucket/prefix``.
        key: the configuration key that named it, for messages.

    Returns:
        The objects, and whether it is a single one.

    Raises:
        UserError: there is nothing, an object's name is no file's, or S3 refuses.
        Unavailable: the server does not answer, after retries.
    """
    uri = uri.rstrip("/")
    store, single = S3Store(uri), ""
    entries = store.entries()
    if not entries:
        parent, _, single = uri.rpartition("/")
        if parent != "s3:/":
            store = S3Store(parent)
            entries = [entry] if (entry := store.stat(single)) else []
    if not entries:
        raise UserError(f"{key}={uri} does not exist: there is no object of that name, and none below it")
    for entry in entries:
        if ".." in entry.name.split("/") or Path(entry.name).as_posix() != entry.name:
            raise UserError(f"{uri} holds an object {entry.name!r}, which is no file name: remove it")
    return [_object(store, entry) for entry in entries], bool(single)


def _object(store: S3Store, entry: Entry) -> S3Object:
    return S3Object(store.bucket, store.prefix + entry.name, entry.name, entry.size, entry.etag, entry.modified)


def identify(objects: Sequence[S3Object], inside: str, desc: str) -> str:
    """The identity that the same bytes have in a local folder, or file (`manifest.tree_identity`).

    Args:
        objects: all that is there.
        inside: the folder, with its slash, in which they are; or the single object's place.
        desc: where they lie, for the progress bar.

    Raises:
        UserError, Unavailable: one cannot be read.
    """
    with transfer(f"digesting {desc}", sum(o.size for o in objects)) as moved, ThreadPoolExecutor(OBJECTS) as threads:

        def sha256(one: S3Object) -> str:
            found = one.sha256()
            moved(one.size)
            return found

        digests = list(threads.map(sha256, objects))
    return digest(sorted([one.place.removeprefix(inside), found] for one, found in zip(objects, digests, strict=True)))


def data_identity(uri: str, key: str) -> str:
    """The identity of everything at a URI, as `manifest.tree_identity` of a local copy.

    Raises:
        UserError, Unavailable: as `objects_at`, or one cannot be read.
    """
    objects, single = objects_at(uri, key)
    return identify(objects, objects[0].place if single else "", uri)


def s3_datasets(uri: str, key: str, names: Sequence[str] = ()) -> dict[str, Dataset]:
    """The datasets below a prefix, or in an object.

    Args:
        uri: ``s3://bucket/prefix``.
        key: the configuration key that named it, for messages.
        names: which datasets; default: all.

    Raises:
        UserError: as `sources.find`.
        Unavailable: the server does not answer, after retries.
    """
    objects, single = objects_at(uri, key)
    if single and not objects[0].kind:
        raise UserError(f"{key}={uri} is none of .jsonl, .json (either also .gz or .zst) and .parquet")
    if any(one.place == MANIFEST for one in objects):
        raise UserError(f"{key}={uri} is an output of Select-MoE already: give it to the next stage as data=")
    found: dict[str, str] = {}
    below: defaultdict[str, list[S3Object]] = defaultdict(list)
    for one in objects:
        first, slash, _ = one.place.partition("/")
        inside = first + slash
        below[inside].append(one)
        if first.startswith(".") or not (slash or one.kind):
            continue
        name = first if slash else stem_of(Path(first))
        if found.setdefault(name, inside) != inside:
            raise UserError(f"{uri}/{found[name]} and {uri}/{inside} are both called {name}: rename one")
    wanted = check_names(names, found, uri)
    if not wanted:
        raise UserError(
            f"{key}={uri} holds no dataset: expected NAME/*.jsonl or NAME.jsonl (also .json, .parquet, .gz)"
        )
    return {name: _dataset(name, uri, found[name], below[found[name]], single) for name in wanted}


def _dataset(name: str, uri: str, inside: str, objects: Sequence[S3Object], single: bool) -> Dataset:
    place = uri.rstrip("/") if single else f"{uri.rstrip('/')}/{inside.rstrip('/')}"
    folder = inside if inside.endswith("/") else ""
    rows = [_inside(one, folder) for one in objects if one.kind and not _hidden(one.place)]
    if not rows:
        raise UserError(f"{place} holds no .jsonl, .json or .parquet file")
    return Dataset(name, place, lambda: identify(objects, inside, place), rows, several=not folder)


def _inside(one: S3Object, folder: str) -> S3Object:
    return S3Object(one.bucket, one.key, one.place.removeprefix(folder), one.size, one.etag, one.modified)


def _hidden(place: str) -> bool:
    return any(part.startswith(".") for part in place.split("/"))
