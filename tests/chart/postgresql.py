"""A real PostgreSQL server with TLS and passwords, in a temporary folder, as a process without rights. No command.

PostgreSQL refuses to run as root: root starts it as `nobody`. `scripts/chart_tools.py` installs Debian's package.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg

USER, PASSWORD = "mlflow", "a-password-of-the-test"


def program(name: str) -> str:
    """A program of PostgreSQL's; Debian keeps those of the server off PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which(name)
    assert found, f"{name} is missing: install Debian's package postgresql (make chart-test does, as root)"
    return found


class PostgreSQL:
    """The server, until `close`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.data = self.folder / "data"
        self.who: dict[str, Any] = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        )
        (self.folder / "password").write_text(PASSWORD)
        self._certificate()
        if self.who:
            for path in (self.folder, *self.folder.iterdir()):
                shutil.chown(path, "nobody", "nogroup")
        options = ["--username", USER, "--pwfile", str(self.folder / "password"), "--auth=scram-sha-256"]
        self._run("initdb", "--pgdata", str(self.data), *options, "--encoding=UTF8", "--locale=C", "--no-sync")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _certificate(self) -> None:
        made = ["-keyout", str(self.folder / "key.pem"), "-out", str(self.folder / "cert.pem")]
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
        subprocess.run([*request, *made], check=True, capture_output=True)
        (self.folder / "key.pem").chmod(0o600)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run([program(name), *arguments], check=True, capture_output=True, cwd=self.folder, **self.who)

    def start(self) -> None:
        """Start it, and return when it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "ssl": "on",
            "ssl_cert_file": self.folder / "cert.pem",
            "ssl_key_file": self.folder / "key.pem",
            "fsync": "off",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [program("postgres"), "-D", str(self.data), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                **self.who,
            )
        while self.process.poll() is None:
            try:
                self.connect("postgres").close()
            except psycopg.OperationalError:
                continue
            return
        raise RuntimeError((self.folder / "log").read_text())

    def connect(self, database: str) -> psycopg.Connection[Any]:
        """A connection of our own; commits by itself."""
        place = {"host": "127.0.0.1", "port": self.port, "dbname": database}
        return psycopg.connect(**place, user=USER, password=PASSWORD, autocommit=True)

    def create(self, database: str) -> None:
        """An empty database."""
        with self.connect("postgres") as connection:
            connection.execute(f'CREATE DATABASE "{database}"')

    def close(self) -> None:
        """End it and remove its folder."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # ends its connections, too
            self.process.wait()
        shutil.rmtree(self.folder)
