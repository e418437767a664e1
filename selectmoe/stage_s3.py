"""An output that goes to S3 file by file, so that this machine holds one file of it at a time.

No command runs this module; `stage.begin` opens such an output where `output_dir=` is an ``s3://`` URI and the stage
gives its files up one by one (`convert`). A file that was kept is an object below the URI; what it is stands in
`kept.json` of the committed work (by default below `URI/.work`), and a restart goes on after it. The manifest goes last.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from selectmoe import cache
from selectmoe import manifest as mf
from selectmoe.config import StageConfig
from selectmoe.errors import UserError
from selectmoe.stage import METRICS, Output
from selectmoe.storage import S3Store

KEPT = "kept.json"
WORK = ".work/"


class S3Output(Output):
    """An output below `config.output_dir`, a URI; `path` is a scratch folder beside the model cache."""

    def __init__(self, stage: str, version: int, config: StageConfig, inputs: dict[str, dict[str, str]]):
        self.uri = config.output_dir.rstrip("/")
        work_root = config.work_root or f"{self.uri}/{WORK}".rstrip("/")
        super().__init__(Path(), stage, version, dataclasses.replace(config, work_root=work_root), inputs)
        self.path = cache.root() / "outgoing" / mf.digest([self.uri, self.key])
        self.staging = self.path / ".work" / "staging"
        self.target = S3Store(self.uri)
        self.kept: dict[str, dict[str, Any]] = {}

    @property
    def place(self) -> str:
        """The URI."""
        return self.uri

    def finished(self) -> mf.Manifest | None:
        """The manifest of what lies there, its files looked at by name and size; None where nothing is finished.

        Raises:
            UserError: the URI holds something else.
        """
        there = {entry.name: entry.size for entry in self.target.entries() if not entry.name.startswith(WORK)}
        if data := self.target.get(mf.NAME):
            manifest = mf.parse_manifest(data, f"{self.uri}/{mf.NAME}")
            for file in manifest.files:
                if there.get(file["path"]) != file["bytes"]:
                    raise UserError(f"{self.uri}/{file['path']} is not what its manifest lists: choose another place")
            return manifest
        begun = json.loads(self.work.get(KEPT) or b"{}")
        if begun.get("uri") == self.uri:
            self.kept = {name: entry for name, entry in begun["files"].items() if there.get(name) == entry["bytes"]}
        elif there:
            raise UserError(
                f"output_dir={self.uri} holds {min(there)}, which is not a finished output: choose another place"
            )
        self._note()
        return None

    def _note(self) -> None:
        self.work.put_bytes(KEPT, json.dumps({"uri": self.uri, "files": self.kept}, sort_keys=True).encode())

    def has(self, name: str) -> bool:
        """Whether this file lies at the URI, sent here or before a kill."""
        return name in self.kept

    def keep(self, name: str) -> None:
        """Send ``NAME.part`` of the staging folder, prove that it arrived, and remove it here."""
        path = self.staging / f"{name}.part"
        self.target.put_file(name, path)
        self.kept[name] = {"bytes": path.stat().st_size, "sha256": mf.sha256_file(path)}
        self._note()
        path.unlink()

    def commit(
        self,
        *,
        rows_in: int = 0,
        rows_out: int = 0,
        dropped: Mapping[str, int] | None = None,
        bookkeeping: Iterable[str] = (),
        parts: Collection[str] = (),
    ) -> None:
        """Send what is left in the staging folder, then the manifest; arguments as `Output.commit`."""
        self._stage_metrics()
        files = {path.relative_to(self.staging).as_posix(): path for path in mf.own_files(self.staging, parts)}
        self.target.put_files(files, f"to {self.uri}")
        self._write(self.staging, rows_in, rows_out, dropped or {}, (*bookkeeping, METRICS), self.kept, parts=parts)
        for name in self.target.names():  # what a run that was killed had sent, and not noted
            if name not in {*files, *self.kept} and not name.startswith(WORK):
                self.target.delete(name)
        self.target.put_bytes(mf.NAME, (self.staging / mf.NAME).read_bytes())
        self.work.clear()
        shutil.rmtree(self.path, ignore_errors=True)

    def abandon(self, existed: bool) -> None:
        """After a user's mistake nothing is left behind, neither here nor there."""
        for name in self.kept:
            self.target.delete(name)
        self.work.clear()
        shutil.rmtree(self.path, ignore_errors=True)
