"""A container of the rendered chart as a process of this machine. No command.

Command, arguments and environment are exactly those that were rendered, and the environment holds nothing else but where
programs and temporary files are. Replaced is only what this machine cannot have: addresses of other pods, folders that
are mounted, MLflow's port 5000. Secrets come from where the cluster would keep them: what the secrets' Job made.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manifests import Doc, named, pods

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = {"python": [sys.executable], "mlflow": [sys.executable, "-m", "mlflow"]}

OLD = "97727af70f4d"
"""A revision of MLflow's schema of 2023 (MLflow 2.3)."""


def old_schema(address: str) -> None:
    """Give an empty database the tables of an old MLflow, by MLflow's own migrations."""
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sqlalchemy.create_engine(address)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(address)
        config.attributes["connection"] = connection
        command.upgrade(config, OLD)
    engine.dispose()


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Site:
    """A rendering, and what stands for the cluster around it."""

    docs: list[Doc]
    folder: Path
    """Where mounted folders lie."""
    addresses: dict[str, str] = field(default_factory=dict)
    """What is rendered -> what it is here."""
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Secret -> key -> text."""

    def container(self, name: str) -> Doc:
        """A container by its name; every one of the chart has its own."""
        (found,) = [entry for pod in pods(self.docs) for entry in pod.containers() if entry["name"] == name]
        return found

    def text(self, value: str) -> str:
        """A rendered text with this machine's addresses."""
        for rendered, here in self.addresses.items():
            value = value.replace(rendered, here)
        return value

    def command(self, name: str) -> list[str]:
        """What a container runs."""
        entry = self.container(name)
        program, *words = [*entry["command"], *entry.get("args", [])]
        return [*PROGRAMS[program], *map(self.text, words)]

    def environment(self, name: str) -> dict[str, str]:
        """A container's environment, its Secrets read."""
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(temporary), "TMPDIR": str(temporary)}
        given: dict[str, str] = {}
        for entry in self.container(name).get("env") or []:
            if "value" in entry:
                given[entry["name"]] = self.text(entry["value"])
            else:
                reference = entry["valueFrom"]["secretKeyRef"]
                given[entry["name"]] = self.secrets[reference["name"]][reference["key"]]
        return image | given

    def mount(self, path: str, suffix: str) -> None:
        """Write the files of the ConfigMap whose name ends so, and have every mention of `path` lead to them.

        Args:
            path: where it is mounted.
            suffix: end of the ConfigMap's name.
        """
        (config,) = [doc for doc in named(self.docs, "ConfigMap") if doc["metadata"]["name"].endswith(suffix)]
        for name, text in config["data"].items():
            (self.folder / name).write_text(self.text(text))
            self.addresses[f"{path}/{name}"] = str(self.folder / name)

    def start(self, name: str, log: Path | None = None, **more: str) -> subprocess.Popen[str]:
        """Start a container; `log` takes what it says; `more` is environment that only this machine needs."""
        return subprocess.Popen(
            self.command(name),
            env=self.environment(name) | more,
            cwd=self.folder / "tmp",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if log is None else log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, code: int = 0, **more: str) -> str:
        """Run a container to its end; what it says."""
        process = self.start(name, **more)
        said, _ = process.communicate(timeout=150)
        assert process.returncode == code, f"{name}: exit code {process.returncode}\n{said}"
        assert not any(text in said for texts in self.secrets.values() for text in texts.values() if len(text) > 8)
        return said


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a container's processes, as when its node dies."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def probes(container: Doc) -> Iterator[tuple[str, str, int]]:
    """Kind, path and port of a container's probes; a port's name is looked up among the container's ports."""
    ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[kind]["httpGet"]
        yield kind, get["path"], ports.get(get["port"], get["port"])


def ask(port: int, path: str, host: str = "", headers: Mapping[str, str] | None = None) -> int:
    """The status of an answer; 0: nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}", **(headers or {})})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


class Mlflow:
    """The chart's MLflow server, started as rendered but for its port."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.port = free_port()
        container = site.container("mlflow")
        (self.rendered_port,) = [int(word.removeprefix("--port=")) for word in container["args"] if "--port=" in word]
        site.addresses[f"--port={self.rendered_port}"] = f"--port={self.port}"
        log = site.folder / "mlflow.log"
        self.process = site.start("mlflow", log)
        path = container["startupProbe"]["httpGet"]["path"]
        deadline = time.monotonic() + 120
        while ask(self.port, path) != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                kill(self.process)
                raise RuntimeError(f"MLflow does not come up: {log.read_text()[-3000:]}")
            time.sleep(0.1)

    def close(self) -> None:
        """End it."""
        kill(self.process)
