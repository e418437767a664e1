"""A real MLflow server process that can be stopped and started again, and a proxy in front of it that answers errors."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.serving import Quiet, Stand


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`mlflow server` on SQLite and a folder of artifacts."""

    def __init__(self, folder: Path, artifacts: str = "", **environment: str) -> None:
        self.folder = folder
        self.artifacts = artifacts or str(folder / "artifacts")
        self.environment = environment
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        quiet |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", self.artifacts]
        with open(self.folder / "mlflow.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | quiet | self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when it answers."""
        assert self.process is not None
        deadline = time.monotonic() + 120
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow does not come up: {(self.folder / 'mlflow.log').read_text()[-3000:]}")
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return True
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """A signal to the server and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, as a machine that dies."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy(Stand):
    """Hands requests on to a server; while `status` is set, answers that instead."""

    def __init__(self, port: int, body: str = "") -> None:
        proxy = self
        self.status = 0
        self.body = body
        self.refused = 0

        class Handler(Quiet):
            def hand_on(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.status:
                    proxy.refused += 1
                    status, answer, kind = proxy.status, proxy.body.encode(), "text/plain"
                else:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                    connection.request(self.command, self.path, data, headers | {"Host": f"127.0.0.1:{port}"})
                    response = connection.getresponse()
                    status, answer = response.status, response.read()
                    kind = response.getheader("Content-Type") or "application/octet-stream"
                    connection.close()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = hand_on

        super().__init__(Handler)
