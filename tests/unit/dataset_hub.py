"""A stand-in for the hub with one dataset: the files of a folder, over the part of the hub's protocol that reading needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote

from tests.serving import Quiet, Stand


class DatasetHub(Stand):
    """Serves `folder` as the dataset `NAME` at `COMMIT`; `seen` holds (method, path, Range) of every request."""

    NAME, COMMIT = "maker/rows", "1234567890abcdef1234567890abcdef12345678"

    def __init__(self, folder: Path) -> None:
        hub = self
        self.folder = folder
        self.seen: list[tuple[str, str, str]] = []
        self.gated = False
        self.broken = False
        """Whether every answer with a file's bytes is a server's own failure."""
        self.branch = self.COMMIT
        """What `main` is."""
        lock = threading.Lock()

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def give(self, data: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def refuse(self, status: int, code: str, message: str) -> None:
                self.give(b"", status, X_Error_Code=code, X_Error_Message=message)

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(self.path.partition("?")[0]).strip("/")
                with lock:
                    hub.seen.append((self.command, path, self.headers.get("Range", "")))
                if path.startswith(f"api/datasets/{hub.NAME}"):
                    self.api(path.removeprefix(f"api/datasets/{hub.NAME}").strip("/"), body)
                elif path.startswith(f"datasets/{hub.NAME}/resolve/"):
                    revision, _, name = path.removeprefix(f"datasets/{hub.NAME}/resolve/").partition("/")
                    self.file(revision, name)
                else:
                    self.refuse(404, "RepoNotFound", "Repository not found")

            def api(self, rest: str, body: bytes) -> None:
                kind, _, place = rest.partition("/")
                if kind == "auth-check":
                    return self.refuse(403, "GatedRepo", "restricted") if hub.gated else self.give(b"")
                revision, _, inside = place.partition("/")
                if kind and revision not in ("main", hub.branch, hub.COMMIT):
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                files = sorted(p for p in hub.folder.rglob("*") if p.is_file())
                names = [p.relative_to(hub.folder).as_posix() for p in files]
                if kind in ("", "revision"):
                    siblings = [{"rfilename": name} for name in names]
                    answer: object = {"id": hub.NAME, "sha": hub.branch, "siblings": siblings, "tags": []}
                elif kind == "tree":
                    answer = hub.tree(hub.folder / inside, "recursive=true" in self.path.lower())
                    if not answer:
                        return self.refuse(404, "EntryNotFound", f"{inside} does not exist")
                elif kind == "paths-info":
                    wanted = json.loads(body)["paths"]
                    answer = [entry for entry in hub.tree(hub.folder, True) if entry["path"] in wanted]
                else:
                    return self.refuse(404, "EntryNotFound", "no such route")
                self.give(json.dumps(answer).encode(), Content_Type="application/json")

            def file(self, revision: str, name: str) -> None:
                path = hub.folder / name
                if hub.gated:
                    return self.refuse(401, "GatedRepo", "Access to this dataset is restricted.")
                if revision not in ("main", hub.branch, hub.COMMIT):
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                if not path.is_file():
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                if hub.broken and self.command == "GET":
                    return self.give(b"", 503)
                data = path.read_bytes()
                headers = {"X_Repo_Commit": hub.branch, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not span:
                    return self.give(data, Accept_Ranges="bytes", **headers)
                first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
                headers |= {"Content_Range": f"bytes {first}-{last}/{len(data)}"}
                return self.give(data[first : last + 1], 206, **headers)

            do_GET = do_HEAD = do_POST = answer

        super().__init__(Handler)

    def tree(self, place: Path, recursive: bool) -> list[dict[str, object]]:
        """The files and folders below a folder as the hub's listings have them."""
        out: list[dict[str, object]] = []
        for path in sorted(place.rglob("*") if recursive else place.glob("*")):
            name, data = path.relative_to(self.folder).as_posix(), path.read_bytes() if path.is_file() else b""
            kind = "file" if path.is_file() else "directory"
            out.append({"type": kind, "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
        return out
