"""Servers that tests of every kind start: a real S3 server (nanio), and the frame of a stand-in that speaks HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class S3Server:
    """A real S3 server process; a bucket is a folder below `folder`."""

    KEY, SECRET = "user", "right-secret"

    def __init__(self, folder: Path, *buckets: str, port: int = 0) -> None:
        if not port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        for bucket in buckets:
            (folder / bucket).mkdir()
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "nanio", "serve", "--data-dir", str(folder), "--no-access-log"]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"NANIO_ACCESS_KEY": self.KEY, "NANIO_SECRET_KEY": self.SECRET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)

    def environment(self, url: str = "") -> dict[str, str]:
        """What a client needs; `url` is that of a proxy before it."""
        keys = {"AWS_ACCESS_KEY_ID": self.KEY, "AWS_SECRET_ACCESS_KEY": self.SECRET}
        return keys | {"AWS_ENDPOINT_URL_S3": url or self.url, "AWS_DEFAULT_REGION": "us-east-1"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Stand:
    """An HTTP server in this process, at `url` until `close`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Quiet(BaseHTTPRequestHandler):
    """A handler that says nothing of the requests."""

    def log_message(self, *_: object) -> None:
        pass
