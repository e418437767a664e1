"""A model as `check` looks at it: what lies elsewhere is seen without its gigabytes.

No command runs this module; `selectmoe check` does. A folder is seen as it is. Of what lies on S3 or the hub, the small
files are fetched, and every weight file is a hole of the right size. The identity is known all the same: on S3 from the
checkpoint's manifest, on the hub from the digests that it keeps of large files. Where nobody noted them (a folder on S3
without a manifest), the whole has to be brought here, which `reference` does once everything else is proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from selectmoe import cache
from selectmoe import manifest as mf
from selectmoe.cache import Reference
from selectmoe.errors import UserError
from selectmoe.storage import QUICK, S3Store

WEIGHTS = ".safetensors"
SMALL = 64 << 20
"""No configuration or tokenizer is larger; what is counts as a weight file."""


@dataclass(frozen=True)
class Glimpse:
    """A model that was looked at."""

    place: str
    key: str
    folder: Path
    """Its files."""
    whole: bool
    """Whether they are the model itself; otherwise weights are holes of the right size."""
    uri: str
    """Where another machine finds it."""
    digest: str
    """Its identity; empty where only all of its bytes tell."""

    def reference(self) -> Reference:
        """The model as it crosses the pipeline; reads all of a folder, and fetches what nothing else identifies.

        Raises:
            UserError: it is damaged, or gone.
            Unavailable: S3 does not answer, after retries.
        """
        if self.whole:
            return Reference(self.uri, cache.identity_of(str(self.folder)))
        return Reference(self.uri, self.digest) if self.digest else cache.resolve_model(self.place, self.key)[1]


def look(place: str, key: str, scratch: Path) -> Glimpse:
    """Look at a model.

    Args:
        place: a folder, `s3://bucket/prefix`, or a hub name `OWNER/NAME[@REVISION]`.
        key: the configuration key that named it, for messages.
        scratch: a folder to make, for the small files of what lies elsewhere.

    Raises:
        UserError: nothing is there, the hub wants a token or an agreement, or S3 refuses.
        Unavailable: S3 does not answer.
    """
    if place.startswith("s3://"):
        return _on_s3(place.rstrip("/"), key, scratch)
    if cache.on_hub(place):
        return _on_hub(place, key, scratch)
    folder, uri = cache.locate(place, key)
    return Glimpse(place, key, folder, True, uri, "")


def _on_s3(uri: str, key: str, scratch: Path) -> Glimpse:
    store = S3Store(uri, **QUICK)
    entries = store.entries()
    if not entries:
        raise UserError(f"{key}={uri} does not exist: there is no object of that name, and none below it")
    digest = ""
    for entry in entries:
        if entry.name.endswith(WEIGHTS) or entry.size > SMALL:
            _hole(scratch / entry.name, entry.size)
        elif data := store.get(entry.name):
            _place(scratch / entry.name).write_bytes(data)
            if entry.name == mf.NAME:
                digest = mf.parse_manifest(data, f"{uri}/{mf.NAME}").identity
    return Glimpse(uri, key, scratch, False, uri, digest)


def _on_hub(place: str, key: str, scratch: Path) -> Glimpse:
    from httpx2 import HTTPError  # which huggingface_hub speaks with, and whose errors it lets through here
    from huggingface_hub import HfApi

    name = place.removeprefix("hf://").partition("@")[0]
    small = cache.from_hub(place, key, [pattern for pattern in cache.MODEL_FILES if not pattern.endswith(WEIGHTS)])
    uri = f"hf://{name}@{small.name}"
    try:
        found = HfApi().model_info(name, revision=small.name, files_metadata=True, timeout=10)
    except HTTPError:  # the hub is away; its own cache may have the whole model, as it had the small files
        return Glimpse(place, key, cache.locate(uri, key)[0], True, uri, "")
    pairs: list[list[str]] = []
    for file in found.siblings or []:
        if not any(fnmatchcase(file.rfilename, pattern) for pattern in cache.MODEL_FILES):
            continue
        target = scratch / file.rfilename
        if file.rfilename.endswith(WEIGHTS):
            _hole(target, file.size or 0)
            pairs.append([file.rfilename, file.lfs.sha256 if file.lfs else ""])
        else:
            _place(target).symlink_to((small / file.rfilename).resolve())
            pairs.append([file.rfilename, mf.sha256_file(target)])
    known = all(digest for _, digest in pairs)
    return Glimpse(place, key, scratch, False, uri, mf.digest(sorted(pairs)) if known else "")


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _hole(path: Path, size: int) -> None:
    with open(_place(path), "wb") as file:
        file.truncate(size)
