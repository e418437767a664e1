"""A real S3 server (nanio) and a real MLflow server on this machine: started, found again, stopped.

`make run` starts them (`python -m pipelines.local run`) and leaves them up for browsing; `make down` stops exactly what
was started here. What is up is written to `STATE/servers.json` with each process's start time, so that a process
number that the system gave to somebody else is never taken for ours. Random S3 credentials are made once per state
folder and lie in `STATE/credentials.json` (mode 0600); they reach the two servers through their environment only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectmoe.entry import spare
from selectmoe.errors import UserError

HOST = "127.0.0.1"
BUCKET = "select-moe"
PORTS = {"s3": "SELECTMOE_S3_PORT", "mlflow": "SELECTMOE_MLFLOW_PORT"}
START_SECONDS = 60.0
"""How long a server may take to answer (MLflow migrates its database at the first start)."""
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Server:
    """One process that was started here: `started` is the system's own mark of when, `pid` its session too."""

    name: str
    pid: int
    started: str
    port: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"


def start(state: Path) -> dict[str, Server]:
    """Start what is not up; find again what is.

    Args:
        state: folder for the servers' data, logs and records.

    Returns:
        The servers by name: `s3`, `mlflow`.

    Raises:
        UserError: a port that the user set (`SELECTMOE_S3_PORT`, `SELECTMOE_MLFLOW_PORT`) is taken or is no port.
        RuntimeError: a server does not come up; the message ends with the last lines of its log.
    """
    state = state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    with _lock(state):
        records = _read(state)
        running = {name: server for name, server in records.items() if alive(server)}
        ports = {name: _port(name, running.get(name), records.get(name)) for name in PORTS}
        if "s3" not in running:
            _launch(state, running, "s3", ports["s3"])
            _make_bucket(state, running["s3"])
        if "mlflow" not in running:
            _launch(state, running, "mlflow", ports["mlflow"])
    return running


def check_ports(state: Path) -> None:
    """Prove that the servers could be started, without touching anything.

    Args:
        state: as in `start`; need not exist.

    Raises:
        UserError: as `start`.
    """
    records = _read(state.resolve())
    for name in PORTS:
        recorded = records.get(name)
        _port(name, recorded if recorded and alive(recorded) else None, recorded)
    one, other = (os.environ.get(variable, "") for variable in PORTS.values())
    if one and one == other:
        raise UserError(f"{' and '.join(PORTS.values())} are both {one}: give each server its own port")


def stop(state: Path) -> list[str]:
    """Stop the servers that were started from this state folder, and nothing else.

    Returns:
        The names of those that were up.
    """
    state = state.resolve()
    if not (state / "servers.json").is_file():
        return []
    with _lock(state):
        running = [server for server in _read(state).values() if alive(server)]
        for server in running:
            _end(server, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(_group_alive(s) for s in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        for server in filter(_group_alive, running):
            _end(server, signal.SIGKILL)
    return [server.name for server in running]


def credentials(state: Path) -> dict[str, str]:
    """The S3 credentials of a state folder as environment variables; made at the first call."""
    path = state.resolve() / "credentials.json"
    if not path.is_file():
        made = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
        }
        temporary = path.with_suffix(".part")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(made, file)
        temporary.rename(path)
    loaded: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def s3_environment(state: Path, url: str) -> dict[str, str]:
    """What an S3 client needs in its environment to talk to our server."""
    region = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": url,
        "MLFLOW_S3_ENDPOINT_URL": url,
    }
    return credentials(state) | region


def alive(server: Server) -> bool:
    """Whether this very process still runs (not another one under its number)."""
    return _start_mark(server.pid) == server.started


def _start_mark(pid: int) -> str:
    """The system's mark of when a process started; empty where there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()
    return "" if fields[0] == "Z" else fields[19]


def _group_alive(server: Server) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.pid, os.WNOHANG)  # ours only when it was started by this very process
    try:
        os.killpg(server.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end(server: Server, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, number)


@contextlib.contextmanager
def _lock(state: Path) -> Iterator[None]:
    with open(state / "servers.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(state: Path) -> dict[str, Server]:
    path = state / "servers.json"
    if not path.is_file():
        return {}
    return {name: Server(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}


def _write(state: Path, servers: dict[str, Server]) -> None:
    temporary = state / "servers.json.part"
    temporary.write_text(
        json.dumps({n: asdict(s) for n, s in servers.items()}, indent=1),
        encoding="utf-8",
    )
    temporary.rename(state / "servers.json")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _port(name: str, running: Server | None, recorded: Server | None) -> int:
    """The user's port, else that of the running server, else the last one used, else any free one."""
    wanted = os.environ.get(PORTS[name], "")
    if wanted:
        if not wanted.isdecimal() or not 1 <= int(wanted) <= 65535:
            raise UserError(f"{PORTS[name]}={wanted} is not a port (1 to 65535)")
        port = int(wanted)
        if running is not None and running.port != port:
            raise UserError(f"{PORTS[name]}={wanted}, but ours is up on port {running.port}: `make down` first")
        if running is None and not _free(port):
            raise UserError(f"{PORTS[name]}={wanted}: port {wanted} is taken by another process: choose a free one")
        return port
    if running is not None:
        return running.port
    if recorded is not None and _free(recorded.port):
        return recorded.port
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _launch(state: Path, running: dict[str, Server], name: str, port: int) -> None:
    """Start one server, write it down at once (a kill from here on must not lose it), and wait until it answers."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if name == "s3":
        keys = credentials(state)
        extra = {
            "NANIO_ACCESS_KEY": keys["AWS_ACCESS_KEY_ID"],
            "NANIO_SECRET_KEY": keys["AWS_SECRET_ACCESS_KEY"],
        }
        command = [
            "nanio",
            "serve",
            "--host",
            HOST,
            "--data-dir",
            str(state / "s3"),
            "--no-access-log",
        ]
        (state / "s3").mkdir(exist_ok=True)
    else:
        extra = s3_environment(state, running["s3"].url) | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [
            "mlflow",
            "server",
            "--host",
            HOST,
            "--workers",
            "1",
            "--allowed-hosts",
            "localhost:*,127.0.0.1:*",
        ]
        command += ["--backend-store-uri", f"sqlite:///{state / 'mlflow.db'}"]
        command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    log = state / f"{name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | quiet | extra,
            cwd=state,
            start_new_session=True,
        )
    spare(process.pid)  # it stays up when the run that started it is interrupted
    running[name] = Server(name, process.pid, _start_mark(process.pid), port)
    _write(state, running)
    _wait(process, running[name], log)


def _wait(process: subprocess.Popen[Any], server: Server, log: Path) -> None:
    """Return when the server answers at all; an S3 server answers an unsigned request with 403."""
    deadline = time.monotonic() + START_SECONDS
    path = "/health" if server.name == "mlflow" else "/"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(server.url + path, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    _end(server, signal.SIGKILL)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the {server.name} server did not come up on port {server.port}; the end of {log}:\n{tail}")


def _make_bucket(state: Path, server: Server) -> None:
    import boto3

    keys = credentials(state)
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
