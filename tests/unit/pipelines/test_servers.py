"""pipelines/servers.py without starting a server: `pytest tests/unit/pipelines/test_servers.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import servers
from selectmoe.errors import UserError


def test_credentials_are_made_once_and_private(tmp_path: Path) -> None:
    made = servers.credentials(tmp_path)
    assert servers.credentials(tmp_path) == made
    assert (tmp_path / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert len(made["AWS_SECRET_ACCESS_KEY"]) >= 30


def test_a_port_of_the_users_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        monkeypatch.setenv("SELECTMOE_MLFLOW_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="is taken by another process"):
            servers.start(tmp_path)
    assert not (tmp_path / "servers.json").exists()


@pytest.mark.parametrize("port", ["x", "0", "70000", "-1"])
def test_a_port_that_is_none(port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELECTMOE_S3_PORT", port)
    with pytest.raises(UserError, match="is not a port"):
        servers.start(tmp_path)


def test_a_running_server_keeps_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    server = servers.Server("s3", 1, "x", 4321)
    monkeypatch.delenv("SELECTMOE_S3_PORT", raising=False)
    assert servers._port("s3", server, server) == 4321
    monkeypatch.setenv("SELECTMOE_S3_PORT", "4322")
    with pytest.raises(UserError, match="make down"):
        servers._port("s3", server, server)


def test_down_stops_what_was_started_and_no_other_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours, foreign = (subprocess.Popen(command, start_new_session=True) for _ in range(2))
    try:
        records = {
            "s3": {"name": "s3", "pid": ours.pid, "started": servers._start_mark(ours.pid), "port": 1},
            "mlflow": {"name": "mlflow", "pid": foreign.pid, "started": "another time", "port": 2},
        }
        (tmp_path / "servers.json").write_text(json.dumps(records))
        assert servers.stop(tmp_path) == ["s3"]
        assert foreign.poll() is None
        with pytest.raises(ProcessLookupError):
            os.kill(ours.pid, 0)
        assert servers.stop(tmp_path) == []
    finally:
        for process in (ours, foreign):
            process.kill()
            process.wait()


def test_down_where_nothing_was_ever_started(tmp_path: Path) -> None:
    assert servers.stop(tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()
