"""Where committed progress and checkpoints lie: a folder or any S3 API (boto3), behind one small interface.

No command runs this module. Every put is atomic: a reader sees the whole object or none. Credentials come from the
environment only (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL_S3`) and are never printed.

What was sent is proved: an ETag that is the MD5 of what was read (or of its parts) says what the server has; where a
server makes its ETags otherwise, the object is read back. Its SHA-256 is kept in its metadata (`sha256`), and compared
by whoever reads it (`selectmoe.download`). boto3 retries and moves the parts of large files at the same time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selectmoe.download import ATTEMPTS, DIGEST, PARALLEL, PART, Wanted, download, stream
from selectmoe.errors import Unavailable, UserError
from selectmoe.manifest import sha256_file
from selectmoe.progress import transfer
from selectmoe.s3 import PATIENCE, explained, s3_client, split_s3

QUICK = {"attempts": 3, "patience": 5}
"""What a check gives a server: what is wrong is to be said within seconds."""


class Store(Protocol):
    """Named objects below one root."""

    def put_bytes(self, name: str, data: bytes) -> None: ...
    def put_file(self, name: str, path: Path | str) -> None: ...
    def get(self, name: str) -> bytes | None: ...
    def fetch(self, name: str, path: Path | str) -> bool: ...
    def names(self) -> list[str]: ...
    def delete(self, name: str) -> None: ...
    def clear(self) -> None: ...


class LocalStore:
    """Objects as files below a folder; written beside their place, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _place(self, name: str) -> tuple[Path, Path]:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, path.with_name(f".{path.name}.{os.getpid()}.part")

    def put_bytes(self, name: str, data: bytes) -> None:
        """Store `data` under `name`."""
        path, temporary = self._place(name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def put_file(self, name: str, path: Path | str) -> None:
        """Store a copy of a file under `name`."""
        target, temporary = self._place(name)
        _copy(path, temporary, target)

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def fetch(self, name: str, path: Path | str) -> bool:
        """Copy the object to a file; False where there is none."""
        source = self.root / name
        if not source.is_file():
            return False
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _copy(source, path.with_name(f".{path.name}.{os.getpid()}.part"), path)
        return True

    def names(self) -> list[str]:
        """All names, sorted; unfinished writes are not among them."""
        files = (p for p in self.root.rglob("*") if p.is_file() and not p.name.endswith(".part"))
        return sorted(p.relative_to(self.root).as_posix() for p in files)

    def delete(self, name: str) -> None:
        """Remove one object; no error where there is none."""
        (self.root / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything below the root, and the root."""
        shutil.rmtree(self.root, ignore_errors=True)


def _copy(source: Path | str, temporary: Path, target: Path) -> None:
    shutil.copyfile(source, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.rename(target)


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    name: str
    size: int
    etag: str
    modified: str


class S3Store:
    """Objects below ``s3://bucket/prefix``."""

    def __init__(self, uri: str, attempts: int = ATTEMPTS, patience: float = PATIENCE) -> None:
        self.bucket, prefix = split_s3(uri)
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        with explained(uri):
            self.client = s3_client(attempts, patience)

    def uri(self, name: str = "") -> str:
        """Where an object lies, or the root."""
        return f"s3://{self.bucket}/{self.prefix}{name}"

    def put_bytes(self, name: str, data: bytes) -> None:
        """Store `data` under `name`."""
        digest = hashlib.sha256(data).hexdigest()
        with explained(self.uri(name)):
            place = {"Bucket": self.bucket, "Key": self.prefix + name}
            answer = self.client.put_object(**place, Body=data, Metadata={DIGEST: digest})
            if "ETag" not in answer:
                raise UserError(f"{self.uri(name)}: what answers is no S3 server: is AWS_ENDPOINT_URL_S3 right?")
            if answer["ETag"].strip('"') != _md5(data):
                self._read_back(name, digest)

    def put_file(self, name: str, path: Path | str) -> None:
        """Store a copy of a file under `name`, a large one in parts at the same time."""
        size = os.path.getsize(path)
        if size < PART:
            self.put_bytes(name, Path(path).read_bytes())
            return
        with transfer(f"to {self.uri(name)}", size) as moved:
            self._put_large(name, Path(path), moved)

    def _put_large(self, name: str, path: Path, moved: Callable[[int], None]) -> None:
        digest = sha256_file(path)
        key = self.prefix + name
        with explained(self.uri(name)), ThreadPoolExecutor(1) as beside:
            parts = beside.submit(_md5_of_parts, path)
            self.client.upload_file(
                str(path),
                self.bucket,
                key,
                ExtraArgs={"Metadata": {DIGEST: digest}},
                Config=_transfer_config(),
                Callback=moved,
            )
            etag = self.client.head_object(Bucket=self.bucket, Key=key)["ETag"].strip('"')
            right = parts.result() == etag if "-" in etag else etag == _md5_of_file(path)
            if not right:
                self._read_back(name, digest)

    def put_files(self, files: dict[str, Path], desc: str) -> None:
        """Store many files: the small ones side by side, the large ones one after the other, each in parallel parts."""
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with transfer(desc, sum(sizes.values())) as moved, ThreadPoolExecutor(PARALLEL) as pool:

            def put(name: str) -> None:
                self.put_bytes(name, files[name].read_bytes())
                moved(sizes[name])

            list(pool.map(put, [name for name in files if sizes[name] < PART]))
            for name in files:
                if sizes[name] >= PART:
                    self._put_large(name, files[name], moved)

    def _read_back(self, name: str, digest: str) -> None:
        """Prove an object by reading it, where its ETag says nothing that we can check."""
        hashed = hashlib.sha256()
        stream(self.client, self.bucket, self.prefix + name, lambda at, data: hashed.update(data))
        if hashed.hexdigest() != digest:
            self.delete(name)
            raise Unavailable(
                f"{self.uri(name)}: the server did not keep the bytes that were sent; the object is removed"
            )

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none.

        Raises:
            UserError: they do not have the SHA-256 that was noted when they were stored.
        """
        chunks: list[bytes] = []
        with explained(self.uri(name)):
            try:
                metadata = stream(self.client, self.bucket, self.prefix + name, lambda at, data: chunks.append(data))
            except self.client.exceptions.NoSuchKey:
                return None
        data = b"".join(chunks)
        if (known := metadata.get(DIGEST)) and hashlib.sha256(data).hexdigest() != known:
            raise UserError(f"{self.uri(name)} does not have the bytes that were stored there")
        return data

    def fetch(self, name: str, path: Path | str) -> bool:
        """Copy the object to a file; False where there is none."""
        entry = self.stat(name)
        if entry is None:
            return False
        self.fetch_files([(entry, Path(path), "")], f"from {self.uri(name)}")
        return True

    def fetch_files(self, files: list[tuple[Entry, Path, str]], desc: str) -> None:
        """Copy objects to files; an interrupted call is gone on with.

        Args:
            files: object, file, and SHA-256 where it is known (it wins over the object's metadata).
            desc: for the progress bar.

        Raises:
            UserError: an object does not have the bytes that are expected, or is gone.
            Unavailable: the server does not answer, after retries.
        """

        def wanted(entry: Entry, path: Path, sha256: str) -> Wanted:
            return Wanted(self.prefix + entry.name, path, entry.size, entry.etag, sha256)

        def again(old: Wanted) -> Wanted | None:
            entry = self.stat(old.key[len(self.prefix) :])
            return wanted(entry, old.path, old.sha256) if entry else None

        with explained(self.uri()):
            download(self.client, self.bucket, [wanted(*file) for file in files], desc, again)

    def entries(self, start: str = "") -> list[Entry]:
        """The objects whose names begin with `start`, by name."""
        with explained(self.uri(start)):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + start
            )
            found = [
                Entry(o["Key"][len(self.prefix) :], o["Size"], o["ETag"], o["LastModified"].isoformat())
                for page in pages
                for o in page.get("Contents", [])
                if not o["Key"].endswith("/")
            ]
        return sorted(found, key=lambda entry: entry.name)

    def stat(self, name: str) -> Entry | None:
        """One object as a listing has it, or None; a missing bucket is an error here, which HEAD cannot tell."""
        with explained(self.uri(name)):
            found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + name, MaxKeys=1)
        for o in found.get("Contents", []):
            if o["Key"] == self.prefix + name:
                return Entry(name, o["Size"], o["ETag"], o["LastModified"].isoformat())
        return None

    def names(self) -> list[str]:
        """All names below the prefix, sorted."""
        return [entry.name for entry in self.entries()]

    def delete(self, name: str) -> None:
        """Remove one object; no error where there is none."""
        with explained(self.uri(name)):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def clear(self) -> None:
        """Remove everything below the prefix."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(self.delete, self.names()))


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _md5_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(path: Path) -> str:
    """The ETag that S3 gives to what was sent in parts of `PART`."""
    digests = []
    with open(path, "rb") as file:
        while data := file.read(PART):
            digests.append(hashlib.md5(data, usedforsecurity=False).digest())
    return f"{_md5(b''.join(digests))}-{len(digests)}"


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=PART,
        multipart_chunksize=PART,
        max_concurrency=PARALLEL,
        preferred_transfer_client="classic",
    )


def open_store(uri: str) -> Store:
    """The store at a folder or an ``s3://`` URI."""
    return S3Store(uri) if uri.startswith("s3://") else LocalStore(Path(uri))


def prove_store(uri: str) -> None:
    """Write, read and delete one small object.

    Raises:
        UserError: it does not work; the message names the URI and the server's answer, never a credential.
    """
    try:
        store: Store = S3Store(uri, **QUICK) if uri.startswith("s3://") else LocalStore(Path(uri))
        store.put_bytes(".probe", b"select-moe")
        if store.get(".probe") != b"select-moe":
            raise UserError(f"{uri}: an object written there does not read back")
        store.delete(".probe")
    except Unavailable as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{uri} cannot be written: {type(error).__name__}: {error}") from None
