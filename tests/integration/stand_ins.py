"""Stand-ins for servers: of the model hub, and such that answer one thing or nothing."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

from tests.serving import Quiet, Stand

ACCESS_DENIED = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


class Answering(Stand):
    """A stand-in for a server in a certain state: it answers every request with the same."""

    def __init__(self, status: int, body: str = "", **headers: str) -> None:
        class Handler(Quiet):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body.encode())

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

        super().__init__(Handler)


class Hub(Stand):
    """A stand-in for the model hub with one model, the files of a folder; weights are kept as the hub keeps large files."""

    NAME, COMMIT = "maker/model", "1234567890abcdef1234567890abcdef12345678"

    def __init__(self, folder: Path, gated: bool = False) -> None:
        hub = self
        self.sent: list[str] = []
        """Files that were given away."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        siblings, tree = [], []
        for name, data in files.items():
            large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
            entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            siblings.append(entry | ({"lfs": large} if name.endswith(".safetensors") else {}))
            tree.append({"type": "file", "path": name, "size": len(data), "oid": entry["blobId"]})
        info = {"id": self.NAME, "sha": self.COMMIT, "siblings": siblings, "tags": []}

        class Handler(Quiet):
            def give(self, data: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].strip("/").split("/")
                name = path[-1]
                if path[0] == "api" and "/".join(path[2:4]) == hub.NAME:
                    answer = tree if path[4:5] == ["tree"] else info
                    self.give(json.dumps(answer).encode(), Content_Type="application/json")
                elif gated:
                    self.give(b"", 401, X_Error_Code="GatedRepo", X_Error_Message="You must be authenticated.")
                elif "/".join(path[:2]) == hub.NAME and name in files:
                    if self.command == "GET":
                        hub.sent.append(name)
                    etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                    self.give(files[name], X_Repo_Commit=hub.COMMIT, ETag=etag)
                else:
                    self.give(b"", 404, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET

        super().__init__(Handler)


class Hanging:
    """A stand-in for a server that takes connections and never answers."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def close(self) -> None:
        self.socket.close()
