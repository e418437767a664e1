"""The border between stages: a directory whose `manifest.json`, written last, says what it holds and where it came from.

No command runs this module. *Identity* is a digest over what was done and what came of it, and nothing about where,
when or by how many; *checksum* covers the whole manifest. A directory without a manifest does not exist for a reader.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError

SCHEMA = 1
NAME = "manifest.json"
WORK = ".work"
RESERVED = {".hydra", "logs", WORK}
"""Folders inside an output that are nobody's result and stand in no manifest."""


@dataclass(frozen=True)
class Manifest:
    """The content of a `manifest.json`; `config` holds the fields by role: ``{"identity": {...}, "execution": {...}}``."""

    schema: int
    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    files: list[dict[str, Any]]
    rows: dict[str, Any]
    environment: dict[str, Any]
    created: str
    identity: str = ""
    checksum: str = ""

    @property
    def key(self) -> str:
        """Digest of what was to be done: stage, version, identity fields, inputs' identities."""
        ids = {name: entry["identity"] for name, entry in self.inputs.items()}
        return work_key(self.stage, self.version, self.config["identity"], ids)

    @property
    def parts(self) -> list[str]:
        """The folders inside that have manifests of their own and belong to this output all the same: it lists those."""
        return [f["path"].removesuffix(f"/{NAME}") for f in self.files if f["path"].endswith(f"/{NAME}")]


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no blanks: equal values give equal bytes.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 (hex) of many files' bytes, several at a time."""
    with ThreadPoolExecutor(min(len(paths), len(os.sched_getaffinity(0))) or 1) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths)))


def work_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what is to be done; two works with the same key give the same result."""
    return digest({"schema": SCHEMA, "stage": stage, "version": version, "config": config, "inputs": inputs})


def own_files(directory: Path, parts: Collection[str] = ()) -> list[Path]:
    """The files of an output, sorted: no reserved folders, no manifest of its own, no nested outputs except its parts.

    A nested output that is being made is one too, and a link to something inside is a second name of that, not a file.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(directory):
        here = Path(root)
        if here == directory:
            folders[:] = [f for f in folders if f not in RESERVED]
        own = {f for f in folders if (here / f).relative_to(directory).as_posix() in parts}
        folders[:] = [f for f in folders if f in own or not ((here / f / NAME).exists() or (here / f / WORK).is_dir())]
        found += [here / name for name in names if not (here == directory and name == NAME)]
    return sorted(path for path in found if not _second_name(path, directory))


def _second_name(path: Path, directory: Path) -> bool:
    return path.is_symlink() and directory.resolve() in path.resolve().parents


def write_manifest(
    directory: Path,
    *,
    stage: str,
    version: int,
    config: dict[str, Any],
    inputs: dict[str, dict[str, str]],
    rows: dict[str, Any],
    environment: dict[str, Any],
    created: str,
    bookkeeping: Iterable[str] = (),
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
    parts: Collection[str] = (),
) -> Manifest:
    """Describe the files of `directory` and write its manifest, atomically and last.

    Args:
        directory: the finished files.
        stage: name of the stage.
        version: version of the stage's algorithm.
        config: fields by role.
        inputs: name -> ``{"uri", "identity"}``.
        rows: ``{"in", "out", "dropped": {reason: n}}``.
        environment: versions, seconds, memory; not part of the identity.
        created: ISO 8601 time.
        bookkeeping: globs of files that do not belong to the identity (``result: false``).
        elsewhere: name -> ``{"bytes", "sha256"}`` of files that belong to the output, but lie where it is to go already.
        parts: folders inside that have manifests already, and belong to this output too.

    Returns:
        The manifest, with identity and checksum.
    """
    globs = (*bookkeeping, f"*/{NAME}")
    found = {name: dict(entry) for name, entry in (elsewhere or {}).items()}
    known = {f"{part}/{f['path']}": f for part in parts for f in read_manifest(directory / part, verify=False).files}
    paths = {path.relative_to(directory).as_posix(): path for path in own_files(directory, parts)}
    digests = sha256_files([path for name, path in paths.items() if name not in known])
    for name, path in paths.items():  # what a part's manifest has just said is not read again
        found[name] = {"bytes": path.stat().st_size, "sha256": digests.get(path) or known[name]["sha256"]}
    files = []
    for name in sorted(found, key=Path):
        result = not any(fnmatch.fnmatch(name, pattern) for pattern in globs)
        files.append({"path": name, **found[name], "result": result})
    manifest = Manifest(SCHEMA, stage, version, config, inputs, files, rows, environment, created)
    manifest = dataclasses.replace(manifest, identity=_identity(manifest))
    manifest = dataclasses.replace(manifest, checksum=_checksum(manifest))
    temporary = directory / (NAME + ".part")
    with open(temporary, "wb") as file:
        file.write(_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / NAME)
    return manifest


def _bytes(m: Manifest) -> bytes:
    text = json.dumps(dataclasses.asdict(m), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _identity(m: Manifest) -> str:
    return digest(
        {
            "schema": m.schema,
            "stage": m.stage,
            "version": m.version,
            "config": m.config["identity"],
            "inputs": {name: entry["identity"] for name, entry in m.inputs.items()},
            "files": [{k: f[k] for k in ("path", "bytes", "sha256")} for f in m.files if f["result"]],
            "rows": m.rows,
        }
    )


def _checksum(m: Manifest) -> str:
    return digest({k: v for k, v in dataclasses.asdict(m).items() if k != "checksum"})


def parse_manifest(data: bytes, where: Path | str) -> Manifest:
    """The manifest in a file's bytes, proved against its own checksum.

    Args:
        data: content of a `manifest.json`.
        where: where it lies, for messages.

    Raises:
        UserError: it is none, of another schema, or was edited.
    """
    try:
        manifest = Manifest(**json.loads(data.decode("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be read as a manifest: {error}") from None
    if manifest.schema != SCHEMA:
        raise UserError(f"{where} has schema {manifest.schema}; this version reads {SCHEMA}")
    whole = manifest.checksum == _checksum(manifest) and data == _bytes(manifest)
    if not whole or manifest.identity != _identity(manifest):
        raise UserError(f"{where} was changed after it was written: its checksum does not fit")
    return manifest


def read_manifest(directory: Path | str, verify: bool = True) -> Manifest:
    """Read an output's manifest and, unless told otherwise, prove the files against it.

    Raises:
        UserError: no manifest, a manifest that was edited, or a file that is missing, foreign or changed (named).
    """
    directory = Path(directory)
    path = directory / NAME
    if not path.is_file():
        raise UserError(f"{directory} has no {NAME}: it is not a finished output of Select-MoE")
    manifest = parse_manifest(path.read_bytes(), path)
    if verify:
        verify_files(directory, manifest)
    return manifest


def verify_files(directory: Path, manifest: Manifest, content: bool = True) -> None:
    """Prove the files of a folder against a manifest.

    Args:
        directory: the folder.
        manifest: what it should hold.
        content: read every file; without, only names and sizes are compared.

    Raises:
        UserError: a file is missing, foreign or changed (named).
    """
    listed = {f["path"]: f for f in manifest.files}
    present = {p.relative_to(directory).as_posix() for p in own_files(directory, manifest.parts)}
    parts = [directory / part for part in manifest.parts]
    around = {*parts, *(part.parent for part in parts)}  # where no other output may lie
    for path in directory.rglob(NAME) if parts else ():
        name = path.relative_to(directory)
        if path.parent != directory and name.parts[0] not in RESERVED and around & {*path.parents}:
            present.add(name.as_posix())
    if missing := sorted(set(listed) - present):
        raise UserError(f"{directory}: {missing[0]} is missing (its manifest lists it)")
    if foreign := sorted(present - set(listed)):
        raise UserError(f"{directory}: {foreign[0]} is foreign (its manifest does not list it)")
    paths = {name: directory / name for name in listed}
    wrong = [name for name, path in paths.items() if path.stat().st_size != listed[name]["bytes"]]
    if content and not wrong:
        digests = sha256_files(list(paths.values()))
        wrong = [name for name, path in paths.items() if digests[path] != listed[name]["sha256"]]
    for name in wrong[:1]:
        raise UserError(f"{directory}: {name} does not have the bytes that its manifest lists")


def tree_identity(path: Path | str) -> str:
    """Identity of an input without a manifest: SHA-256 over its sorted (relative path, SHA-256) pairs.

    Raises:
        UserError: there is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        return digest([["", sha256_file(path)]])
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    pairs = [[p.relative_to(path).as_posix(), sha256_file(p)] for p in sorted(path.rglob("*")) if p.is_file()]
    return digest(sorted(pairs))


def identity_of(path: Path | str) -> str:
    """Identity of an input: its (verified) manifest's, or its files' where it has none."""
    path = Path(path)
    return read_manifest(path).identity if (path / NAME).is_file() else tree_identity(path)


def find_manifests(root: Path | str) -> list[tuple[Path, Manifest]]:
    """Every finished output at or below `root`, by path, parts of others left out; manifests are checked, files are not."""
    paths = [path.parent for path in sorted(Path(root).rglob(NAME)) if ".work" not in path.parts]
    found = {path: read_manifest(path, verify=False) for path in paths}
    parts = {path / part for path, manifest in found.items() for part in manifest.parts}
    return [(path, manifest) for path, manifest in found.items() if path not in parts]
