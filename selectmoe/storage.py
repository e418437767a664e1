"""Where committed progress lies: a folder or any S3 API (boto3), behind one small interface.

No command runs this module. Every put is atomic: a reader sees the whole object or none. Credentials come from the
environment only (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL_S3`) and are never printed.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from pathlib import Path
from typing import Any, Protocol

from selectmoe.errors import UserError


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
        shutil.copyfile(path, temporary)
        temporary.rename(target)

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def fetch(self, name: str, path: Path | str) -> bool:
        """Copy the object to a file; False where there is none."""
        source = self.root / name
        if not source.is_file():
            return False
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
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


class S3Store:
    """Objects below ``s3://bucket/prefix``."""

    def __init__(self, uri: str) -> None:
        self.bucket, prefix = split_s3(uri)
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        self.client = s3_client()

    def put_bytes(self, name: str, data: bytes) -> None:
        """Store `data` under `name`."""
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def put_file(self, name: str, path: Path | str) -> None:
        """Store a copy of a file under `name` (multipart where it is large)."""
        self.client.upload_file(str(path), self.bucket, self.prefix + name)

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return body

    def fetch(self, name: str, path: Path | str) -> bool:
        """Copy the object to a file; False where there is none."""
        data = self.get(name)
        if data is None:
            return False
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
        return True

    def names(self) -> list[str]:
        """All names below the prefix, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return sorted(o["Key"][len(self.prefix) :] for page in pages for o in page.get("Contents", []))

    def delete(self, name: str) -> None:
        """Remove one object; no error where there is none."""
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def clear(self) -> None:
        """Remove everything below the prefix."""
        for name in self.names():
            self.delete(name)


def s3_client(attempts: int = 5) -> Any:
    """A boto3 S3 client with bounded retries; a new session each, so that changed credentials are read."""
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": attempts, "mode": "standard"}
    return boto3.session.Session().client(
        "s3", config=Config(retries=retries, connect_timeout=4, signature_version="s3v4")
    )


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` URI.

    Raises:
        UserError: no bucket, or a user name or password in the URI.
    """
    parts = urllib.parse.urlsplit(uri)
    if "@" in parts.netloc:
        raise UserError("an s3:// URI must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(f"{uri!r} is not of the form s3://bucket/prefix")
    return parts.netloc, parts.path.lstrip("/")


def open_store(uri: str) -> Store:
    """The store at a folder or an ``s3://`` URI."""
    return S3Store(uri) if uri.startswith("s3://") else LocalStore(Path(uri))


def prove_store(uri: str) -> None:
    """Write, read and delete one small object.

    Raises:
        UserError: it does not work; the message names the URI and the server's answer, never a credential.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        store = open_store(uri)
        if isinstance(store, S3Store):
            store.client = s3_client(attempts=2)  # somebody waits for the answer
        store.put_bytes(".probe", b"select-moe")
        if store.get(".probe") != b"select-moe":
            raise UserError(f"{uri}: an object written there does not read back")
        store.delete(".probe")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        hint = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's name and policy"
        raise UserError(f"{uri} cannot be written: the S3 server answered {code}; {hint}") from None
    except (BotoCoreError, OSError) as error:
        raise UserError(f"{uri} cannot be written: {type(error).__name__}: {error}") from None
