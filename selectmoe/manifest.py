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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe.errors import UserError

SCHEMA = 1
NAME = "manifest.json"
RESERVED = {".hydra", "logs", ".work"}
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


def work_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what is to be done; two works with the same key give the same result."""
    return digest({"schema": SCHEMA, "stage": stage, "version": version, "config": config, "inputs": inputs})


def own_files(directory: Path, parts: Collection[str] = ()) -> list[Path]:
    """The files of an output, sorted: no reserved folders, no nested outputs except its parts, no manifest of its own."""
    found: list[Path] = []
    for root, folders, names in os.walk(directory):
        here = Path(root)
        if here == directory:
            folders[:] = [f for f in folders if f not in RESERVED]
        own = {f for f in folders if (here / f).relative_to(directory).as_posix() in parts}
        folders[:] = [f for f in folders if f in own or not (here / f / NAME).exists()]
        found += [here / name for name in names if not (here == directory and name == NAME)]
    return sorted(found)


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
    for path in own_files(directory, parts):
        name = path.relative_to(directory).as_posix()
        found[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    files = []
    for name in sorted(found, key=Path):
        result = not any(fnmatch.fnmatch(name, pattern) for pattern in globs)
        files.append({"path": name, **found[name], "result": result})
    manifest = Manifest(SCHEMA, stage, version, config, inputs, files, rows, environment, created)
    manifest = dataclasses.replace(manifest, identity=_identity(manifest))
    manifest = dataclasses.replace(manifest, checksum=_checksum(manifest))
    temporary = directory / (NAME + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / NAME)
    return manifest


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


def parse_manifest(text: str, where: Path | str) -> Manifest:
    """The manifest in a text, proved against its own checksum.

    Args:
        text: content of a `manifest.json`.
        where: where it lies, for messages.

    Raises:
        UserError: it is none, of another schema, or was edited.
    """
    try:
        manifest = Manifest(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be read as a manifest: {error}") from None
    if manifest.schema != SCHEMA:
        raise UserError(f"{where} has schema {manifest.schema}; this version reads {SCHEMA}")
    if manifest.checksum != _checksum(manifest) or manifest.identity != _identity(manifest):
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
    manifest = parse_manifest(path.read_text(encoding="utf-8"), path)
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
    if missing := sorted(set(listed) - present):
        raise UserError(f"{directory}: {missing[0]} is missing (its manifest lists it)")
    if foreign := sorted(present - set(listed)):
        raise UserError(f"{directory}: {foreign[0]} is foreign (its manifest does not list it)")
    for name, entry in listed.items():
        path = directory / name
        if path.stat().st_size != entry["bytes"] or (content and sha256_file(path) != entry["sha256"]):
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
