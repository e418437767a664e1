"""Models and data that lie elsewhere, brought here once: S3 and the hub to folders on this machine.

No command runs this module. A place is a folder or file, `s3://bucket/prefix` (or one object), or a hub name `OWNER/NAME`
(`OWNER/NAME@REVISION`; across tasks `hf://OWNER/NAME@COMMIT`). What lies in a folder is used where it is. What lies on S3
comes to `CACHE/DIGEST/`, where CACHE is `SELECTMOE_MODEL_CACHE`: under a lock, resumable, verified, then renamed into
place. `CACHE/DIGEST.json` notes sizes and times of the verified files: as long as they are unchanged, nobody reads
them again to prove them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectmoe import manifest as mf
from selectmoe.errors import UserError
from selectmoe.storage import Entry, S3Store

CACHE = "SELECTMOE_MODEL_CACHE"
"""Environment variable: the folder of the cache."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SCHEMES = ("s3://", "hf://")
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "LICENCE*", "NOTICE*"]
"""What is taken from the hub: weights, configuration, tokenizer and licence; no pickles."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint as it crosses the pipeline: where it lies, and its identity."""

    uri: str
    digest: str

    def to_json(self) -> str:
        """The reference as a task's output."""
        return json.dumps(asdict(self), sort_keys=True)


def root() -> Path:
    """The folder of the cache: `SELECTMOE_MODEL_CACHE`, else below the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "selectmoe", "models")


def is_remote(place: str) -> bool:
    """Whether a place is on S3 or named as on the hub, so that no path stands for it."""
    return place.startswith(SCHEMES)


def resolve_model(place: str, key: str = "source_model") -> tuple[Path, Reference]:
    """Find a model, bring it here where it lies elsewhere, and prove it.

    Args:
        place: a folder, `s3://bucket/prefix`, or a hub name `OWNER/NAME[@REVISION]`.
        key: the configuration key that named it, for messages.

    Returns:
        Its folder on this machine, and the reference by which another machine finds the same bytes.

    Raises:
        UserError: nothing is there, it is damaged, the hub wants a token or an agreement, or S3 refuses.
        Unavailable: S3 does not answer, after retries.
    """
    path, uri = locate(place, key)
    return path, Reference(uri, identity_of(str(path)))


def locate(place: str, key: str = "source_model") -> tuple[Path, str]:
    """Where a model or rows lie on this machine, brought here if need be.

    Args:
        place: as in `resolve_model`, or a file.
        key: the configuration key that named it, for messages.

    Returns:
        The path, and the URI by which another machine finds it (a path is its own).

    Raises:
        UserError: as in `resolve_model`.
        Unavailable: S3 does not answer, after retries.
    """
    if place.startswith("s3://"):
        return _from_s3(place, key), place
    name = place.removeprefix("hf://")
    if name == place and Path(place).exists():
        return Path(place), str(Path(place).resolve())
    if HUB_NAME.fullmatch(name.partition("@")[0]):
        path = from_hub(name, key, MODEL_FILES)
        return path, f"hf://{name.partition('@')[0]}@{path.name}"
    expected = "expected a folder, s3://bucket/prefix, or a hub name like OWNER/NAME"
    raise UserError(f"{key}={place} does not exist; {expected}")


def fetch(reference: Reference, verify: bool = True) -> Path:
    """The checkpoint that a reference means, on this machine and proved to be it.

    Args:
        reference: where it lies, and its identity.
        verify: prove every byte of a folder that has a manifest; without, its manifest is believed.

    Returns:
        Its folder: where it is, or below the cache.

    Raises:
        UserError: nothing lies there, or something else.
        Unavailable: S3 does not answer, after retries.
    """
    if reference.uri.startswith("s3://"):
        return _fetch(reference, root())
    if reference.uri.startswith("hf://"):
        path, _ = locate(reference.uri)
    else:
        path = Path(reference.uri)
        if not path.exists():
            raise UserError(
                f"the checkpoint {path} is gone, but KFP's cache still names it: remove the cache and run again"
            )
        if not verify and (path / mf.NAME).is_file():
            _expect(reference, mf.read_manifest(path, verify=False).identity)
            return path
    _expect(reference, identity_of(str(path)))
    return path


def stored(uri: str) -> Reference | None:
    """The reference of a finished checkpoint on S3, or None where there is none yet.

    Raises:
        UserError: S3 refuses, or what lies there is no manifest of ours.
        Unavailable: S3 does not answer, after retries.
    """
    found = S3Store(uri).get(mf.NAME)
    return Reference(uri, _manifest(found, uri).identity) if found else None


def store(directory: Path | str, uri: str) -> Reference:
    """Bring a checkpoint to S3; its manifest goes last, so that a reader sees all of it or nothing.

    Args:
        directory: a finished output, or a plain folder of files.
        uri: ``s3://bucket/prefix``, or a folder's path: then the checkpoint stays where it is.

    Returns:
        The reference.

    Raises:
        UserError: another checkpoint lies there, or S3 refuses.
        Unavailable: S3 does not answer, after retries.
    """
    directory = Path(directory)
    digest = identity_of(str(directory))
    if not uri.startswith("s3://"):
        return Reference(str(directory.resolve()), digest)
    if there := stored(uri):
        if there.digest != digest:
            both = f"{there.digest[:12]}, not {digest[:12]}"
            raise UserError(f"{uri} holds another checkpoint ({both}): name another place")
        return there
    target = S3Store(uri)
    finished = (directory / mf.NAME).is_file()
    if finished:
        paths = mf.own_files(directory, mf.read_manifest(directory, verify=False).parts)
    else:
        paths = sorted(p for p in directory.rglob("*") if p.is_file())
    files = {path.relative_to(directory).as_posix(): path for path in paths}
    for name in set(target.names()) - set(files):  # left by a store that was killed, of another try
        target.delete(name)
    target.put_files(files, f"to {uri}")
    if finished:
        target.put_bytes(mf.NAME, (directory / mf.NAME).read_bytes())
    return Reference(uri, digest)


def adopt(directory: Path, digest: str) -> Path:
    """Move a checkpoint that was just made and proved into the cache, so that this machine need not fetch it.

    Args:
        directory: its files, on the file system of the cache.
        digest: its identity.

    Returns:
        Its folder in the cache.
    """
    cache = root()
    with _alone(cache, digest):
        if not _proved(cache, digest):
            shutil.rmtree(cache / digest, ignore_errors=True)
            directory.rename(cache / digest)
            _note(cache, digest)
    return cache / digest


def identity_of(place: str) -> str:
    """Identity of an input: what the cache has proved is not read again.

    Raises:
        UserError: nothing is there, or its files are not those of its manifest.
    """
    path = locate(place, "input")[0] if is_remote(place) else Path(place)
    inside = path.resolve()
    cache = root().resolve()
    if inside.is_relative_to(cache) and inside != cache:
        digest = inside.relative_to(cache).parts[0]
        if inside == cache / digest and _proved(cache, digest):
            return digest
    return mf.identity_of(path)


def _expect(reference: Reference, found: str) -> None:
    if found != reference.digest:
        raise UserError(
            f"the checkpoint {reference.uri} has changed: its identity is {found[:12]}, not {reference.digest[:12]}"
        )


def _manifest(data: bytes, uri: str) -> mf.Manifest:
    return mf.parse_manifest(data, f"{uri}/{mf.NAME}")


def _from_s3(uri: str, key: str) -> Path:
    """Bring what lies at a URI, whatever it is: an output with a manifest, a folder of files, or one object."""
    uri = uri.rstrip("/")
    source = S3Store(uri)
    entries = source.entries()
    if mf.NAME in {entry.name for entry in entries} and (finished := stored(uri)):
        return _fetch(finished, root())
    single = ""
    if not entries:
        parent, _, single = uri.rpartition("/")
        if parent != "s3:/":
            source = S3Store(parent)
            entry = source.stat(single)
            entries = [entry] if entry else []
    if not entries:
        raise UserError(f"{key}={uri} does not exist: there is no object of that name, and none below it")
    listing = mf.digest([asdict(entry) for entry in entries])
    cache, known = root(), root() / "listings" / listing
    if known.is_file() and _proved(cache, digest := known.read_text(encoding="utf-8")):
        return cache / digest / single
    with _alone(cache, listing):
        incoming = cache / f".{listing}.part"
        _bring(source, entries, incoming, {}, uri)
        digest = mf.tree_identity(incoming)
        with _alone(cache, digest):
            _settle(cache, incoming, digest)
        known.parent.mkdir(exist_ok=True)
        known.write_text(digest, encoding="utf-8")
    return cache / digest / single


def _fetch(reference: Reference, cache: Path) -> Path:
    """Bring a checkpoint of known identity from S3, unless the cache has it."""
    digest = reference.digest
    if _proved(cache, digest):
        return cache / digest
    with _alone(cache, digest):
        if _proved(cache, digest):
            return cache / digest
        if (cache / digest).is_dir() and _identity_or_nothing(cache / digest) == digest:  # touched, but the same bytes
            _note(cache, digest)
            return cache / digest
        source = S3Store(reference.uri)
        incoming = cache / f".{digest}.part"
        if data := source.get(mf.NAME):
            manifest = _manifest(data, reference.uri)
            _expect(reference, manifest.identity)
            known = {str(f["path"]): str(f["sha256"]) for f in manifest.files}
            entries = [entry for entry in source.entries() if entry.name in known]
            _bring(source, entries, incoming, known, reference.uri)
            (incoming / mf.NAME).write_bytes(data)
            mf.verify_files(incoming, manifest, content=False)
        else:
            entries = source.entries()
            if not entries:
                raise UserError(f"the checkpoint {reference.uri} is gone: nothing lies there")
            _bring(source, entries, incoming, {}, reference.uri)
            if (found := mf.tree_identity(incoming)) != digest:
                shutil.rmtree(incoming)
                _expect(reference, found)
        _settle(cache, incoming, digest)
    return cache / digest


def _bring(source: S3Store, entries: list[Entry], folder: Path, known: dict[str, str], uri: str) -> None:
    """Fetch objects into a folder; what an earlier try left whole there is kept, anything else is removed."""
    wanted = []
    for entry in entries:
        if ".." in Path(entry.name).parts:
            raise UserError(f"{uri} holds an object {entry.name!r}, which is no file name: remove it")
        path, sha256 = folder / entry.name, known.get(entry.name, "")
        whole = path.is_file() and path.stat().st_size == entry.size
        if not whole or (sha256 and mf.sha256_file(path) != sha256):
            wanted.append((entry, path, sha256))
    folder.mkdir(parents=True, exist_ok=True)
    source.fetch_files(wanted, f"from {uri}")
    names = {entry.name for entry in entries}
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _settle(cache: Path, incoming: Path, digest: str) -> None:
    shutil.rmtree(cache / digest, ignore_errors=True)
    incoming.rename(cache / digest)
    _note(cache, digest)


def _identity_or_nothing(path: Path) -> str:
    try:
        return mf.identity_of(path)
    except UserError:
        return ""


def _stats(folder: Path) -> dict[str, list[int]]:
    found = {p.relative_to(folder).as_posix(): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _note(cache: Path, digest: str) -> None:
    temporary = cache / f".{digest}.json.{os.getpid()}"
    temporary.write_text(json.dumps(_stats(cache / digest), sort_keys=True), encoding="utf-8")
    temporary.rename(cache / f"{digest}.json")


def _proved(cache: Path, digest: str) -> bool:
    """Whether a folder of the cache was verified, and has not been touched since."""
    note = cache / f"{digest}.json"
    if not note.is_file() or not (cache / digest).is_dir():
        return False
    noted: Any = json.loads(note.read_text(encoding="utf-8"))
    return bool(noted == _stats(cache / digest))


@contextmanager
def _alone(cache: Path, name: str) -> Iterator[None]:
    """One process at a time for one entry of the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache / f".{name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"the model cache {cache} cannot be written ({error.strerror}): set {CACHE}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def on_hub(place: str) -> bool:
    """Whether a place is on the hub and has to be asked for there: it is no path, and the hub is not switched off."""
    if not place.startswith("hf://") and Path(place).exists():
        return False
    if not HUB_NAME.fullmatch(place.removeprefix("hf://").partition("@")[0]):
        return False
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


def from_hub(name: str, key: str, patterns: list[str]) -> Path:
    """The hub's snapshot of a model, in the hub's own cache (below ours where `SELECTMOE_MODEL_CACHE` is set).

    Args:
        name: `OWNER/NAME[@REVISION]`, with or without `hf://`.
        key: the configuration key that named it, for messages.
        patterns: which of its files are wanted.

    Raises:
        UserError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    name = name.removeprefix("hf://")
    model, _, revision = name.partition("@")
    folder = root() / "hub" if os.environ.get(CACHE) else None
    with hub_errors(f"{key}={name}"):
        found = snapshot_download(
            model, revision=revision or None, cache_dir=folder, allow_patterns=patterns, etag_timeout=5
        )
    return Path(found)


@contextmanager
def hub_errors(place: str) -> Iterator[None]:
    """Turn the hub's errors into one line.

    Raises:
        UserError: `place` (KEY=OWNER/NAME[@REVISION]) is gated, private, unknown, or the hub does not answer.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    model, _, revision = place.partition("=")[2].partition("@")
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{place} is gated: accept its terms on the hub and set HF_TOKEN to a token that may read it"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{place}: the hub's model {model} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{place}: the hub has no model {model}, or it is private: look at the name, or set HF_TOKEN"
        ) from None
    except (OSError, ValueError) as error:  # every other error of huggingface_hub is one of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place} is neither a local folder nor a model that the hub gives: {reason}") from None
